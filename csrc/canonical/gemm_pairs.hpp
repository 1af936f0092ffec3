// The form of bfloat16 products by vdpbf16ps: two steps of a chain in one instruction.
//
// [Note: pairs] vdpbf16ps(c, a, b) is fma(a[0], b[0], fma(a[1], b[1], c)) in every 32-bit lane,
// where [1] is the upper half, each fma rounded once to nearest even, with subnormal operands taken
// as zero and subnormal results made zero (Intel SDM, VDPBF16PS). AMD does not document it so;
// isa.cpp tests it. A word with step k in its upper half and step k + 1 in the lower one thus takes
// the canonical chain two steps on, if nothing subnormal can occur: no input is subnormal, and the
// exponents of the smallest inputs other than 0 sum up to -112 at least. Then a is a multiple of
// 2^(ea - 7), b of 2^(eb - 7), every product and so every sum before and after rounding a multiple
// of 2^-126, the smallest normal number. Overflow, inf and NaN are those of fma.
// An odd last step is paired with 0 * 0: c + 0 is c, for no c is -0, since the chain starts at +0
// and no rounding makes -0 of what is not 0.
#pragma once

#include "canonical/gemm_panels.hpp"

namespace primitives::canonical {
namespace {

CANONICAL_FN UVec as_words(Vec x) { return reinterpret_cast<UVec>(x); }
CANONICAL_FN Vec from_words(UVec x) { return reinterpret_cast<Vec>(x); }

struct Pair {
  using Storage = uint16_t;
  static constexpr int64_t kSteps = 2;

  static CANONICAL_FN Vec along_k(const uint16_t* p, int64_t num_steps) {
    UVec x{};
    if (num_steps >= 2 * kWidth) {
      memcpy(&x, p, sizeof x);
    } else {
      memcpy(&x, p, 2 * static_cast<size_t>(num_steps));
    }
    return from_words(x << 16 | x >> 16);
  }

  template <class Lanes>
  static CANONICAL_FN Vec across_k(const uint16_t* p, int64_t row_stride, int64_t num_steps,
                                   Lanes lanes) {
    const UVec first = as_words(load<BFloat16>(p, lanes));
    if (num_steps == 1) return from_words(first);
    return from_words(first | as_words(load<BFloat16>(p + row_stride, lanes)) >> 16);
  }
};

struct Pairs {
  static constexpr int64_t kSteps = 2;
  static CANONICAL_FN Vec advance(Vec a, Vec b, Vec chain) {
    return _mm512_dpbf16_ps(chain, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }

  template <class Body>
  static CANONICAL_FN void with_words(Dtype, Body body) {
    body(Pair{});
  }
};

// The smallest exponent field of the elements other than 0: 0 if one is subnormal, 512 if there is
// none.
inline int smallest_exponent_field(const uint16_t* x, int64_t num_batches, int64_t batch_stride,
                                   int64_t rows, int64_t row_stride, int64_t columns) {
  typedef uint16_t Halves __attribute__((vector_size(64)));
  constexpr int64_t kHalves = 32;
  Halves smallest = ~Halves{};  // of abs(x) - 1, by which 0 becomes the largest
  for (int64_t batch = 0; batch < num_batches; batch++) {
    for (int64_t row = 0; row < rows; row++) {
      const uint16_t* source = x + batch * batch_stride + row * row_stride;
      for (int64_t i = 0; i < columns; i += kHalves) {
        Halves halves{};
        if (columns - i >= kHalves) {
          memcpy(&halves, source + i, sizeof halves);
        } else {
          memcpy(&halves, source + i, 2 * static_cast<size_t>(columns - i));
        }
        halves = (halves & 0x7fff) - 1;
        smallest = halves < smallest ? halves : smallest;
      }
    }
  }
  int result = 0xffff;
  for (int i = 0; i < kHalves; i++) result = smallest[i] < result ? smallest[i] : result;
  return (result + 1) >> 7;
}

// Whether Pairs gives the canonical bits; reads both operands once.
inline bool pairs_are_exact(const Gemm& g) {
  if (g.a.dtype != Dtype::kBFloat16 || g.b.dtype != Dtype::kBFloat16) return false;
  const auto smallest = [&](Input x, int64_t batch_stride, int64_t row_stride, int64_t rows,
                            int64_t columns) {
    return smallest_exponent_field(as<BFloat16>(x), batch_stride == 0 ? 1 : g.num_batches,
                                   batch_stride, rows, row_stride, columns);
  };
  const int of_a = g.transpose_a ? smallest(g.a, g.a_batch_stride, g.a_row_stride, g.k, g.m)
                                 : smallest(g.a, g.a_batch_stride, g.a_row_stride, g.m, g.k);
  const int of_b = g.transpose_b ? smallest(g.b, g.b_batch_stride, g.b_row_stride, g.n, g.k)
                                 : smallest(g.b, g.b_batch_stride, g.b_row_stride, g.k, g.n);
  return of_a > 0 && of_b > 0 && (of_a - 127) + (of_b - 127) >= -112;
}

}  // namespace
}  // namespace primitives::canonical
