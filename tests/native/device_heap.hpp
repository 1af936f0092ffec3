// Memory of a device in the order of streams: [Note: memory in stream order].
#pragma once

#include <unistd.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "collectives/cuda/device_transport.hpp"
#include "emulator/runtime.hpp"
#include "meeting.hpp"
#include "values.hpp"

namespace primitives::native_tests {

// A group of one rank that meets in `folder`. Throws WrongResult.
inline void check_device_heap(const std::string& folder) {
  const auto expect = [](bool right, const std::string& what) {
    if (!right) throw WrongResult("device heap: " + what);
  };
  const auto refused = [](auto call, const std::string& part) {
    try {
      call();
    } catch (const std::exception& error) {
      return std::string(error.what()).find(part) != std::string::npos;
    }
    return false;
  };
  constexpr size_t kNbytes = 40 << 20;
  emulator::Stream first, second;
  emulator::Stream* current = &first;
  std::shared_ptr<void> outlives;
  {
    FolderMeeting meeting(folder);
    OneHost host(meeting, {0, 1, "heap", "/dev/shm", Milliseconds(60000)});
    DeviceTransport device(host, 0, [&] { return current; }, Milliseconds(60000));

    auto memory = device.allocate(kNbytes);
    auto* const word = static_cast<int*>(memory.get());
    auto neighbour = device.allocate(1);
    expect(reinterpret_cast<uintptr_t>(memory.get()) % 256 == 0 &&
               reinterpret_cast<uintptr_t>(neighbour.get()) % 256 == 0,
           "aligned");
    first.launch([word] {
      usleep(50000);
      *word = 1;
    });
    memory.reset();
    current = &second;
    memory = device.allocate(kNbytes);
    expect(memory.get() == word, "what was freed is handed out again");
    second.launch([word] { *word = 2; });
    first.wait_for(first.num_launched());
    second.wait_for(second.num_launched());
    expect(*word == 2, "another stream waits for what was freed");

    second.captured = true;
    expect(refused([&] { device.allocate(1); }, "not captured"), "no memory for a captured stream");
    memory.reset();
    second.captured = false;
    memory = device.allocate(kNbytes);
    expect(memory.get() != word, "what a captured stream freed is not handed out again");

    emulator::fail_next("export");
    expect(refused([&] { device.allocate(kNbytes); }, "rank 0 has no room for"), "no room");
    emulator::fail_next("allocate");  // then it asks for no more than it needs
    outlives = device.allocate(kNbytes);
    device.drain();
    host.close();
  }
  static_cast<char*>(outlives.get())[kNbytes - 1] = 1;
}

}  // namespace primitives::native_tests
