// Softmax (plain, causal, padded) and cross entropy, forward and backward.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/elementary.hpp"
#include "canonical/scratch.hpp"
#include "canonical/tree.hpp"

namespace primitives::canonical {
namespace {

// Row r sees its first visible_in(r) columns, at least one; the others are exactly +0.
template <class Visible>
inline void masked_softmax(Input scores, int64_t rows, int64_t length, float scale, Output probs,
                           Visible visible_in) {
  const int64_t row_room = length + kRowTreePadding;
  Scratch scratch(2 * row_room);
  float* row = scratch.data();
  float* sums = row + row_room;
  const Vec minus_infinity = set<Vec>(-__builtin_inff());
  with_dtype(scores.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t visible = visible_in(r);
      Vec largest = minus_infinity;
      for_lanes(visible, [&](int64_t i, auto lanes) {
        const Vec z = load<T>(as<T>(scores) + r * length + i, lanes) * scale;
        store_raw(row + i, z);
        largest = max(largest, select(first_lanes(lanes), z, minus_infinity));
      });
      const float m = horizontal_max(largest) + 0.0f;
      for_lanes(length, [&](int64_t i, auto) {
        Vec e{};
        if (i < visible) {
          e = exp_nonpositive(load<Float32>(row + i) - m);
          e = select(first_lanes(visible - i), e, Vec{});
        }
        store_raw(row + i, e);
        store_raw(sums + i, e);
      });
      const float inverse = 1.0f / row_tree(sums, length);
      for_lanes(length, [&](int64_t i, auto lanes) {
        const Vec p = load<Float32>(row + i) * inverse;
        store<T>(as<T>(probs) + r * length + i, select(first_lanes(visible - i), p, Vec{}), lanes);
      });
    }
  });
}

template <class Visible>
inline void masked_softmax_backward(Input dprobs, Input probs, int64_t rows, int64_t length,
                                    float scale, Output dscores, Visible visible_in) {
  Scratch sums(length + kRowTreePadding);
  with_dtype(probs.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t visible = visible_in(r);
      const auto* dp = as<T>(dprobs) + r * length;
      const auto* p = as<T>(probs) + r * length;
      for_lanes(length, [&](int64_t i, auto lanes) {
        const Vec product = load<T>(p + i, lanes) * load<T>(dp + i, lanes);
        store_raw(sums.data() + i, select(first_lanes(visible - i), product, Vec{}));
      });
      const float sum = row_tree(sums.data(), length);
      for_lanes(length, [&](int64_t i, auto lanes) {
        const Vec v = (load<T>(p + i, lanes) * (load<T>(dp + i, lanes) - sum)) * scale;
        store<T>(as<T>(dscores) + r * length + i, select(first_lanes(visible - i), v, Vec{}),
                 lanes);
      });
    }
  });
}

inline void softmax(Input scores, int64_t rows, int64_t length, float scale, Output probs) {
  masked_softmax(scores, rows, length, scale, probs, [&](int64_t) { return length; });
}

inline void softmax_backward(Input dprobs, Input probs, int64_t rows, int64_t length, float scale,
                             Output dscores) {
  masked_softmax_backward(dprobs, probs, rows, length, scale, dscores,
                          [&](int64_t) { return length; });
}

inline void causal_softmax(Input scores, int64_t num, int64_t length, float scale, Output probs) {
  masked_softmax(scores, num * length, length, scale, probs,
                 [&](int64_t r) { return r % length + 1; });
}

inline void causal_softmax_backward(Input dprobs, Input probs, int64_t num, int64_t length,
                                    float scale, Output dscores) {
  masked_softmax_backward(dprobs, probs, num * length, length, scale, dscores,
                          [&](int64_t r) { return r % length + 1; });
}

inline void padded_softmax(Input scores, const int64_t* visible, int64_t num, int64_t length,
                           float scale, Output probs) {
  masked_softmax(scores, num * length, length, scale, probs,
                 [&](int64_t r) { return visible[r / length]; });
}

inline void padded_softmax_backward(Input dprobs, Input probs, const int64_t* visible, int64_t num,
                                    int64_t length, float scale, Output dscores) {
  masked_softmax_backward(dprobs, probs, num * length, length, scale, dscores,
                          [&](int64_t r) { return visible[r / length]; });
}

inline void vocabulary_max(Input logits, int64_t parts, int64_t tokens, int64_t width,
                           float* max_out) {
  const Vec minus_infinity = set<Vec>(-__builtin_inff());
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t t = 0; t < tokens; t++) {
      Vec largest = minus_infinity;
      for (int64_t part = 0; part < parts; part++) {
        const auto* z = as<T>(logits) + (part * tokens + t) * width;
        for_lanes(width, [&](int64_t i, auto lanes) {
          largest = max(largest, select(first_lanes(lanes), load<T>(z + i, lanes), minus_infinity));
        });
      }
      max_out[t] = canonical_nan(horizontal_max(largest) + 0.0f);
    }
  });
}

inline void cross_entropy_sums(Input logits, const int64_t* targets, int64_t first,
                               const float* max_in, int64_t parts, int64_t tokens, int64_t width,
                               float* sum_exp, float* target_logit) {
  Scratch row(width + kRowTreePadding);
  Scratch part_sums(parts + kRowTreePadding);
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t t = 0; t < tokens; t++) {
      const float m = max_in[t];
      for (int64_t part = 0; part < parts; part++) {
        const auto* z = as<T>(logits) + (part * tokens + t) * width;
        for_lanes(width, [&](int64_t i, auto lanes) {
          store_raw(row.data() + i, exp_nonpositive(load<T>(z + i, lanes) - m));
        });
        part_sums.data()[part] = row_tree(row.data(), width);
      }
      sum_exp[t] = canonical_nan(row_tree(part_sums.data(), parts));
      const int64_t target = targets[t] - first;  // outside [0, parts * width): in another shard
      if (target >= 0 && target < parts * width) {
        const auto* z = as<T>(logits) + (target / width * tokens + t) * width + target % width;
        target_logit[t] = canonical_nan(load<T>(z, 1)[0]);
      } else {
        target_logit[t] = 0.0f;
      }
    }
  });
}

inline void cross_entropy_backward(Input logits, const int64_t* targets, int64_t first,
                                   const float* max_in, const float* sum_exp,
                                   const float* grad_loss, int64_t parts, int64_t tokens,
                                   int64_t width, Output dlogits) {
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t part = 0; part < parts; part++) {
      for (int64_t t = 0; t < tokens; t++) {
        const int64_t row = (part * tokens + t) * width;
        const int64_t target = targets[t] - first - part * width;  // outside [0, width): elsewhere
        const float m = max_in[t], inverse = 1.0f / sum_exp[t], grad = grad_loss[t];
        for_lanes(width, [&](int64_t i, auto lanes) {
          Vec p = exp_nonpositive(load<T>(as<T>(logits) + row + i, lanes) - m) * inverse;
          if (target >= i && target < i + kWidth) p[target - i] -= 1.0f;
          store<T>(as<T>(dlogits) + row + i, p * grad, lanes);
        });
      }
    }
  });
}

}  // namespace
}  // namespace primitives::canonical
