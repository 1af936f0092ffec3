// Memory of a device that others map, both ways: [Note: two ways to share].
#pragma once

#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

#include "transport/device_sharing.hpp"
#include "values.hpp"

namespace primitives::native_tests {

// With a child process. Sets PRIMITIVES_CUDA_MEMORY for a while. False where this system does not
// let a process fetch another's descriptor. Throws WrongResult.
inline bool check_device_sharing() {
  const auto expect = [](bool right, const std::string& what) {
    if (!right) throw WrongResult("device sharing: " + what);
  };
  constexpr size_t kNbytes = 100;
  constexpr int kRefused = 2;
  const char* const found = getenv("PRIMITIVES_CUDA_MEMORY");
  const std::string before = found == nullptr ? "" : found;
  char* memory = nullptr;
  DeviceHandle handle;
  primitives_cuda_error error{};
  for (const char* way : {"ipc", "virtual"}) {
    setenv("PRIMITIVES_CUDA_MEMORY", way, 1);
    expect(allocate_shared(0, kNbytes, &memory, &error), error.text);
    for (char turn = 0; turn < 2; turn++) {
      expect(export_shared(0, memory, &handle, &error), error.text);
      memory[0] = turn;
      const pid_t child = fork();
      if (child == 0) {
        char* mapped = nullptr;
        if (!map_shared(0, handle, &mapped, &error)) _exit(handle.is_virtual ? kRefused : 1);
        const bool right = mapped[0] == turn;
        mapped[kNbytes - 1] = static_cast<char>(turn + 7);
        unmap_shared(0, mapped);
        _exit(right ? 0 : 1);
      }
      int status = 0;
      waitpid(child, &status, 0);
      if (WIFEXITED(status) && WEXITSTATUS(status) == kRefused) {
        setenv("PRIMITIVES_CUDA_MEMORY", before.c_str(), 1);
        return false;
      }
      expect(status == 0, "another process maps it");
      expect(memory[kNbytes - 1] == turn + 7, "and writes there");
    }
    expect(handle.is_virtual == (std::string(way) == "virtual"), "the way that was asked for");
    free_shared(0, memory);
  }
  expect(!map_shared(0, handle, &memory, &error) &&
             std::string(error.text).find("fetching a descriptor of process ") == 0,
         "freed memory cannot be mapped");
  setenv("PRIMITIVES_CUDA_MEMORY", "other", 1);
  expect(
      !allocate_shared(0, kNbytes, &memory, &error) &&
          std::string(error.text).find("expected ipc or virtual, got: other") != std::string::npos,
      "an unknown way is refused");
  setenv("PRIMITIVES_CUDA_MEMORY", before.c_str(), 1);
  return true;
}

}  // namespace primitives::native_tests
