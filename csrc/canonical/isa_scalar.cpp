// The canonical kernels for any x86-64: SSE2, fused multiply-add from the C library.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define CANONICAL_WIDTH 4
#include "canonical/table.hpp"

namespace primitives::canonical {

const Kernels kScalarKernels = make_table();

}  // namespace primitives::canonical
