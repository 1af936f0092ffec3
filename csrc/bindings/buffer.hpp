// The memory behind a Python object: a torch tensor, or whatever shows it by the buffer protocol
// (NumPy, bytes, memoryview), by DLPack or by the CUDA array interface.
#pragma once

#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>

#include "collectives/collectives.hpp"

namespace primitives {

// Contiguous memory of the CPU or a CUDA device, held for as long as this lives. Needs the GIL to
// come and to go.
class Buffer {
 public:
  enum class Access { kRead, kWrite };

  // Throws std::invalid_argument, with `what` ("all_gather: out"), when there is no such memory.
  // `stream`: on which a device's memory is used, as device_buffer_of() takes it.
  Buffer(py::handle object, Access access, const char* what, uintptr_t stream);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  char* data() const { return data_; }
  size_t numel() const { return numel_; }
  size_t nbytes() const { return numel_ * itemsize_; }
  size_t itemsize() const { return itemsize_; }
  at::ScalarType dtype() const { return dtype_; }
  int device() const { return device_; }  // index of the CUDA device; -1: the CPU
  Part part() const { return {data_, nbytes()}; }

  void check_like(const Buffer& other) const;  // of the same dtype and on the same device
  void check_numel(size_t expected) const;
  // A result may not be written over an input that is still read, unless that starts at
  // `allowed_at`.
  void check_apart(const Buffer& input, const void* allowed_at = nullptr) const;

 private:
  void take_tensor(const at::Tensor& tensor);
  void take_view(Access access);
  [[noreturn]] void refuse(const std::string& expected, const std::string& got) const;

  const char* what_;
  char* data_ = nullptr;
  size_t numel_ = 0, itemsize_ = 1;
  at::ScalarType dtype_ = at::kByte;
  int device_ = -1;
  at::Tensor tensor_;
  py::object holder_;  // of memory that another object had to unwrap
  struct View : Py_buffer {
    View() : Py_buffer{} {}
    ~View() { PyBuffer_Release(this); }  // nothing when it was never filled
  } view_;
};

}  // namespace primitives
