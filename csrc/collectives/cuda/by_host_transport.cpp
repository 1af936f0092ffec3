#ifdef PRIMITIVES_CUDA
#include "collectives/cuda/by_host_transport.hpp"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "collectives/cuda/device_heap.hpp"
#include "transport/current_device.hpp"
#include "transport/operations.hpp"

namespace primitives {
namespace {

constexpr size_t kAlignment = 64;

size_t aligned(size_t nbytes) { return (nbytes + kAlignment - 1) / kAlignment * kAlignment; }

Part part_of(const void* data, size_t nbytes) { return {const_cast<void*>(data), nbytes}; }

template <class T>
std::vector<T*> addresses_of(const std::vector<Part>& parts) {
  std::vector<T*> addresses;
  for (const Part& part : parts) addresses.push_back(static_cast<T*>(part.data));
  return addresses;
}

}  // namespace

void ByHostTransport::fail(Op op, const char* why) {
  Group& of = group();
  of.fail(Failure::kOther, of.here() + ": " + op_name(op) + " on device " +
                               std::to_string(device_) + ", by way of the host: " + why);
}

void* ByHostTransport::begin(Op op) {
  check();
  void* stream = stream_();
  primitives_cuda_error error;
  const int captured = primitives_cuda_is_captured(device_, stream, &error);
  if (captured < 0) fail(op, error.text);
  if (captured == 0) return stream;
  throw std::invalid_argument(std::string(op_name(op)) + " on cuda:" + std::to_string(device_) +
                              ": expected a stream that is not captured into a CUDA graph, since "
                              "the collectives of group '" +
                              group().name() + "' go by way of the host");
}

void ByHostTransport::reserve(Op op, size_t nbytes) {
  if (nbytes <= pinned_nbytes_) return;
  release();
  primitives_cuda_error error;
  if (primitives_cuda_allocate_pinned(device_, nbytes, &pinned_, &error) != 0) fail(op, error.text);
  pinned_nbytes_ = nbytes;
}

void ByHostTransport::copy(Op op, const Parts& to, const Parts& from, void* stream) {
  primitives_cuda_error error;
  for (size_t i = 0; i < to.size(); i++) {
    if (to[i].nbytes == 0) continue;
    if (primitives_cuda_copy(device_, to[i].data, from[i].data, to[i].nbytes, stream, &error) != 0)
      fail(op, error.text);
  }
  wait(op, stream);
}

void ByHostTransport::wait(Op op, void* stream) {
  primitives_cuda_error error;
  if (primitives_cuda_synchronize_stream(device_, stream, &error) != 0) fail(op, error.text);
}

void ByHostTransport::run(Op op, const Parts& in, const Parts& out,
                          const std::function<void(const Parts&, const Parts&)>& body) {
  void* stream = begin(op);
  size_t nbytes = 0;
  for (const Parts& parts : {in, out}) {
    for (const Part& part : parts) nbytes += aligned(part.nbytes);
  }
  reserve(op, nbytes);
  char* at = static_cast<char*>(pinned_);
  const auto take = [&](const Part& part) {
    return Part{std::exchange(at, at + aligned(part.nbytes)), part.nbytes};
  };
  Parts ins, outs;
  for (const Part& part : in) ins.push_back(take(part));
  for (const Part& part : out) {
    size_t i = 0;
    while (i < in.size() && (in[i].data != part.data || in[i].nbytes != part.nbytes)) i++;
    outs.push_back(i < in.size() ? ins[i] : take(part));
  }
  copy(op, ins, in, stream);
  body(ins, outs);
  copy(op, out, outs, stream);
}

void ByHostTransport::all_gather(const Call& call, const void* in, size_t in_nbytes,
                                 const Parts& out, Milliseconds timeout) {
  run(call.op, {part_of(in, in_nbytes)}, out, [&](const Parts& ins, const Parts& outs) {
    host_.all_gather(call, ins[0].data, in_nbytes, outs, timeout);
  });
}

void ByHostTransport::reduce_scatter(const Call& call, const Parts& in, void* out,
                                     const Reduction& reduction, Milliseconds timeout) {
  const size_t nbytes = in[rank_].nbytes;
  run(call.op, in, {{out, nbytes}}, [&](const Parts& ins, const Parts& outs) {
    host_.reduce_scatter(call, ins, outs[0].data, reduction, timeout);
  });
}

void ByHostTransport::all_reduce(const Call& call, void* data, size_t nbytes,
                                 const Reduction& reduction, Milliseconds timeout) {
  const Parts parts{{data, nbytes}};
  run(call.op, parts, parts, [&](const Parts& ins, const Parts&) {
    host_.all_reduce(call, ins[0].data, nbytes, reduction, timeout);
  });
}

void ByHostTransport::all_to_all(const Call& call, const Parts& in, const Parts& out,
                                 Milliseconds timeout) {
  run(call.op, in, out,
      [&](const Parts& ins, const Parts& outs) { host_.all_to_all(call, ins, outs, timeout); });
}

void ByHostTransport::broadcast(const Call& call, void* data, size_t nbytes, Milliseconds timeout) {
  const Parts parts{{data, nbytes}};
  const bool is_root = rank_ == call.root;
  run(call.op, is_root ? parts : Parts{}, is_root ? Parts{} : parts,
      [&](const Parts& ins, const Parts& outs) {
        host_.broadcast(call, (is_root ? ins : outs)[0].data, nbytes, timeout);
      });
}

void ByHostTransport::reduce(const Call& call, void* data, size_t nbytes,
                             const Reduction& reduction, Milliseconds timeout) {
  const Parts parts{{data, nbytes}};
  run(call.op, parts, rank_ == call.root ? parts : Parts{}, [&](const Parts& ins, const Parts&) {
    host_.reduce(call, ins[0].data, nbytes, reduction, timeout);
  });
}

void ByHostTransport::gather(const Call& call, const void* in, size_t in_nbytes, const Parts& out,
                             Milliseconds timeout) {
  run(call.op, {part_of(in, in_nbytes)}, out, [&](const Parts& ins, const Parts& outs) {
    host_.gather(call, ins[0].data, in_nbytes, outs, timeout);
  });
}

void ByHostTransport::scatter(const Call& call, const Parts& in, void* out, size_t out_nbytes,
                              Milliseconds timeout) {
  run(call.op, in, {{out, out_nbytes}}, [&](const Parts& ins, const Parts& outs) {
    host_.scatter(call, ins, outs[0].data, out_nbytes, timeout);
  });
}

void ByHostTransport::barrier(Milliseconds timeout) {
  wait(Op::kBarrier, begin(Op::kBarrier));
  host_.barrier(timeout);
}

size_t ByHostTransport::full_nbytes(const Cuts& cuts, size_t tensor, size_t itemsize) const {
  const int last = world_size_ - 1;
  return (cuts.begin(last, tensor) + cuts.numel(last, tensor)) * itemsize;
}

void ByHostTransport::all_gather_many(const Call& call, const GatherMany& many,
                                      Milliseconds timeout) {
  const Cuts& cuts = many.cuts;
  Parts in, out;
  for (size_t t = 0; t < cuts.num_tensors(); t++) {
    in.push_back(part_of(many.shards[t], cuts.numel(rank_, t) * many.shard_itemsize));
    out.push_back({many.fulls[t], full_nbytes(cuts, t, many.full_itemsize)});
  }
  run(call.op, in, out, [&](const Parts& ins, const Parts& outs) {
    const std::vector<const void*> shards = addresses_of<const void>(ins);
    const std::vector<void*> fulls = addresses_of<void>(outs);
    host_.all_gather_many(call,
                          {cuts, shards, fulls, many.cast, many.shard_itemsize, many.full_itemsize,
                           many.from, many.to},
                          timeout);
  });
}

void ByHostTransport::reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                                          Milliseconds timeout) {
  const Cuts& cuts = many.cuts;
  const size_t num_tensors = cuts.num_tensors();
  Parts in, out;
  for (size_t t = 0; t < num_tensors; t++) {
    out.push_back({many.shards[t], cuts.numel(rank_, t) * sizeof(float)});
    in.push_back(part_of(many.fulls[t], full_nbytes(cuts, t, many.itemsize)));
  }
  if (many.accumulate) in.insert(in.end(), out.begin(), out.end());
  if (many.squares != nullptr) out.push_back({many.squares, num_tensors * sizeof(float)});
  run(call.op, in, out, [&](const Parts& ins, const Parts& outs) {
    std::vector<const void*> fulls = addresses_of<const void>(ins);
    fulls.resize(num_tensors);
    std::vector<float*> shards = addresses_of<float>(outs);
    float* squares = many.squares == nullptr ? nullptr : shards[num_tensors];
    shards.resize(num_tensors);
    host_.reduce_scatter_many(call,
                              {cuts, fulls, shards, many.dtype, many.itemsize, many.factor,
                               many.accumulate, squares, many.sum_of_squares},
                              timeout);
  });
}

std::shared_ptr<void> ByHostTransport::allocate(size_t nbytes) {
  check();
  primitives_cuda_error error;
  char* memory = nullptr;
  const OnDevice current(device_);
  if (primitives_cuda_allocate(device_, std::max<size_t>(nbytes, 1), &memory, &error) != 0) {
    throw no_room_on_device(rank_, device_, nbytes, error.text);
  }
  return {memory, [device = device_](void* freed) {
            const OnDevice current(device);
            primitives_cuda_free(device, static_cast<char*>(freed));
          }};
}

void ByHostTransport::release() {
  if (pinned_ != nullptr) primitives_cuda_free_pinned(device_, std::exchange(pinned_, nullptr));
  pinned_nbytes_ = 0;
}

}  // namespace primitives
#endif
