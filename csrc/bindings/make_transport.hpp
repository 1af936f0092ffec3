// What a process group or a communicator runs on, met through a c10d Store.
#pragma once

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "collectives/cuda/stream_transport.hpp"

namespace primitives {

// One host when `wire` is null, else those of `host_of_rank`. Throws Python errors.
std::unique_ptr<Transport> make_transport(const c10::intrusive_ptr<c10d::Store>& store,
                                          GroupOptions options,
                                          const std::vector<std::string>& host_of_rank,
                                          const c10::intrusive_ptr<c10d::Backend>& wire);

// ... for buffers on a CUDA device. Throws std::invalid_argument in a build without CUDA.
std::unique_ptr<StreamTransport> make_device_transport(Transport& host,
                                                       const StreamTransportOptions& options);

// A RuntimeWarning of Python; from any thread without the GIL.
void warn(const std::string& text);

}  // namespace primitives
