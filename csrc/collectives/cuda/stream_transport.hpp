// What the collectives of a group run on when its buffers are on a CUDA device.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "collectives/cuda/by_host_transport.hpp"

namespace primitives {

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

}  // namespace primitives
