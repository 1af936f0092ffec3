// Sums by the tree, sums of squares, zero counts and the elementwise functions.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/elementary.hpp"
#include "canonical/scratch.hpp"
#include "canonical/tree.hpp"

namespace primitives::canonical {
namespace {

inline void row_sum(Input x, int64_t rows, int64_t n, Output out) {
  Scratch row(n + kRowTreePadding);
  with_dtype(x.dtype, [&](auto x_type) {
    with_dtype(out.dtype, [&](auto out_type) {
      using X = decltype(x_type);
      using Out = decltype(out_type);
      for (int64_t r = 0; r < rows; r++) {
        const auto* source = as<X>(x) + r * n;
        for_lanes(n, [&](int64_t i, auto lanes) {
          store_raw(row.data() + i, load<X>(source + i, lanes));
        });
        const float sum = n > 0 ? row_tree(row.data(), n) : 0.0f;
        store<Out>(as<Out>(out) + r, set<Vec>(sum), 1);
      }
    });
  });
}

inline void tree_sum(Input x, int64_t outer, int64_t n, int64_t rows, int64_t length, Input bias,
                     Output out) {
  if (rows * length == 1 && bias.data == nullptr) return row_sum(x, outer, n, out);
  Scratch bias_row(bias.data ? length + kWidth : 0);
  if (bias.data) {
    with_dtype(bias.dtype, [&](auto bias_type) {
      using B = decltype(bias_type);
      for_lanes(length, [&](int64_t i, auto lanes) {
        store_raw(bias_row.data() + i, load<B>(as<B>(bias) + i, lanes));
      });
    });
  }
  with_dtype(x.dtype, [&](auto x_type) {
    with_dtype(out.dtype, [&](auto out_type) {
      using X = decltype(x_type);
      using Out = decltype(out_type);
      const int64_t inner = rows * length;
      for (int64_t row = 0; row < outer * rows; row++) {
        const auto* source = as<X>(x) + row / rows * n * inner + row % rows * length;
        for_lanes(length, [&](int64_t c, auto lanes) {
          Vec sum =
              column_tree(n, [&](int64_t i) { return load<X>(source + i * inner + c, lanes); });
          if (bias.data) sum = sum + load<Float32>(bias_row.data() + c);
          store<Out>(as<Out>(out) + row * length + c, sum, lanes);
        });
      }
    });
  });
}

inline void sum_of_squares(const float* x, int64_t rows, int64_t n, float* out) {
  Scratch row(n + kRowTreePadding);
  for (int64_t r = 0; r < rows; r++) {
    for_lanes(n, [&](int64_t i, auto lanes) {
      const Vec v = load<Float32>(x + r * n + i, lanes);
      store_raw(row.data() + i, v * v);
    });
    const float sum = n > 0 ? row_tree(row.data(), n) : 0.0f;
    out[r] = canonical_nan(sum);
  }
}

inline int64_t count_zeros(Input x, int64_t n) {
  int64_t count = 0;
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    // Lane counters stay below 2^31: at most 2^20 vectors between two collections.
    constexpr int64_t kChunk = int64_t{kWidth} << 20;
    for (int64_t start = 0; start < n; start += kChunk) {
      const int64_t length = n - start < kChunk ? n - start : kChunk;
      IVec zeros{};
      int64_t padding = 0;
      for_lanes(length, [&](int64_t i, auto lanes) {
        zeros -= load<X>(as<X>(x) + start + i, lanes) == 0.0f;
        padding += kWidth - lanes;  // the lanes a tail fills with zeros
      });
      for (int i = 0; i < kWidth; i++) count += zeros[i];
      count -= padding;
    }
  });
  return count;
}

template <class Function>
CANONICAL_FN void map(const float* x, int64_t n, float* out, Function function) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    store<Float32>(out + i, function(load<Float32>(x + i, lanes)), lanes);
  });
}

inline void elementwise(Elementwise function, const float* x, int64_t n, float* out) {
  switch (function) {
    case Elementwise::kExp:
      return map(x, n, out, [&](Vec v) { return exp(v); });
    case Elementwise::kLog:
      return map(x, n, out, [&](Vec v) { return log(v); });
    case Elementwise::kSqrt:
      return map(x, n, out, [&](Vec v) { return sqrt(v); });
    case Elementwise::kTanh:
      return map(x, n, out, [&](Vec v) { return tanh(v); });
    case Elementwise::kErf:
      return map(x, n, out, [&](Vec v) { return erf(v); });
    case Elementwise::kSigmoid:
      return map(x, n, out, [&](Vec v) { return sigmoid(v); });
    case Elementwise::kRsqrt:
      return map(x, n, out, [&](Vec v) { return rsqrt(v); });
  }
}

}  // namespace
}  // namespace primitives::canonical
