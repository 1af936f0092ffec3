// Calls as the kernels want them. The meeting and failure are in device_meeting.cpp and
// device_failure.cpp.
#ifdef PRIMITIVES_CUDA
#include "collectives/cuda/device_transport.hpp"

#include <algorithm>

#include "collectives/cuda/prepare.hpp"

namespace primitives {
namespace {

primitives_cuda_call begin(const Call& call, const Reduction& reduction) {
  primitives_cuda_call made = begin_call(call);
  made.dtype = static_cast<uint8_t>(reduction.dtype);
  made.reduce_op = static_cast<uint8_t>(reduction.op);
  made.factor = reduction.op == ReduceOp::kPremulSum ? reduction.factor : 0;
  made.has_counts = 0;
  return made;
}

void set_in(primitives_cuda_call& call, int rank, const void* data, size_t nbytes) {
  call.in[rank] = static_cast<const char*>(data);
  call.in_nbytes[rank] = nbytes;
}

void set_out(primitives_cuda_call& call, int rank, void* data, size_t nbytes) {
  call.out[rank] = static_cast<char*>(data);
  call.out_nbytes[rank] = nbytes;
}

}  // namespace

primitives_cuda_call begin_call(const Call& call) {
  primitives_cuda_call made{};
  made.op = static_cast<uint8_t>(call.op);
  made.dtype = moved_dtype(call.dtype);
  made.has_counts = call.has_counts;
  made.root = call.root;
  made.place = PRIMITIVES_CUDA_NOT_SYMMETRIC;
  return made;
}

void DeviceTransport::launch(const Call& call, DeviceCall& device_call, Milliseconds timeout) {
  check();
  device_call.seq = static_cast<uint32_t>(++seq_);
  {
    const std::lock_guard<std::mutex> lock(launched_mutex_);
    launched_[seq_ % launched_.size()] = {call, this_site()};
  }
  primitives_cuda_error error;
  void* const stream = stream_();
  const int captured = primitives_cuda_is_captured(device_, stream, &error);
  if (captured < 0) cannot_launch(call, error.text);
  if (!captured) heap_->map_new(device_call.seq);
  heap_->copy_chunks(&ranks_);
  if (!cuda::is_fused(call.op)) device_call.place = offer(device_call);
  primitives_cuda_ranks ranks = ranks_;
  ranks.timeout_ns = static_cast<uint64_t>(timeout.count()) * 1'000'000;
  if (primitives_cuda_launch(device_, &ranks, device_call, stream, last_, &error) != 0) {
    cannot_launch(call, error.text);
  }
}

uint64_t DeviceTransport::offer(const DeviceCall& call) {
  if (!group().zero_copy() || *cuda::check_offer(ranks_, call) != '\0') {
    return PRIMITIVES_CUDA_NOT_SYMMETRIC;
  }
  const char *begin = call.in[0], *end = begin + call.in_nbytes[0];  // of all parts
  for (int r = 1; r < ranks_.world_size; r++) {
    if (call.in_nbytes[r] == 0) continue;
    begin = std::min(begin, call.in[r]);
    end = std::max(end, call.in[r] + call.in_nbytes[r]);
  }
  const uint64_t place = heap_->place_of(begin, end - begin, call.seq);
  return place == PRIMITIVES_CUDA_NOT_SYMMETRIC ? place : place + (call.in[0] - begin);
}

uint64_t DeviceTransport::num_zero_copy() {
  return ranks_.status == nullptr ? 0
                                  : __atomic_load_n(&ranks_.status->num_direct, __ATOMIC_ACQUIRE);
}

void DeviceTransport::cannot_launch(const Call& call, const char* why) {
  Group& of = group();
  of.fail(Failure::kOther, of.here() + ": " + op_name(call.op) + " on device " +
                               std::to_string(device_) + ": " + why);
}

void DeviceTransport::all_gather(const Call& call, const void* in, size_t in_nbytes,
                                 const std::vector<Part>& out, Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  for (int r = 0; r < ranks_.world_size; r++) {
    set_in(made, r, in, in_nbytes);
    set_out(made, r, out[r].data, out[r].nbytes);
  }
  launch(call, made, timeout);
}

void DeviceTransport::reduce_scatter(const Call& call, const std::vector<Part>& in, void* out,
                                     const Reduction& reduction, Milliseconds timeout) {
  const int n = ranks_.world_size, me = ranks_.rank;
  bool equal = true;
  for (const Part& part : in) equal = equal && part.nbytes == in[0].nbytes;
  if (equal) {
    DeviceCall made = begin(call, reduction);
    for (int r = 0; r < n; r++) set_in(made, r, in[r].data, in[r].nbytes);
    set_out(made, 0, out, in[me].nbytes);
    return launch(call, made, timeout);
  }
  for (int r = 0; r < n; r++) {  // parts of different sizes: one after the other
    Call of_one = call;
    of_one.op = Op::kReduce;
    of_one.root = r;
    DeviceCall made = begin(of_one, reduction);
    set_in(made, 0, in[r].data, in[r].nbytes);
    set_out(made, 0, r == me ? out : in[r].data, in[r].nbytes);
    launch(of_one, made, timeout);
  }
}

void DeviceTransport::all_reduce(const Call& call, void* data, size_t nbytes,
                                 const Reduction& reduction, Milliseconds timeout) {
  DeviceCall made = begin(call, reduction);
  set_in(made, 0, data, nbytes);
  set_out(made, 0, data, nbytes);
  launch(call, made, timeout);
}

void DeviceTransport::reduce(const Call& call, void* data, size_t nbytes,
                             const Reduction& reduction, Milliseconds timeout) {
  all_reduce(call, data, nbytes, reduction, timeout);  // the op and root are the call's
}

void DeviceTransport::all_to_all(const Call& call, const std::vector<Part>& in,
                                 const std::vector<Part>& out, Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  for (int r = 0; r < ranks_.world_size; r++) {
    set_in(made, r, in[r].data, in[r].nbytes);
    set_out(made, r, out[r].data, out[r].nbytes);
  }
  launch(call, made, timeout);
}

void DeviceTransport::broadcast(const Call& call, void* data, size_t nbytes, Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  set_in(made, 0, data, nbytes);
  set_out(made, 0, data, nbytes);
  launch(call, made, timeout);
}

void DeviceTransport::gather(const Call& call, const void* in, size_t in_nbytes,
                             const std::vector<Part>& out, Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  made.has_counts = 1;
  set_in(made, call.root, in, in_nbytes);
  for (size_t r = 0; r < out.size(); r++) {
    set_out(made, static_cast<int>(r), out[r].data, out[r].nbytes);
  }
  launch(call, made, timeout);
}

void DeviceTransport::scatter(const Call& call, const std::vector<Part>& in, void* out,
                              size_t out_nbytes, Milliseconds timeout) {
  DeviceCall made = begin_call(call);
  made.has_counts = 1;
  for (size_t r = 0; r < in.size(); r++) {
    set_in(made, static_cast<int>(r), in[r].data, in[r].nbytes);
  }
  set_out(made, call.root, out, out_nbytes);
  launch(call, made, timeout);
}

void DeviceTransport::barrier(Milliseconds timeout) {
  Call call;
  call.op = Op::kBarrier;
  DeviceCall made = begin_call(call);
  launch(call, made, timeout);
}

}  // namespace primitives
#endif
