// The kernels of the vocabulary entropy for AVX2 with FMA and F16C.
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC target("avx2,fma,f16c")

#define CANONICAL_WIDTH 8
#include "vocab_entropy/table.hpp"

namespace primitives::vocab_entropy {

const Kernels kAvx2Kernels = make_table();

}  // namespace primitives::vocab_entropy
