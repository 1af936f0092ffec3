#include "collectives/cuda/stream_transport.hpp"

#include <atomic>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "collectives/cuda/by_host_transport.hpp"
#include "collectives/cuda/device_transport.hpp"

namespace primitives {
#ifdef PRIMITIVES_CUDA
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
#endif

std::shared_ptr<void> allocate_on_all(Transport& host, int world_size, StreamTransport& device,
                                      const Call& call, Milliseconds timeout) {
  struct Answer {
    char why[256];  // there is no memory; else ""
    bool misused;   // by the caller
  } mine{};
  std::shared_ptr<void> data;
  try {
    data = device.allocate(call.numel * call.itemsize);
  } catch (const TransportError& error) {
    std::snprintf(mine.why, sizeof mine.why, "%s", error.what());
  } catch (const std::invalid_argument& error) {
    std::snprintf(mine.why, sizeof mine.why, "%s", error.what());
    mine.misused = true;
  }
  std::vector<Answer> answers(world_size);
  std::vector<Part> parts;
  for (Answer& answer : answers) parts.push_back({&answer, sizeof answer});
  host.all_gather(call, &mine, sizeof mine, parts, timeout);
  for (int r = 0; r < world_size; r++) {
    const std::string why = answers[r].why;
    if (why.empty()) continue;
    if (answers[r].misused) {
      throw std::invalid_argument("empty: rank " + std::to_string(r) + ": " + why);
    }
    throw TransportError(Failure::kOther, "empty: " + why);
  }
  return data;
}

}  // namespace primitives
