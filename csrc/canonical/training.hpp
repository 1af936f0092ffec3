// Embedding gradient, random numbers, dropout and the optimizer step.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/philox.hpp"
#include "canonical/scratch.hpp"

namespace primitives::canonical {
namespace {

inline void embedding_backward(Input dy, const int64_t* ids, int64_t tokens, int64_t hidden,
                               int64_t, float* table) {
  with_dtype(dy.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t t = 0; t < tokens; t++) {
      float* row = table + ids[t] * hidden;
      for_lanes(hidden, [&](int64_t i, auto lanes) {
        const Vec sum = load<Float32>(row + i, lanes) + load<T>(as<T>(dy) + t * hidden + i, lanes);
        store<Float32>(row + i, sum, lanes);
      });
    }
  });
}

CANONICAL_FN UVec splat_word(uint64_t x) { return UVec{} + static_cast<uint32_t>(x); }

// 64-bit counters first, first + 1, ... of the lanes, as low and high words.
CANONICAL_FN void lane_counters(uint64_t first, UVec* low, UVec* high) {
  *low = splat_word(first) + reinterpret_cast<UVec>(lane_numbers());
  const IVec carried = *low < splat_word(first);  // -1 where the low word wrapped
  *high = splat_word(first >> 32) - reinterpret_cast<UVec>(carried);
}

// A sum of twelve uniforms: 16-bit halves of six words, exact in float32.
inline void random_normal(uint64_t key, uint64_t first_index, int64_t n, float* out) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    UVec low, high, a[4], b[4];
    lane_counters(first_index + static_cast<uint64_t>(i), &low, &high);
    philox(key, low, high, UVec{}, UVec{}, a);
    philox(key, low, high, UVec{} + 1u, UVec{}, b);
    UVec sum{};
    for (int word = 0; word < 4; word++) sum += (a[word] & 0xffffu) + (a[word] >> 16);
    for (int word = 0; word < 2; word++) sum += (b[word] & 0xffffu) + (b[word] >> 16);
    // Each half h stands for (h + 1/2) / 65536; twelve of them have mean 6.
    const Vec centred = to_float(reinterpret_cast<IVec>(sum) - 393210);
    store<Float32>(out + i, centred * (1.0f / 65536.0f), lanes);
  });
}

// Words of the counters (0, 0, high), (1, 0, high), ...: out[4 * j + q] is word q of counter j.
inline void random_words(uint64_t key, uint64_t counter_high, int64_t n, uint32_t* out) {
  for (int64_t i = 0; i < n; i += 4 * kWidth) {
    UVec low, high, words[4];
    lane_counters(static_cast<uint64_t>(i / 4), &low, &high);
    philox(key, low, high, splat_word(counter_high), splat_word(counter_high >> 32), words);
    const IVec lane = lane_numbers();
    // Lane j of the four words becomes elements 4 j ... 4 j + 3: two rounds of interleaving.
    const IVec first = lane / 2 + (lane & 1) * kWidth, second = first + kWidth / 2;
    const UVec even[2] = {__builtin_shuffle(words[0], words[2], first),
                          __builtin_shuffle(words[0], words[2], second)};
    const UVec odd[2] = {__builtin_shuffle(words[1], words[3], first),
                         __builtin_shuffle(words[1], words[3], second)};
    UVec block[4];
    for (int half = 0; half < 2; half++) {
      block[2 * half] = __builtin_shuffle(even[half], odd[half], first);
      block[2 * half + 1] = __builtin_shuffle(even[half], odd[half], second);
    }
    const int64_t left = n - i;
    memcpy(out + i, block, left < 4 * kWidth ? static_cast<size_t>(left) * 4 : sizeof block);
  }
}

inline void dropout(Input x, Input residual, const Dropout& d, const int64_t* row_ids, int64_t rows,
                    int64_t width, Output out) {
  Scratch scratch(width + kWidth);
  uint32_t* words = reinterpret_cast<uint32_t*>(scratch.data());
  with_dtype(x.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < rows; r++) {
      random_words(d.key, static_cast<uint64_t>(row_ids[r]), width, words);
      for_lanes(width, [&](int64_t c, auto lanes) {
        UVec word;
        memcpy(&word, words + c, sizeof word);
        const Vec scaled = load<T>(as<T>(x) + r * width + c, lanes) * d.scale;
        Vec y = select(word >= splat_word(d.threshold), scaled, Vec{});
        if (residual.data) y = load<T>(as<T>(residual) + r * width + c, lanes) + y;
        store<T>(as<T>(out) + r * width + c, y, lanes);
      });
    }
  });
}

inline void adam_step(const AdamStep& s, int64_t n, float* param, const float* grad, float* exp_avg,
                      float* exp_avg_sq) {
  for_lanes(n, [&](int64_t i, auto lanes) {
    const Vec g = load<Float32>(grad + i, lanes);
    const Vec m = fma(g, set<Vec>(s.one_minus_beta1), load<Float32>(exp_avg + i, lanes) * s.beta1);
    const Vec v =
        fma(g * g, set<Vec>(s.one_minus_beta2), load<Float32>(exp_avg_sq + i, lanes) * s.beta2);
    const Vec denominator = sqrt(v) / s.bias_correction2_sqrt + s.eps;
    const Vec decayed = load<Float32>(param + i, lanes) * s.decay;
    store<Float32>(exp_avg + i, m, lanes);
    store<Float32>(exp_avg_sq + i, v, lanes);
    store<Float32>(param + i, fma(m / denominator, set<Vec>(-s.step_size), decayed), lanes);
  });
}

}  // namespace
}  // namespace primitives::canonical
