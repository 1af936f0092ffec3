#include "vocab_entropy/kernels.hpp"

#include "isa.hpp"

namespace primitives::vocab_entropy {

const Kernels& kernels() {
  switch (active_isa()) {
    case Isa::kScalar:
      return kScalarKernels;
    case Isa::kAvx2:
      return kAvx2Kernels;
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return kAvx512Kernels;
  }
  return kScalarKernels;
}

}  // namespace primitives::vocab_entropy
