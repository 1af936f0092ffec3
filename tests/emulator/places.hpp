// Memory that device code may touch: where, how, and in which alignment.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace emulator {

// What device code did wrong.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Places {
 public:
  // num_rows rows of row_nbytes each, stride_nbytes apart. The same memory may be allowed twice.
  void allow(const void* base, int64_t num_rows, int64_t stride_nbytes, int64_t row_nbytes,
             bool writable) {
    places_.push_back({reinterpret_cast<uintptr_t>(base), num_rows, stride_nbytes, row_nbytes,
                       writable ? std::optional<size_t>(num_writable_) : std::nullopt});
    if (writable) num_writable_ += static_cast<size_t>(num_rows * row_nbytes);
  }
  // Bytes that may be written.
  size_t num_writable() const { return num_writable_; }

  // Throws Violation unless all bytes at p are of one row, and aligned. Returns the number of the
  // first one among the bytes that may be written; none when they may only be read.
  std::optional<size_t> check(const void* p, size_t nbytes, size_t alignment, bool write) const {
    const auto address = reinterpret_cast<uintptr_t>(p);
    if (address % alignment != 0) fail(p, nbytes, "is misaligned");
    std::optional<size_t> number;
    bool inside = false;
    for (const Place& place : places_) {
      if (address < place.base) continue;
      const auto offset = static_cast<int64_t>(address - place.base);
      const int64_t stride = place.stride_nbytes > 0 ? place.stride_nbytes : 1;
      const int64_t row = place.num_rows == 1 ? 0 : offset / stride;
      const int64_t at = offset - row * stride;
      if (row >= place.num_rows || at + static_cast<int64_t>(nbytes) > place.row_nbytes) continue;
      inside = true;
      if (place.first) number = *place.first + static_cast<size_t>(row * place.row_nbytes + at);
    }
    if (!inside) fail(p, nbytes, "is outside of what the device code was given");
    if (write && !number) fail(p, nbytes, "is a write to what may only be read");
    return number;
  }

  [[noreturn]] static void fail(const void* p, size_t nbytes, const char* what) {
    char text[160];
    std::snprintf(text, sizeof text, "an access of %zu bytes at %p %s", nbytes, p, what);
    throw Violation(text);
  }

 private:
  struct Place {
    uintptr_t base;
    int64_t num_rows, stride_nbytes, row_nbytes;
    std::optional<size_t> first;  // number of its first writable byte
  };

  std::vector<Place> places_;
  size_t num_writable_ = 0;
};

}  // namespace emulator
