// A call of a canonical function: its name, the device of its tensors, the kernels for that device.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bindings/tensor_checks.hpp"

namespace primitives {

class Call {
 public:
  // All tensors must be where the first one is: on the CPU or on a CUDA device.
  Call(const char* name, const at::Tensor& first);

  Argument operator()(const char* which, const at::Tensor& x) const {
    return {name_, which, x, device_};
  }

  at::Tensor empty(at::IntArrayRef shape, at::ScalarType type = at::kFloat) const {
    return at::empty(shape, at::TensorOptions().dtype(type).device(device_));
  }

  bool on_cuda() const { return device_.is_cuda(); }

  // launch(kernels): on CUDA they are enqueued on the current stream.
  template <class Launch>
  void run(const Launch& launch) const {
    const KernelCall no_gil;
    const c10::OptionalDeviceGuard guard(on_cuda() ? std::optional(device_) : std::nullopt);
    try {
      launch(kernels());
    } catch (const std::runtime_error& error) {
      throw std::runtime_error(std::string(name_) + " on " + device_.str() + ": " + error.what());
    }
  }

 private:
  const canonical::Kernels& kernels() const;

  const char* name_;
  at::Device device_;
};

}  // namespace primitives
