// Global memory of a grid whose blocks and threads are independent of each other: each byte with
// the thread that wrote it. (Where they are not, see races.hpp.)
#pragma once

#include "emulator/places.hpp"

namespace emulator {

class Memory {
 public:
  // Of one launch.
  explicit Memory(const Places& places) : places_(places), writers_(places.num_writable()) {}

  // Throws Violation also when another thread has written a byte of it.
  void load(const void* p, size_t nbytes, size_t alignment, int64_t thread) const {
    const auto first = places_.check(p, nbytes, alignment, false);
    for (size_t i = 0; first && i < nbytes; i++) {
      const int64_t writer = writers_[*first + i];
      if (writer != 0 && writer != thread + 1) Places::fail(p, nbytes, "reads another's write");
    }
  }

  // Throws Violation also when any thread has.
  void store(const void* p, size_t nbytes, size_t alignment, int64_t thread) {
    const size_t first = *places_.check(p, nbytes, alignment, true);
    for (size_t i = 0; i < nbytes; i++) {
      if (writers_[first + i] != 0) Places::fail(p, nbytes, "writes for the second time");
      writers_[first + i] = static_cast<int32_t>(thread + 1);
    }
  }

 private:
  const Places& places_;
  std::vector<int32_t> writers_;  // of each byte that may be written, + 1
};

}  // namespace emulator
