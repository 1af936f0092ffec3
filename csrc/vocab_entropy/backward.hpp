// Logits and quads to gradients, element by element, in place or not.
#pragma once

#include "canonical/dispatch.hpp"
#include "vocab_entropy/columns.hpp"
#include "vocab_entropy/definition.hpp"
#include "vocab_entropy/kernels.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kGradientPrefetchNbytes = 8192;  // see [Note: prefetch] in forward.hpp

// kFast: scale is 1 and the gradients are numbers. kStream: around the caches, kFast only.
template <class T, bool kFast, bool kStream>
inline void gradient_of_row(const typename T::Storage* z, typename T::Storage* out, int64_t n,
                            const Slope& slope, float scale, bool prefetch) {
  using S = typename T::Storage;
  constexpr int kLine = 64 / sizeof(S);
  int64_t i = 0;
  if (kStream) {  // up to the first aligned element
    const auto past = reinterpret_cast<uintptr_t>(out) % 64 / sizeof(S);
    const int64_t head = past == 0 ? 0 : static_cast<int64_t>(kLine - past);
    for_lanes(head < n ? head : n, [&](int64_t k, auto lanes) {
      store<T>(out + k, gradient_of(load<T>(z + k, lanes), slope, scale), lanes);
      i = k + lanes;
    });
  }
  Vec d[kGroup];
  ReducedExponent<Vec> reduced[kGroup];
  const auto begin = [&](const S* p, int j) __attribute__((always_inline)) {
    Vec x = load_vector<T>(p, j) - slope.shift;
    if (!kFast) x = x * scale;
    d[j] = clamp_exponent(x);
    reduced[j] = reduce_exponent(d[j]);
  };
  const auto end = [&](int j) __attribute__((always_inline)) {
    const Vec g = exp_of_reduced(reduced[j]) * fma(set<Vec>(slope.b), d[j], set<Vec>(slope.a));
    return kFast ? g : canonical_nan(g);
  };
  if (i + kGroupNumel <= n) {
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; j++) begin(z + i, j);
  }
  for (; i + kGroupNumel <= n; i += kGroupNumel) {
    // The first half of the next ones; of these again at the end.
    const S* const next = z + (i + 2 * kGroupNumel <= n ? i + kGroupNumel : i);
    Vec g[2];
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; j++) {
      g[j % 2] = end(j);
      begin(next, j);
      if (j % 2 == 0) continue;
      S* const to = out + i + (j - 1) * kWidth;
      kStream ? Two<T>::stream(to, g[0], g[1]) : Two<T>::store(to, g[0], g[1]);
    }
    if (prefetch) {
#pragma GCC unroll 4
      for (int j = 0; j < kGroupNumel; j += kLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(z + i + j) + kGradientPrefetchNbytes);
      }
    }
  }
  for_lanes(n - i, [&](int64_t k, auto lanes) {
    store<T>(out + i + k, gradient_of(load<T>(z + i + k, lanes), slope, scale), lanes);
  });
}

inline void backward(const Logits& logits, const Labels& labels, const float* quads,
                     const Gradients& gradients, int64_t begin, int64_t end, void* out,
                     int64_t out_stride, bool streams) {
  const auto at = [](const float* gradient, int64_t token) {
    return gradient == nullptr ? 0.0f : gradient[token];
  };
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    using S = typename T::Storage;
    const int64_t n = logits.columns;
    for (int64_t token = begin; token < end; token++) {
      const S* z = static_cast<const S*>(logits.data) + token * logits.row_stride;
      S* row = static_cast<S*>(out) + token * out_stride;
      const Upstream upstream{at(gradients.entropy, token),
                              has_target(labels, token) ? at(gradients.log_prob, token) : 0.0f,
                              at(gradients.log_sum_exp, token)};
      if (upstream.entropy == 0.0f && upstream.log_prob == 0.0f && upstream.log_sum_exp == 0.0f) {
        memset(row, 0, static_cast<size_t>(n) * sizeof(S));  // also where the logits are NaN
        continue;
      }
      Quad quad;
      memcpy(&quad, quads + 4 * token, sizeof quad);
      const Slope slope = slope_of(quad, upstream, logits.scale);
      const int64_t target = target_column(labels, token);
      const bool own = target >= 0 && target < n;
      Vec at_target{};
      if (own) {  // before its logit may be overwritten
        at_target = gradient_of(load<T>(z + target, 1), slope, logits.scale) + slope.at_target;
      }
      const bool fast = logits.scale == 1.0f && gives_numbers(slope);
      if (fast && streams) {
        gradient_of_row<T, true, true>(z, row, n, slope, logits.scale, logits.prefetch);
      } else if (fast) {
        gradient_of_row<T, true, false>(z, row, n, slope, logits.scale, logits.prefetch);
      } else {
        gradient_of_row<T, false, false>(z, row, n, slope, logits.scale, logits.prefetch);
      }
      if (own) store<T>(row + target, at_target, 1);
    }
  });
  if (streams) _mm_sfence();
}

}  // namespace
}  // namespace primitives::vocab_entropy
