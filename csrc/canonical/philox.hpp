// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC11): counter and
// key in, four words out. U is uint32_t or a vector of them; mul_hi_lo(multiplier, U, &hi, &lo)
// must be declared.
#pragma once

#include "canonical/portable.hpp"

namespace primitives::canonical {
namespace {

CANONICAL_FN void mul_hi_lo(uint32_t a, uint32_t b, uint32_t* hi, uint32_t* lo) {
  const uint64_t product = static_cast<uint64_t>(a) * b;
  *hi = static_cast<uint32_t>(product >> 32);
  *lo = static_cast<uint32_t>(product);
}

template <class U>
CANONICAL_FN void philox(uint64_t key, U c0, U c1, U c2, U c3, U out[4]) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  for (int round = 0; round < 10; round++) {
    U hi0, lo0, hi1, lo1;
    mul_hi_lo(0xd2511f53u, c0, &hi0, &lo0);
    mul_hi_lo(0xcd9e8d57u, c2, &hi1, &lo1);
    c0 = hi1 ^ c1 ^ k0;
    c1 = lo1;
    c2 = hi0 ^ c3 ^ k1;
    c3 = lo0;
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  out[0] = c0;
  out[1] = c1;
  out[2] = c2;
  out[3] = c3;
}

}  // namespace
}  // namespace primitives::canonical
