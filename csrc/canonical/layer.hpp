// LayerNorm, RMSNorm and the activations, forward and backward.
#pragma once

#include "canonical/activation.hpp"
#include "canonical/dispatch.hpp"
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
      const float r = rsqrt(variance + eps);
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

inline void rms_norm(Input x, Input weight, float eps, int64_t tokens, int64_t hidden, Output y,
                     float* rstd) {
  const int64_t row_room = hidden + kRowTreePadding;
  Scratch scratch(3 * row_room);
  float* w = scratch.data();
  float* row = w + row_room;
  float* sums = row + row_room;
  widen(weight, hidden, w);
  const float num = static_cast<float>(hidden);
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for (int64_t t = 0; t < tokens; t++) {
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec v = load<X>(as<X>(x) + t * hidden + i, lanes);
        store_raw(row + i, v);
        store_raw(sums + i, v * v);
      });
      const float r = rsqrt(row_tree(sums, hidden) / num + eps);
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec normalized = load<Float32>(row + i) * r;
        store<X>(as<X>(y) + t * hidden + i, normalized * load<Float32>(w + i), lanes);
      });
      rstd[t] = canonical_nan(r);
    }
  });
}

inline void rms_norm_backward(Input dy, Input x, const float* rstd, Input weight, int64_t tokens,
                              int64_t hidden, int64_t num_blocks, Output dx, float* dweight) {
  const int64_t row_room = hidden + kRowTreePadding;
  Scratch scratch(4 * row_room);
  float* w = scratch.data();
  float* g = w + row_room;
  float* normalized = g + row_room;
  float* sums = normalized + row_room;
  widen(weight, hidden, w);
  const float num = static_cast<float>(hidden);
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for (int64_t t = 0; t < tokens; t++) {
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec n = load<X>(as<X>(x) + t * hidden + i, lanes) * rstd[t];
        const Vec v = load<X>(as<X>(dy) + t * hidden + i, lanes) * load<Float32>(w + i);
        store_raw(normalized + i, n);
        store_raw(g + i, v);
        store_raw(sums + i, v * n);
      });
      const Vec c = set<Vec>(row_tree(sums, hidden) / num);
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec v = fma(load<Float32>(normalized + i), -c, load<Float32>(g + i)) * rstd[t];
        store<X>(as<X>(dx) + t * hidden + i, v, lanes);
      });
    }
    const int64_t block = tokens / num_blocks;
    for (int64_t number = 0; number < num_blocks; number++) {
      const int64_t first = number * block;
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec sum = column_tree(block, [&](int64_t t) {
          const int64_t element = (first + t) * hidden + i;
          const Vec n = load<X>(as<X>(x) + element, lanes) * rstd[first + t];
          return load<X>(as<X>(dy) + element, lanes) * n;
        });
        store<Float32>(dweight + number * hidden + i, sum, lanes);
      });
    }
  });
}

template <class Function>
inline void activation(Input x, int64_t n, Output y, Function function) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      store<X>(as<X>(y) + i, function(load<X>(as<X>(x) + i, lanes)), lanes);
    });
  });
}

template <class Derivative>
inline void activation_backward(Input dy, Input x, int64_t n, Output dx, Derivative derivative) {
  with_dtype(x.dtype, [&](auto x_type) {
    using X = decltype(x_type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      const Vec slope = derivative(load<X>(as<X>(x) + i, lanes));
      store<X>(as<X>(dx) + i, load<X>(as<X>(dy) + i, lanes) * slope, lanes);
    });
  });
}

inline void gelu(Input x, int64_t n, Output y) {
  activation(x, n, y, [&](Vec v) { return gelu(v); });
}

inline void gelu_backward(Input dy, Input x, int64_t n, Output dx) {
  activation_backward(dy, x, n, dx, [&](Vec v) { return gelu_derivative(v); });
}

inline void gelu_erf(Input x, int64_t n, Output y) {
  activation(x, n, y, [&](Vec v) { return gelu_erf(v); });
}

inline void gelu_erf_backward(Input dy, Input x, int64_t n, Output dx) {
  activation_backward(dy, x, n, dx, [&](Vec v) { return gelu_erf_derivative(v); });
}

inline void silu(Input x, int64_t n, Output y) {
  activation(x, n, y, [&](Vec v) { return silu(v); });
}

inline void silu_backward(Input dy, Input x, int64_t n, Output dx) {
  activation_backward(dy, x, n, dx, [&](Vec v) { return silu_derivative(v); });
}

inline void swiglu(Input gate, Input value, int64_t n, Output y) {
  with_dtype(gate.dtype, [&](auto type) {
    using T = decltype(type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      const Vec activated = silu(load<T>(as<T>(gate) + i, lanes));
      store<T>(as<T>(y) + i, activated * load<T>(as<T>(value) + i, lanes), lanes);
    });
  });
}

inline void swiglu_backward(Input dy, Input gate, Input value, int64_t n, Output dgate,
                            Output dvalue) {
  with_dtype(gate.dtype, [&](auto type) {
    using T = decltype(type);
    for_lanes(n, [&](int64_t i, auto lanes) {
      const Vec g = load<T>(as<T>(gate) + i, lanes), d = load<T>(as<T>(dy) + i, lanes);
      const Vec dactivated = d * load<T>(as<T>(value) + i, lanes);
      store<T>(as<T>(dgate) + i, dactivated * silu_derivative(g), lanes);
      store<T>(as<T>(dvalue) + i, d * silu(g), lanes);
    });
  });
}

}  // namespace
}  // namespace primitives::canonical
