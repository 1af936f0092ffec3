// What every kernel binding asks of its tensors. A failure is a ValueError: what, expected, got.
#pragma once

#include <ATen/ATen.h>
#include <immintrin.h>
#include <torch/csrc/Dtype.h>
#include <torch/csrc/DynamicTypes.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "bindings/bindings.hpp"
#include "canonical/kernels.hpp"

namespace primitives {

// "torch.float32"
inline std::string dtype_name(at::ScalarType type) {
  return std::string("torch.") + torch::getTHPDtype(type)->name;
}

// A tensor argument with the words an error message needs.
struct Argument {
  const char* function;
  const char* name;
  const at::Tensor& tensor;
  at::Device device = at::kCPU;  // where it must be

  [[noreturn]] void fail(const std::string& expected, const std::string& got) const {
    throw py::value_error(std::string(function) + ": " + name + " must be " + expected + ", got " +
                          got);
  }

  template <class Shape>
  static std::string text(const Shape& shape) {
    std::ostringstream out;
    out << at::IntArrayRef(shape);
    return out.str();
  }

  const Argument& on_device() const {
    if (tensor.device() != device || tensor.layout() != at::kStrided) {
      const std::string where = device.is_cpu() ? "CPU tensor" : "tensor on " + device.str();
      fail("a dense " + where, tensor.device().str() + " " + c10::toString(tensor.scalar_type()));
    }
    return *this;
  }

  const Argument& of(at::ScalarType type) const {
    on_device();
    if (tensor.scalar_type() != type)
      fail(c10::toString(type), c10::toString(tensor.scalar_type()));
    return *this;
  }

  const Argument& shaped(at::IntArrayRef shape) const {
    if (tensor.sizes() != shape) fail("of shape " + text(shape), text(tensor.sizes()));
    return *this;
  }

  const Argument& with_dims(int64_t dims) const {
    if (tensor.dim() != dims) {
      fail(std::to_string(dims) + "-dimensional", "shape " + text(tensor.sizes()));
    }
    return *this;
  }

  // [tokens, columns], no row overlapping another.
  const Argument& with_contiguous_rows() const {
    on_device().with_dims(2);
    const bool one_by_one = tensor.size(1) <= 1 || tensor.stride(1) == 1;
    if (!one_by_one || (tensor.size(0) > 1 && tensor.stride(0) < tensor.size(1))) {
      fail("[tokens, columns] with contiguous rows",
           "shape " + text(tensor.sizes()) + " with strides " + text(tensor.strides()));
    }
    return *this;
  }

  const Argument& contiguous() const {
    if (!tensor.is_contiguous()) {
      fail("contiguous",
           "shape " + text(tensor.sizes()) + " with strides " + text(tensor.strides()));
    }
    return *this;
  }

  // Stored like x: of its dtype and shape, contiguous.
  const Argument& like(const at::Tensor& x) const {
    return of(x.scalar_type()).shaped(x.sizes()).contiguous();
  }

  // Rows (tokens) that num_blocks equal runs share out.
  const Argument& in_blocks(int64_t num_blocks) const {
    if (num_blocks <= 0 || tensor.size(0) % num_blocks != 0) {
      fail("a whole number of tokens in each of " + std::to_string(num_blocks) + " blocks",
           "shape " + text(tensor.sizes()));
    }
    return *this;
  }

  canonical::Dtype dtype() const {
    switch (tensor.scalar_type()) {
      case at::kFloat:
        return canonical::Dtype::kFloat32;
      case at::kHalf:
        return canonical::Dtype::kFloat16;
      case at::kBFloat16:
        return canonical::Dtype::kBFloat16;
      default:
        fail("float32, float16 or bfloat16", c10::toString(tensor.scalar_type()));
    }
  }

  canonical::Input input() const { return {on_device().tensor.const_data_ptr(), dtype()}; }
  canonical::Output output() const { return {on_device().tensor.mutable_data_ptr(), dtype()}; }

  const float* floats() const {
    of(at::kFloat).contiguous();
    return tensor.const_data_ptr<float>();
  }

  float* mutable_floats() const {
    of(at::kFloat).contiguous();
    return tensor.mutable_data_ptr<float>();
  }

  const int64_t* integers() const {
    of(at::kLong).contiguous();
    return tensor.const_data_ptr<int64_t>();
  }

  // int64, all in [first, end). Those on a device are copied to the host to see.
  const int64_t* integers_in(int64_t first, int64_t end, const std::string& range) const {
    const int64_t* data = integers();
    const at::Tensor on_host = tensor.cpu();
    const int64_t* seen = on_host.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < tensor.numel(); i++) {
      if (seen[i] < first || seen[i] >= end) {
        fail("in " + range, std::to_string(seen[i]) + " at position " + std::to_string(i));
      }
    }
    return data;
  }

  const int64_t* indices(int64_t bound) const {
    return integers_in(0, bound, "[0, " + std::to_string(bound) + ")");
  }
};

// Round to nearest with subnormals kept, whatever mode the thread is in (torch.set_flush_denormal
// would change bits).
class ExactRounding {
 public:
  ExactRounding() { _mm_setcsr(0x1f80); }
  ~ExactRounding() { _mm_setcsr(saved_); }
  ExactRounding(const ExactRounding&) = delete;
  ExactRounding& operator=(const ExactRounding&) = delete;

 private:
  unsigned saved_ = _mm_getcsr();
};

// For the length of a kernel call: no GIL, and exact rounding.
class KernelCall {
 public:
  KernelCall() = default;
  KernelCall(const KernelCall&) = delete;
  KernelCall& operator=(const KernelCall&) = delete;

 private:
  py::gil_scoped_release no_gil_;
  ExactRounding exact_;
};

// Bindings of norms and activations, of softmax, and of the optimizer, random and loss kernels; the
// others are in canonical.cpp.
void bind_canonical_layers(py::module_& m);
void bind_canonical_softmax(py::module_& m);
void bind_canonical_training(py::module_& m);

}  // namespace primitives
