#ifdef PRIMITIVES_CUDA
#include "collectives/cuda/stream_transport.hpp"

#include <atomic>

#include "collectives/cuda/device_transport.hpp"

namespace primitives {
namespace {

void say_once(const StreamTransportOptions& options, const std::string& group,
              const std::string& why) {
  static std::atomic<bool> said{false};
  if (options.rank != 0 || said.exchange(true)) return;
  options.say("primitives: the collectives of group '" + group +
              "' on CUDA are handed to the host (" + why +
              "). They give the bits of the CPU, but at its pace: each call waits for its stream, "
              "copies to the host and back, and cannot be captured into a CUDA graph. For NCCL, "
              "which has bits of its own: init_process_group('cpu:primitives,cuda:nccl'). This is "
              "said once a process.");
}

}  // namespace

std::unique_ptr<StreamTransport> make_stream_transport(Transport& host,
                                                       const StreamTransportOptions& options) {
  std::string why = "its ranks are on several hosts";
  if (dynamic_cast<OneHost*>(&host) != nullptr) {
    try {
      return std::make_unique<DeviceTransport>(host, options.device, options.stream,
                                               options.timeout);
    } catch (const Unreachable& error) {
      why = error.what();
    }
  }
  say_once(options, host.group().name(), why);
  return std::make_unique<ByHostTransport>(host, options.rank, options.world_size, options.device,
                                           options.stream);
}

}  // namespace primitives
#endif
