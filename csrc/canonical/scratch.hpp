// Memory for the length of one kernel call, aligned for whole vectors.
#pragma once

#include <stdint.h>
#include <stdlib.h>

namespace primitives::canonical {
namespace {

class Scratch {
 public:
  explicit Scratch(int64_t num_floats) {
    if (num_floats <= 0) return;
    const size_t nbytes = (static_cast<size_t>(num_floats) * 4 + 63) / 64 * 64;
    data_ = static_cast<float*>(aligned_alloc(64, nbytes));
    if (data_ == nullptr) abort();  // a few MiB at most: the machine is out of memory
  }
  ~Scratch() { free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  float* data() { return data_; }

 private:
  float* data_ = nullptr;
};

}  // namespace
}  // namespace primitives::canonical
