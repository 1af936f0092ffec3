// The CUDA device that is current for a thread.
#pragma once

#include "transport/device_memory.h"

namespace primitives {

// Makes a device the current one, and afterwards the one that was.
class OnDevice {
 public:
  explicit OnDevice(int device) : before_(primitives_cuda_exchange_device(device)) {}
  ~OnDevice() { primitives_cuda_exchange_device(before_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  const int before_;
};

}  // namespace primitives
