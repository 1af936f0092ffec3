// Row sums, softmax and cross entropy: kernels that work on whole rows.
//
// Launch: a block of kWarps warps per row (token), with kWarps floats of shared memory. Nothing of
// a row is kept: each pass reads it anew, so its length is not bounded.
#pragma once

#include "canonical/cuda/tree.hpp"
#include "canonical/elementary.hpp"

namespace primitives::canonical {
namespace {

template <class T_, int kWarps_>
struct RowKernel {
  using T = T_;
  using S = typename T::Storage;
  static constexpr int kWarps = kWarps_, kThreads = kWarp * kWarps, kMinBlocks = 32 / kWarps;
  static constexpr int kNumel = T::kNumel;

  // body(first) for the pieces of a row that are this thread's.
  template <class Thread, class Body>
  static DEVICE_FN void for_pieces(const Thread& thread, int64_t length, const Body& body) {
    for (int64_t first = thread.index() * kNumel; first < length; first += kThreads * kNumel) {
      body(first);
    }
  }
  template <class Thread, class Leaves>
  static DEVICE_FN float tree(const Thread& thread, int64_t n, const Leaves& leaves) {
    return block_tree<kWarps, kNumel>(thread, n, leaves);
  }
};

// x [rows, n] -> out [rows]
template <class T, int kWarps, bool kSquared>
struct RowSum : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S* x;
  int64_t n;
  Output out;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t row = thread.block_x();
    const float sum = Base::tree(thread, n, [&](int64_t first, float v[Base::kNumel]) {
      load_piece<T>(thread, x + row * n, first, n, v);
#pragma unroll
      for (int i = 0; i < Base::kNumel; i++) v[i] = kSquared ? v[i] * v[i] : v[i];
    });
    if (thread.index() == 0) store_any(thread, out, row, n > 0 ? sum : 0.0f);
  }
};

// How many columns a row of [num, length, length] sees, from the first on.
struct Visible {
  enum class Kind { kAll, kCausal, kPadded };
  Kind kind;
  int64_t length;
  const int64_t* of_matrix;  // kPadded: [num]

  template <class Thread>
  DEVICE_FN int64_t of_row(const Thread& thread, int64_t row) const {
    switch (kind) {
      case Kind::kAll:
        return length;
      case Kind::kCausal:
        return row % length + 1;
      default:
        return thread.load(of_matrix + row / length);
    }
  }
};

// scores [rows, length] -> probs; columns that are not visible are exactly +0
template <class T, int kWarps>
struct Softmax : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S* scores;
  Visible visible_columns;
  float scale;
  typename Base::S* probs;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    constexpr int kNumel = Base::kNumel;
    const int64_t row = thread.block_x(), length = visible_columns.length;
    const int64_t visible = visible_columns.of_row(thread, row);
    const auto* z = scores + row * length;
    float largest = -__builtin_inff();
    Base::for_pieces(thread, visible, [&](int64_t first) {
      float x[kNumel];
      load_piece<T>(thread, z, first, visible, x);
#pragma unroll
      for (int i = 0; i < kNumel; i++) {
        if (first + i < visible) largest = max_or_nan(largest, x[i] * scale);
      }
    });
    const float m = block_max<Base::kWarps>(thread, largest);
    const auto exps = [&](int64_t first, float e[kNumel]) {
      load_piece<T>(thread, z, first, visible, e);
#pragma unroll
      for (int i = 0; i < kNumel; i++) {
        e[i] = first + i < visible ? exp_nonpositive(e[i] * scale - m) : 0.0f;
      }
    };
    const float inverse = 1.0f / Base::tree(thread, length, exps);
    Base::for_pieces(thread, length, [&](int64_t first) {
      float p[kNumel];
      exps(first, p);
#pragma unroll
      for (int i = 0; i < kNumel; i++) p[i] = first + i < visible ? p[i] * inverse : 0.0f;
      store_piece<T>(thread, probs + row * length, first, length, p);
    });
  }
};

// dprobs, probs [rows, length] -> dscores
template <class T, int kWarps>
struct SoftmaxBackward : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S *dprobs, *probs;
  Visible visible_columns;
  float scale;
  typename Base::S* dscores;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    constexpr int kNumel = Base::kNumel;
    const int64_t row = thread.block_x(), length = visible_columns.length;
    const int64_t visible = visible_columns.of_row(thread, row);
    const auto load = [&](int64_t first, float p[kNumel], float dp[kNumel]) {
      load_piece<T>(thread, probs + row * length, first, visible, p);
      load_piece<T>(thread, dprobs + row * length, first, visible, dp);
    };
    const float sum = Base::tree(thread, length, [&](int64_t first, float x[kNumel]) {
      float dp[kNumel];
      load(first, x, dp);
#pragma unroll
      for (int i = 0; i < kNumel; i++) x[i] = first + i < visible ? x[i] * dp[i] : 0.0f;
    });
    Base::for_pieces(thread, length, [&](int64_t first) {
      float p[kNumel], dp[kNumel];
      load(first, p, dp);
#pragma unroll
      for (int i = 0; i < kNumel; i++) {
        p[i] = first + i < visible ? (p[i] * (dp[i] - sum)) * scale : 0.0f;
      }
      store_piece<T>(thread, dscores + row * length, first, length, p);
    });
  }
};

// logits [parts, tokens, width] -> max [tokens]
template <class T, int kWarps>
struct VocabularyMax : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S* logits;
  int64_t parts, tokens, width;
  float* max;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t t = thread.block_x();
    float largest = -__builtin_inff();
    for (int64_t part = 0; part < parts; part++) {
      Base::for_pieces(thread, width, [&](int64_t first) {
        float z[Base::kNumel];
        load_piece<T>(thread, logits + (part * tokens + t) * width, first, width, z);
#pragma unroll
        for (int i = 0; i < Base::kNumel; i++) {
          if (first + i < width) largest = max_or_nan(largest, z[i]);
        }
      });
    }
    largest = block_max<Base::kWarps>(thread, largest);
    if (thread.index() == 0) store_float(thread, max + t, largest);
  }
};

// logits [parts, tokens, width] -> sum_exp, target_logit [tokens]
template <class T, int kWarps>
struct CrossEntropySums : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S* logits;
  const int64_t* targets;
  int64_t first_target;
  const float* max;
  int64_t parts, tokens, width;
  float *sum_exp, *target_logit;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t t = thread.block_x();
    const float m = thread.load(max + t);
    float sum = -0.0f;
    if (parts > 0) {
      sum = serial_tree(parts, [&](int64_t part) {
        return Base::tree(thread, width, [&](int64_t first, float e[Base::kNumel]) {
          load_piece<T>(thread, logits + (part * tokens + t) * width, first, width, e);
#pragma unroll
          for (int i = 0; i < Base::kNumel; i++) e[i] = exp_nonpositive(e[i] - m);
        });
      });
    }
    if (thread.index() != 0) return;
    store_float(thread, sum_exp + t, sum);
    const int64_t target = thread.load(targets + t) - first_target;  // or in another shard
    float logit = 0.0f;
    if (target >= 0 && target < parts * width) {
      const int64_t row = target / width * tokens + t;
      logit = load_one<T>(thread, logits, row * width + target % width);
    }
    store_float(thread, target_logit + t, logit);
  }
};

}  // namespace
}  // namespace primitives::canonical
