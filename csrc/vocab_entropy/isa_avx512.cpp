// The kernels of the vocabulary entropy for AVX-512 (F, BW, DQ, VL).
// GCC 12 warns about the undefined values inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define CANONICAL_WIDTH 16
#include "vocab_entropy/table.hpp"

namespace primitives::vocab_entropy {

const Kernels kAvx512Kernels = make_table();

}  // namespace primitives::vocab_entropy
