// LayerNorm and GELU, forward and backward.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/elementary.hpp"
#include "canonical/scratch.hpp"
#include "canonical/tree.hpp"

namespace primitives::canonical {
namespace {

// Widens n elements into float32 scratch with room for whole vectors.
inline void widen(Input x, int64_t n, float* out) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) { store_raw(out + i, load<X>(as<X>(x) + i, lanes)); });
  });
}

inline void layer_norm(Input x, Input weight, Input bias, float eps, int64_t tokens, int64_t hidden,
                       Output y, float* mean, float* rstd) {
  const int64_t row_room = hidden + kRowTreePadding;
  Scratch scratch(4 * row_room);
  float* w = scratch.data();
  float* b = w + row_room;
  float* row = b + row_room;
  float* sums = row + row_room;
  widen(weight, hidden, w);
  widen(bias, hidden, b);
  const float num = static_cast<float>(hidden);
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for (int64_t t = 0; t < tokens; t++) {
      const auto* source = as<X>(x) + t * hidden;
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec v = load<X>(source + i, lanes);
        store_raw(row + i, v);
        store_raw(sums + i, v);
      });
      const float m = row_tree(sums, hidden) / num;
      for_lanes(hidden, [&](int64_t i, auto) {
        const Vec d = load<Float32>(row + i) - m;
        store_raw(row + i, d);
        store_raw(sums + i, d * d);
      });
      const float variance = row_tree(sums, hidden) / num;
      const float r = 1.0f / sqrt(set<Vec>(variance + eps))[0];
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec normalized = load<Float32>(row + i) * r;
        store<X>(as<X>(y) + t * hidden + i,
                 fma(normalized, load<Float32>(w + i), load<Float32>(b + i)), lanes);
      });
      mean[t] = canonical_nan(m);
      rstd[t] = canonical_nan(r);
    }
  });
}

inline void layer_norm_backward(Input dy, Input x, const float* mean, const float* rstd,
                                Input weight, int64_t tokens, int64_t hidden, int64_t num_blocks,
                                Output dx, float* dweight, float* dbias) {
  const int64_t row_room = hidden + kRowTreePadding;
  Scratch scratch(5 * row_room);
  float* w = scratch.data();
  float* g = w + row_room;
  float* normalized = g + row_room;
  float* g_sums = normalized + row_room;
  float* gx_sums = g_sums + row_room;
  widen(weight, hidden, w);
  const float num = static_cast<float>(hidden);
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for (int64_t t = 0; t < tokens; t++) {
      const float m = mean[t], r = rstd[t];
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec n = (load<X>(as<X>(x) + t * hidden + i, lanes) - m) * r;
        const Vec v = load<X>(as<X>(dy) + t * hidden + i, lanes) * load<Float32>(w + i);
        store_raw(normalized + i, n);
        store_raw(g + i, v);
        store_raw(g_sums + i, v);
        store_raw(gx_sums + i, v * n);
      });
      const float a = row_tree(g_sums, hidden) / num;
      const float c = row_tree(gx_sums, hidden) / num;
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec centred = load<Float32>(g + i) - a;
        const Vec v = fma(load<Float32>(normalized + i), set<Vec>(-c), centred) * r;
        store<X>(as<X>(dx) + t * hidden + i, v, lanes);
      });
    }
    const int64_t block = tokens / num_blocks;
    for (int64_t number = 0; number < num_blocks; number++) {
      const int64_t first = number * block;
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const auto* dy_column = as<X>(dy) + first * hidden + i;
        const auto* x_column = as<X>(x) + first * hidden + i;
        const Vec weight_sum = column_tree(block, [&](int64_t t) {
          const Vec n = (load<X>(x_column + t * hidden, lanes) - mean[first + t]) * rstd[first + t];
          return load<X>(dy_column + t * hidden, lanes) * n;
        });
        const Vec bias_sum =
            column_tree(block, [&](int64_t t) { return load<X>(dy_column + t * hidden, lanes); });
        store<Float32>(dweight + number * hidden + i, weight_sum, lanes);
        store<Float32>(dbias + number * hidden + i, bias_sum, lanes);
      });
    }
  });
}

// GELU in its tanh form is x * sigmoid(2 u), u = sqrt(2 / pi) * (x + 0.044715 x^3).
constexpr float kGeluCubic = 0.044715f;
constexpr float kGeluMinus2Scale = -1.59576912f;  // -2 sqrt(2 / pi)
constexpr float kGeluSlopeCubic = 0.21406444f;    // 2 sqrt(2 / pi) * 3 * 0.044715
constexpr float kGeluSlope = 1.59576912f;

// exp(-2 u), from which sigmoid(2 u) = s and 1 - s = exp(-2 u) * s follow.
CANONICAL_FN Vec gelu_exp(Vec x) {
  return exp(fma((x * x) * x, set<Vec>(kGeluCubic), x) * kGeluMinus2Scale);
}

inline void gelu(Input x, int64_t n, Output y) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      const Vec v = load<X>(as<X>(x) + i, lanes);
      store<X>(as<X>(y) + i, v * sigmoid_of_exp(gelu_exp(v)), lanes);
    });
  });
}

inline void gelu_backward(Input dy, Input x, int64_t n, Output dx) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      // Beyond 10 the derivative is 1 or 0 to the last bit; the clamp keeps exp and x^2 finite.
      Vec v = load<X>(as<X>(x) + i, lanes);
      v = select(v < -10.0f, set<Vec>(-10.0f), select(v > 10.0f, set<Vec>(10.0f), v));
      const Vec e = gelu_exp(v), s = sigmoid_of_exp(e);
      const Vec slope = fma(v * v, set<Vec>(kGeluSlopeCubic), set<Vec>(kGeluSlope));
      const Vec derivative = fma((v * s) * (e * s), slope, s);
      store<X>(as<X>(dx) + i, load<X>(as<X>(dy) + i, lanes) * derivative, lanes);
    });
  });
}

// GELU itself is x * Phi(x), Phi(x) = (1 + erf(x / sqrt(2))) / 2.
constexpr float kSqrtHalf = 0.707106769f;
constexpr float kNormalDensity = 0.398942292f;  // 1 / sqrt(2 pi)

CANONICAL_FN Vec normal_cdf(Vec x) {
  return fma(erf(x * kSqrtHalf), set<Vec>(0.5f), set<Vec>(0.5f));
}

inline void gelu_erf(Input x, int64_t n, Output y) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      const Vec v = load<X>(as<X>(x) + i, lanes);
      store<X>(as<X>(y) + i, v * normal_cdf(v), lanes);
    });
  });
}

inline void gelu_erf_backward(Input dy, Input x, int64_t n, Output dx) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      Vec v = load<X>(as<X>(x) + i, lanes);
      v = select(v < -10.0f, set<Vec>(-10.0f), select(v > 10.0f, set<Vec>(10.0f), v));
      const Vec density = exp((v * v) * -0.5f) * kNormalDensity;
      const Vec derivative = fma(v, density, normal_cdf(v));
      store<X>(as<X>(dx) + i, load<X>(as<X>(dy) + i, lanes) * derivative, lanes);
    });
  });
}

}  // namespace
}  // namespace primitives::canonical
