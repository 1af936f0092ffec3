// The canonical kernels for AVX-512 with BF16: those of AVX-512, but for the product of bfloat16.
// GCC 12 warns about the undefined values inside its own intrinsics.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")

#define CANONICAL_WIDTH 16
#include "canonical/gemm.hpp"
#include "canonical/gemm_pairs.hpp"

namespace primitives::canonical {
namespace {

void gemm_by_pairs(const Gemm& g) {
  if (pairs_are_exact(g)) {
    product<Pairs>(g);
  } else {
    kAvx512Kernels.gemm(g);
  }
}

Kernels with_pairs(Kernels table) {
  table.gemm = gemm_by_pairs;
  return table;
}

}  // namespace

const Kernels kAvx512Bf16Kernels = with_pairs(kAvx512Kernels);  // which is a constant expression

}  // namespace primitives::canonical
