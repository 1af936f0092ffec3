// Fused calls as the kernels want them: the tables of their tensors. See [Note: tables].
#ifdef PRIMITIVES_CUDA
#include <algorithm>
#include <utility>

#include "collectives/cuda/device_transport.hpp"
#include "collectives/cuda/prepare.hpp"

namespace primitives {

void DeviceTransport::launch_many(const Call& call, DeviceCall& made, const Cuts& cuts,
                                  const std::vector<const void*>& ins,
                                  const std::vector<void*>& outs, Milliseconds timeout) {
  check();
  const int n = ranks_.world_size, me = ranks_.rank;
  const size_t staged = call.op == Op::kAllGatherMany ? made.many.out_itemsize : call.itemsize;
  const cuda::TableLayout of{static_cast<size_t>(n), cuts.num_tensors()};
  const size_t table_nbytes = of.num_words() * sizeof(uint64_t);
  size_t num_groups = 0;
  for (size_t t = 0; made.many.squares != nullptr && t < cuts.num_tensors(); t++) {
    num_groups += (cuts.numel(me, t) + cuda::kGroupNumel - 1) / cuda::kGroupNumel;
  }
  const size_t partials_nbytes = num_groups * cuda::kLeavesPerGroup * sizeof(float);
  primitives_cuda_error error;
  const int captured = primitives_cuda_is_captured(device_, stream_(), &error);
  const uint32_t uploaded = __atomic_load_n(&ranks_.status->uploaded, __ATOMIC_ACQUIRE);
  Tables::Place table;
  if (captured < 0 ||
      !tables_.take(device_, table_nbytes, table_nbytes + partials_nbytes,
                    static_cast<uint32_t>(seq_ + 1), uploaded, captured != 0, &table, &error)) {
    cannot_launch(call, error.text);
  }
  cuda::write_cuts(table.host, of, me, [&](int r, size_t t) { return cuts.numel(r, t); });
  for (size_t t = 0; t < cuts.num_tensors(); t++) {
    table.host[of.ins() + t] = reinterpret_cast<uintptr_t>(ins[t]);
    table.host[of.outs() + t] = reinterpret_cast<uintptr_t>(outs[t]);
    table.host[of.places() + t] = 0;
  }
  for (int r = 0; r < n; r++) {
    made.in_nbytes[r] = table.host[of.starts(r) + cuts.num_tensors()] * staged;
  }
  made.many.table = table.device;
  made.many.upload = table.host;
  made.many.upload_nbytes = table_nbytes;
  made.many.digest = call.digest;
  made.many.num_tensors = static_cast<uint32_t>(cuts.num_tensors());
  made.many.partials = reinterpret_cast<float*>(table.device + of.num_words());
  if (group().zero_copy() && *cuda::check_offer(ranks_, made) == '\0') {
    made.place = write_places(call, made, cuts, ins, table.host + of.places());
  }
  launch(call, made, timeout);
}

uint64_t DeviceTransport::write_places(const Call& call, const DeviceCall& made, const Cuts& cuts,
                                       const std::vector<const void*>& ins, uint64_t* places) {
  const int me = ranks_.rank, last = ranks_.world_size - 1;
  for (size_t t = 0; t < cuts.num_tensors(); t++) {
    const size_t numel = call.op == Op::kAllGatherMany ? cuts.numel(me, t)
                                                       : cuts.begin(last, t) + cuts.numel(last, t);
    if (numel == 0) continue;
    places[t] =
        heap_->place_of(ins[t], numel * made.many.in_itemsize, static_cast<uint32_t>(seq_ + 1));
    if (places[t] == PRIMITIVES_CUDA_NOT_SYMMETRIC) return PRIMITIVES_CUDA_NOT_SYMMETRIC;
  }
  return 0;
}

void DeviceTransport::all_gather_many(const Call& call, const GatherMany& many,
                                      Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  if (many.cast != nullptr) {
    made.many.from = static_cast<uint8_t>(many.from);
    made.many.to = static_cast<uint8_t>(many.to);
  }
  made.many.in_itemsize = static_cast<uint8_t>(many.shard_itemsize);
  made.many.out_itemsize = static_cast<uint8_t>(many.full_itemsize);
  launch_many(call, made, many.cuts, many.shards, many.fulls, timeout);
}

void DeviceTransport::reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                                          Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  made.dtype = static_cast<uint8_t>(many.dtype);
  made.reduce_op = static_cast<uint8_t>(ReduceOp::kSum);
  made.factor = call.factor;
  made.many.in_itemsize = static_cast<uint8_t>(many.itemsize);
  made.many.out_itemsize = sizeof(float);
  made.many.accumulate = many.accumulate;
  made.many.squares = many.squares;
  launch_many(call, made, many.cuts, many.fulls, {many.shards.begin(), many.shards.end()}, timeout);
}

}  // namespace primitives
#endif
