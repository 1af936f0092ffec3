// Memory of a CUDA device behind a Python object: a torch tensor, or whatever shows it by DLPack or
// by the CUDA array interface, as CuPy and Numba do.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <optional>

namespace primitives {

struct DeviceBuffer {
  at::Tensor tensor;  // keeps the memory
  bool readonly;
};

// None when the object's memory is not on a CUDA device. What its owner has enqueued so far is
// ordered before what comes onto `stream` (a cudaStream_t; 1: the legacy default stream, 2: that of
// the thread). Throws std::invalid_argument, with `what`. Needs the GIL.
std::optional<DeviceBuffer> device_buffer_of(py::handle object, uintptr_t stream, const char* what);

// Copies between any memory of host and device in the order of the stream, and waits for it. Throws
// TransportError.
void copy_on_stream(int device, void* to, const void* from, size_t nbytes, uintptr_t stream);

// Leaves the thread's current CUDA device as it was.
class KeepCurrentDevice {
 public:
  KeepCurrentDevice();
  ~KeepCurrentDevice();
  KeepCurrentDevice(const KeepCurrentDevice&) = delete;
  KeepCurrentDevice& operator=(const KeepCurrentDevice&) = delete;

  // Which one that is; -1: none.
  int device() const { return before_; }

 private:
  int before_ = -1;
};

}  // namespace primitives
