// The vocabulary entropy where it does not depend on who computes it: quads, their combination, the
// results of a token and the coefficients of its gradient. Plain floats, for host and device.
//
// A quad stands for any run of the vocabulary: its maximum m, S = sum of exp(d), T = sum of
// d exp(d) with d = (z - m) * scale, and the target's logit. docs/canonical-arithmetic.md has the
// whole definition.
#pragma once

#include "canonical/elementary.hpp"
#include "vocab_entropy/kernels.hpp"

namespace primitives::vocab_entropy {
namespace {

using namespace primitives::canonical;  // both live in one translation unit per instruction set

constexpr int kNumSegments = 16;  // of the vocabulary; a rank holds a whole number of them
constexpr int kRows = 16;         // a block is kRows rows of kColumns columns, row after row
constexpr int kColumns = 64;
constexpr int kBlock = kRows * kColumns;

struct Quad {
  float max, sum, weighted, target;
};

// A quad without its target, or a vector of them.
template <class F>
struct Triple {
  F max, sum, weighted;
};

// What an empty run is.
CANONICAL_FN Quad empty_quad() {
  const float minus_infinity = -__builtin_inff();
  return {minus_infinity, 0.0f, 0.0f, minus_infinity};
}

// The finite number that stands for a maximum: a run of -inf alone is shifted by 0.
template <class F>
CANONICAL_FN F shift_of(F max) {
  return select(max == -__builtin_inff(), F{}, max);
}

// Two neighbouring runs in one. A NaN in a run makes its sum NaN, and so every sum above.
template <class F>
CANONICAL_FN Triple<F> combine(const Triple<F>& a, const Triple<F>& b, float scale) {
  const F max = larger_or_second(a.max, b.max), shift = shift_of(max);
  const F da = clamp_exponent((a.max - shift) * scale);
  const F db = clamp_exponent((b.max - shift) * scale);
  const F fa = exp_of_clamped(da), fb = exp_of_clamped(db);
  return {max, fma(b.sum, fb, a.sum * fa),
          fma(fma(db, b.sum, b.weighted), fb, fma(da, a.sum, a.weighted) * fa)};
}

CANONICAL_FN Quad combine(const Quad& a, const Quad& b, float scale) {
  const Triple<float> both = combine(Triple<float>{a.max, a.sum, a.weighted},
                                     Triple<float>{b.max, b.sum, b.weighted}, scale);
  return {both.max, both.sum, both.weighted, a.target == -__builtin_inff() ? b.target : a.target};
}

// num_quads, a power of two, into quads[0]: adjacent pairs, level by level.
CANONICAL_FN Quad tree_of_quads(Quad* quads, int num_quads, float scale) {
  for (int left = num_quads / 2; left > 0; left /= 2) {
    for (int i = 0; i < left; i++) quads[i] = combine(quads[2 * i], quads[2 * i + 1], scale);
  }
  return quads[0];
}

CANONICAL_FN bool has_target(const Labels& labels, int64_t token) {
  return labels.data != nullptr && labels.data[token] != labels.ignored;
}

// Among this rank's columns, if in [0, columns).
CANONICAL_FN int64_t target_column(const Labels& labels, int64_t token) {
  return has_target(labels, token) ? labels.data[token] - labels.first : -1;
}

struct Result {
  float entropy, log_prob, log_sum_exp;
};

// Of a token whose quad covers the whole vocabulary.
CANONICAL_FN Result result_of(const Quad& quad, float scale) {
  const float log_sum = log(quad.sum);
  return {canonical_nan(log_sum - quad.weighted / quad.sum),
          canonical_nan((quad.target - quad.max) * scale - log_sum),
          canonical_nan(quad.max * scale + log_sum)};
}

// One NaN in every field when the sum is NaN: then the others depend on the order of the maxima.
CANONICAL_FN Quad canonical_quad(const Quad& quad) {
  if (quad.sum == quad.sum) return quad;
  return {canonical_nan(quad.sum), canonical_nan(quad.sum), canonical_nan(quad.sum),
          canonical_nan(quad.sum)};
}

// Gradients of the loss by a token's results.
struct Upstream {
  float entropy, log_prob, log_sum_exp;
};

// The gradient by a logit z is exp(d) * (b * d + a) with d = (z - shift) * scale, and at_target
// more at the target.
struct Slope {
  float shift, a, b, at_target;
};

CANONICAL_FN Slope slope_of(const Quad& quad, const Upstream& g, float scale) {
  const float log_sum = log(quad.sum), entropy = log_sum - quad.weighted / quad.sum;
  const float inverse = scale / quad.sum;
  return {shift_of(quad.max),
          ((g.log_sum_exp - g.log_prob) - g.entropy * (entropy - log_sum)) * inverse,
          -g.entropy * inverse, g.log_prob * scale};
}

// Whether gradients are numbers for every finite or -inf logit: no 0 * inf, no NaN in the quad.
CANONICAL_FN bool gives_numbers(const Slope& slope) {
  const float largest =
      fma(slope.b < 0.0f ? -slope.b : slope.b, 87.5f, slope.a < 0.0f ? -slope.a : slope.a);
  return largest < __builtin_inff() && slope.shift == slope.shift;
}

template <bool kScaled = true, class F>
CANONICAL_FN F gradient_of(F z, const Slope& slope, float scale) {
  F d = z - slope.shift;
  if (kScaled) d = d * scale;
  d = clamp_exponent(d);
  return exp_of_clamped(d) * fma(set<F>(slope.b), d, set<F>(slope.a));
}

}  // namespace
}  // namespace primitives::vocab_entropy
