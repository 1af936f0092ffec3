// GELU (tanh and erf), SiLU and their derivatives, for F = float or a vector of floats.
#pragma once

#include "canonical/elementary.hpp"

namespace primitives::canonical {
namespace {

template <class F>
CANONICAL_FN F clamp(F x, float bound) {
  return select(x < -bound, set<F>(-bound), select(x > bound, set<F>(bound), x));
}

// Beyond 10 the derivative of GELU is 1 or 0 to the last bit; the clamp keeps exp and x^2 finite.
constexpr float kGeluBound = 10.0f;

// GELU in its tanh form is x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
constexpr float kGeluCubic = 0.044715f;
constexpr float kGeluMinus2Scale = -1.59576912f;  // -2 sqrt(2 / pi)
constexpr float kGeluSlopeCubic = 0.21406444f;    // 2 sqrt(2 / pi) * 3 * 0.044715
constexpr float kGeluSlope = 1.59576912f;

// exp(-2 u), from which sigmoid(2 u) = s and 1 - s = exp(-2 u) * s follow.
template <class F>
CANONICAL_FN F gelu_exp(F x) {
  return exp(fma((x * x) * x, set<F>(kGeluCubic), x) * kGeluMinus2Scale);
}

template <class F>
CANONICAL_FN F gelu(F x) {
  return x * sigmoid_of_exp(gelu_exp(x));
}

template <class F>
CANONICAL_FN F gelu_derivative(F x) {
  const F v = clamp(x, kGeluBound);
  const F e = gelu_exp(v), s = sigmoid_of_exp(e);
  const F slope = fma(v * v, set<F>(kGeluSlopeCubic), set<F>(kGeluSlope));
  return fma((v * s) * (e * s), slope, s);
}

// GELU in its erf form is x * Phi(x), Phi the cumulative distribution of a normal.
constexpr float kSqrtHalf = 0.707106769f;
constexpr float kNormalDensity = 0.398942292f;  // 1 / sqrt(2 pi)

template <class F>
CANONICAL_FN F normal_cdf(F x) {
  return fma(erf(x * kSqrtHalf), set<F>(0.5f), set<F>(0.5f));
}

template <class F>
CANONICAL_FN F gelu_erf(F x) {
  return x * normal_cdf(x);
}

template <class F>
CANONICAL_FN F gelu_erf_derivative(F x) {
  const F v = clamp(x, kGeluBound);
  const F density = exp((v * v) * -0.5f) * kNormalDensity;
  return fma(v, density, normal_cdf(v));
}

template <class F>
CANONICAL_FN F silu(F x) {
  return x * sigmoid(x);
}

// s + x s (1 - s). Beyond 104 exp(-abs(x)) is 0 and the derivative 1 or 0.
template <class F>
CANONICAL_FN F silu_derivative(F x) {
  const F v = clamp(x, 104.0f);
  const F e = exp_minus_abs(v), s = sigmoid_of_exp(e);
  return fma(v, (e * s) * s, select(v < 0.0f, e * s, s));
}

}  // namespace
}  // namespace primitives::canonical
