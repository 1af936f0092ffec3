// What the collectives of a group run on when its buffers are on a CUDA device.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "collectives/cuda/launch.h"
#include "collectives/transport.hpp"

namespace primitives {

using CurrentStream = std::function<void*()>;  // a cudaStream_t of the device

struct StreamTransportOptions {
  int rank, world_size;  // of the whole group
  int device;
  CurrentStream stream;
  Milliseconds timeout;
  std::function<void(const std::string&)> say;  // to the user; called once a process, on rank 0
};

// Kernels that work in each other's memory; where the ranks are on several hosts or their devices
// cannot map each other, the way of the host, which is said once. All ranks get the same. The
// decision is a collective of `host`, which outlives the result. Throws TransportError.
std::unique_ptr<StreamTransport> make_stream_transport(Transport& host,
                                                       const StreamTransportOptions& options);

// Memory for tensors of one size on all ranks: StreamTransport::allocate, and a collective of
// `host` as `call`. Throws TransportError, the same on all ranks, when one of them has no room;
// then the group goes on.
std::shared_ptr<void> allocate_on_all(Transport& host, int world_size, StreamTransport& device,
                                      const Call& call, Milliseconds timeout);

}  // namespace primitives
