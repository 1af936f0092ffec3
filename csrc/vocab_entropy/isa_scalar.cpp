// The kernels of the vocabulary entropy for any x86-64: SSE2, fused multiply-add from the C
// library.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CANONICAL_WIDTH 4
#include "vocab_entropy/table.hpp"

namespace primitives::vocab_entropy {

const Kernels kScalarKernels = make_table();

}  // namespace primitives::vocab_entropy
