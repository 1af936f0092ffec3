#include "canonical/kernels.hpp"

#include "isa.hpp"

namespace primitives::canonical {

const Kernels& kernels() {
  switch (active_isa()) {
    case Isa::kScalar:
      return kScalarKernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kAvx512:
      return kAvx512Kernels;
    case Isa::kAvx512Bf16:
      return kAvx512Bf16Kernels;
  }
  return kScalarKernels;
}

}  // namespace primitives::canonical
