// exp, log, tanh, erf, sigmoid, rsqrt as fixed sequences of + - * /, sqrt and fma, for F = float or
// a vector of floats.
//
// Overloads of fma, sqrt, select, larger_or_second, as_int, as_float and to_float for F must be
// declared before this header.
#pragma once

#include "canonical/portable.hpp"

namespace primitives::canonical {
namespace {

constexpr float kLog2E = 1.44269504f;       // 0x3fb8aa3b
constexpr float kLn2 = 0.693147182f;        // 0x3f317218
constexpr float kLn2High = 0.693359375f;    // 9 significant bits: n * kLn2High is exact
constexpr float kLn2Low = -2.12194440e-4f;  // ln 2 - kLn2High

// The argument of exp_of_clamped for any d <= 0; NaN is kept.
template <class F>
CANONICAL_FN F clamp_exponent(F d) {
  return larger_or_second(set<F>(-87.5f), d);
}

// exp(d) half done: exp(d) is 2 exp(r) * scale.
template <class F>
struct ReducedExponent {
  F r, scale;
};

// The first half of exp_of_clamped, for who has other work to do before the second.
template <class F>
CANONICAL_FN ReducedExponent<F> reduce_exponent(F d) {
  constexpr float kMagic = 12583038.0f;  // 1.5 * 2^23 + 126: the low bits of t become n + 126
  const F t = fma(d, set<F>(kLog2E), set<F>(kMagic));
  const F n = t - kMagic;
  return {fma(n, set<F>(-kLn2), d), as_float(as_int(t) << 23)};
}

template <class F>
CANONICAL_FN F exp_of_reduced(const ReducedExponent<F>& x) {
  F p = set<F>(0.0027629079f);
  p = fma(p, x.r, set<F>(0.016737491f));
  p = fma(p, x.r, set<F>(0.083336782f));
  p = fma(p, x.r, set<F>(0.33333041f));
  p = fma(p, x.r, set<F>(0.99999987f));
  p = fma(p, x.r, set<F>(2.0f));
  p = fma(p, x.r, set<F>(2.0f));  // 2 exp(r)
  return p * x.scale;
}

// exp(d) for -87.5 <= d <= 0: exactly 1 at 0, exactly 0 below about -86.99, never subnormal.
template <class F>
CANONICAL_FN F exp_of_clamped(F d) {
  return exp_of_reduced(reduce_exponent(d));
}

// exp(x) for x <= 0, as softmax and the vocabulary entropy need it.
template <class F>
CANONICAL_FN F exp_nonpositive(F x) {
  return exp_of_clamped(clamp_exponent(x));
}

// exp(x) for every x: overflows to inf, underflows through the subnormals to 0.
template <class F>
CANONICAL_FN F exp(F x) {
  constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
  F c = select(x < -104.0f, set<F>(-104.0f), x);
  c = select(c > 89.0f, set<F>(89.0f), c);
  const F t = fma(c, set<F>(kLog2E), set<F>(kMagic));
  const F n = t - kMagic;
  F r = fma(n, set<F>(-kLn2High), c);
  r = fma(n, set<F>(-kLn2Low), r);
  F p = set<F>(1.9875691500e-4f);
  p = fma(p, r, set<F>(1.3981999507e-3f));
  p = fma(p, r, set<F>(8.3334519073e-3f));
  p = fma(p, r, set<F>(4.1665795894e-2f));
  p = fma(p, r, set<F>(1.6666665459e-1f));
  p = fma(p, r, set<F>(5.0000001201e-1f));
  const F y = fma(p, r * r, r) + 1.0f;
  const auto k = as_int(t) - 0x4b400000;
  const auto half = k >> 1;  // 2^k in two steps, so that a subnormal result is rounded once
  return (y * as_float((half + 127) << 23)) * as_float((k - half + 127) << 23);
}

// Natural logarithm for every x: -inf at 0, NaN below, subnormals scaled by 2^23 first.
template <class F>
CANONICAL_FN F log(F x) {
  const auto subnormal = x < 1.17549435e-38f;
  const F a = select(x > 0.0f, select(subnormal, x * 8388608.0f, x), set<F>(1.0f));
  const auto bits = as_int(a);
  const auto exponent = (bits - 0x3f3504f3) >> 23;  // mantissa in [sqrt(1/2), sqrt(2))
  const F e = to_float(exponent) - select(subnormal, set<F>(23.0f), set<F>(0.0f));
  const F f = as_float(bits - (exponent << 23)) - 1.0f;
  const F z = f * f;
  F y = set<F>(7.0376836292e-2f);
  y = fma(y, f, set<F>(-1.1514610310e-1f));
  y = fma(y, f, set<F>(1.1676998740e-1f));
  y = fma(y, f, set<F>(-1.2420140846e-1f));
  y = fma(y, f, set<F>(1.4249322787e-1f));
  y = fma(y, f, set<F>(-1.6668057665e-1f));
  y = fma(y, f, set<F>(2.0000714765e-1f));
  y = fma(y, f, set<F>(-2.4999993993e-1f));
  y = fma(y, f, set<F>(3.3333331174e-1f));
  y = (y * f) * z;
  y = fma(e, set<F>(kLn2Low), y);
  y = fma(z, set<F>(-0.5f), y);
  F result = fma(e, set<F>(kLn2High), f + y);
  const F infinity = set<F>(__builtin_inff());
  result = select(x == infinity, infinity, result);
  result = select(x == 0.0f, -infinity, result);
  return select(x >= 0.0f, result, set<F>(__builtin_nanf("")));
}

// 1 / (1 + exp(-x)), given e = exp(-x).
template <class F>
CANONICAL_FN F sigmoid_of_exp(F e) {
  return 1.0f / (e + 1.0f);
}

// exp(-abs(x)), at most 1: sigmoid(abs(x)) = s and sigmoid(-abs(x)) = exp(-abs(x)) * s follow
// without overflow or cancellation.
template <class F>
CANONICAL_FN F exp_minus_abs(F x) {
  return exp(select(x < 0.0f, x, -x));
}

template <class F>
CANONICAL_FN F sigmoid(F x) {
  const F e = exp_minus_abs(x), s = sigmoid_of_exp(e);
  return select(x < 0.0f, e * s, s);
}

// 1 / sqrt(x): inf at +0, -inf at -0, 0 at inf, NaN below 0.
template <class F>
CANONICAL_FN F rsqrt(F x) {
  return 1.0f / sqrt(x);
}

template <class F>
CANONICAL_FN F tanh(F x) {
  const F a = select(x < 0.0f, -x, x);
  const F z = x * x;
  F p = set<F>(-5.70498872745e-3f);
  p = fma(p, z, set<F>(2.06390887954e-2f));
  p = fma(p, z, set<F>(-5.37397155531e-2f));
  p = fma(p, z, set<F>(1.33314422036e-1f));
  p = fma(p, z, set<F>(-3.33332819422e-1f));
  const F small = select(x == 0.0f, x, fma(p * z, x, x));  // keeps the sign of zero
  const F large = 1.0f - 2.0f / (exp(a + a) + 1.0f);
  return select(a < 0.625f, small, select(x < 0.0f, -large, large));
}

template <class F>
CANONICAL_FN F erf(F x) {
  const F a = select(x < 0.0f, -x, x);
  const F z = x * x;
  F p = set<F>(-5.96761703e-4f);
  p = fma(p, z, set<F>(4.99119423e-3f));
  p = fma(p, z, set<F>(-2.67681349e-2f));
  p = fma(p, z, set<F>(1.12819925e-1f));
  p = fma(p, z, set<F>(-3.76125336e-1f));
  p = fma(p, z, set<F>(1.28379166e-1f));
  const F small = fma(p, x, x);
  F q = fma(set<F>(-1.72853470e-5f), a, set<F>(3.83197126e-4f));
  q = fma(q, z, fma(set<F>(-3.88396438e-3f), a, set<F>(2.42546219e-2f)));
  q = fma(q, a, set<F>(-1.06777877e-1f));
  q = fma(q, a, set<F>(-6.34846687e-1f));
  q = fma(q, a, set<F>(-1.28717512e-1f));
  q = fma(q, a, -a);
  const F large = 1.0f - exp(q);
  return select(a > 0.927734375f, select(x < 0.0f, -large, large), small);
}

}  // namespace
}  // namespace primitives::canonical
