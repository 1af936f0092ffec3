// Global memory as a kernel may use it: rows of bytes, each with the thread that wrote it.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

class Memory {
 public:
  // num_rows rows of row_nbytes each, stride_nbytes apart: all that a kernel may touch there.
  void allow(const void* base, int64_t num_rows, int64_t stride_nbytes, int64_t row_nbytes,
             bool writable) {
    Region region{reinterpret_cast<uintptr_t>(base), num_rows, stride_nbytes, row_nbytes, {}};
    if (writable) region.writer.resize(static_cast<size_t>(num_rows * row_nbytes));
    regions_.push_back(std::move(region));
  }

  // Throws unless all bytes are of one row, aligned, and no other thread has written them.
  void load(const void* p, size_t nbytes, size_t alignment, int64_t thread) {
    const int32_t* writer = find(p, nbytes, alignment, "read", false);
    for (size_t i = 0; writer != nullptr && i < nbytes; i++) {
      if (writer[i] != 0 && writer[i] != thread + 1) fail("reads what another thread wrote", p);
    }
  }

  // Throws also when they were written before.
  void store(const void* p, size_t nbytes, size_t alignment, int64_t thread) {
    int32_t* writer = find(p, nbytes, alignment, "written", true);
    for (size_t i = 0; i < nbytes; i++) {
      if (writer[i] != 0) fail("is written twice", p);
      writer[i] = static_cast<int32_t>(thread + 1);
    }
  }

 private:
  struct Region {
    uintptr_t base;
    int64_t num_rows, stride_nbytes, row_nbytes;
    std::vector<int32_t> writer;  // of each byte, + 1; empty: read only
  };

  // The writers of the bytes at p; null for memory that is only read.
  int32_t* find(const void* p, size_t nbytes, size_t alignment, const char* how, bool write) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (address % alignment != 0) fail("is not aligned", p);
    int32_t* found = nullptr;
    bool inside = false;
    for (Region& region : regions_) {  // the same memory may be input and output
      if (address < region.base) continue;
      const auto offset = static_cast<int64_t>(address - region.base);
      const int64_t stride = region.stride_nbytes > 0 ? region.stride_nbytes : 1;
      const int64_t row = region.num_rows == 1 ? 0 : offset / stride;
      const int64_t at = offset - row * stride;
      if (row >= region.num_rows || at + static_cast<int64_t>(nbytes) > region.row_nbytes) continue;
      inside = true;
      if (!region.writer.empty())
        found = &region.writer[static_cast<size_t>(row * region.row_nbytes + at)];
    }
    if (!inside || (write && found == nullptr)) {
      fail((std::string("is ") + how + " outside of what the kernel was given").c_str(), p);
    }
    return found;
  }

  [[noreturn]] static void fail(const char* what, const void* p) {
    char address[32];
    snprintf(address, sizeof address, "%p", p);
    throw std::runtime_error(std::string("memory at ") + address + " " + what);
  }

  std::vector<Region> regions_;
};

}  // namespace emulator
