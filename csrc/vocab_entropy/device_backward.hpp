// Quads to results, and logits and quads to gradients, as CUDA threads do it.
#pragma once

#include "vocab_entropy/device_forward.hpp"

namespace primitives::vocab_entropy {
namespace {

// The quads [num_runs, tokens, 4] of neighbouring runs of the vocabulary in one: a thread per
// token.
struct Combine {
  static constexpr int kThreads = 128, kMinBlocks = 1;

  const float* runs;
  int64_t stride;  // between runs
  int num_runs;    // a power of two, at most kNumSegments
  float scale;
  int64_t num_tokens;
  float* quads;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t token = int64_t{thread.block_x()} * kThreads + thread.index();
    if (token < num_tokens) store(thread, token, combined(thread, token));
  }

  template <class Thread>
  DEVICE_FN Quad combined(const Thread& thread, int64_t token) const {
    Quad of_run[kNumSegments];
    for (int i = 0; i < num_runs; i++) {
      const Packed packed =
          thread.load(reinterpret_cast<const Packed*>(runs + i * stride + 4 * token));
      memcpy(&of_run[i], &packed, sizeof packed);
    }
    return tree_of_quads(of_run, num_runs, scale);
  }

  template <class Thread>
  DEVICE_FN void store(const Thread& thread, int64_t token, const Quad& quad) const {
    Packed packed;
    memcpy(&packed, &quad, sizeof quad);
    thread.store(reinterpret_cast<Packed*>(quads) + token, packed);
  }
};

// The same of all ranks, and the results of each token.
struct Finish {
  static constexpr int kThreads = Combine::kThreads, kMinBlocks = 1;

  Combine of_ranks;
  Labels labels;
  float *entropy, *log_prob, *log_sum_exp;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t token = int64_t{thread.block_x()} * kThreads + thread.index();
    if (token >= of_ranks.num_tokens) return;
    const Quad quad = canonical_quad(of_ranks.combined(thread, token));
    const Result result = result_of(quad, of_ranks.scale);
    of_ranks.store(thread, token, quad);
    thread.store(entropy + token, result.entropy);
    thread.store(log_prob + token, has_target(labels, token) ? result.log_prob : 0.0f);
    thread.store(log_sum_exp + token, result.log_sum_exp);
  }
};

// Launch: blocks of threads over (token, run of kThreads * kPieces pieces of 16 bytes of its row).
// The pieces are aligned in the output; where the logits lie otherwise they are read one by one. A
// thread reads all it writes before, so the output may be the logits.
template <class T, class Exp, bool kScaled>
struct Backward {
  using S = typename T::Storage;
  static constexpr int kThreads = 256, kMinBlocks = 4;
  static constexpr int kPieces = 4;         // of a thread
  static constexpr int kSlots = T::kNumel;  // of a piece
  static constexpr int kSharedNbytes = 64;

  Logits logits;
  Labels labels;
  const float* quads;
  Gradients gradients;
  S* out;
  int64_t out_stride;
  int blocks_per_row;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t token = thread.block_x() / blocks_per_row, n = logits.columns;
    const S* z = static_cast<const S*>(logits.data) + token * logits.row_stride;
    S* row = out + token * out_stride;
    const int past = elements_past<T>(row);
    const bool aligned = elements_past<T>(z) == past;
    const int64_t begin = int64_t{thread.block_x() % blocks_per_row} * (kThreads * kPieces);
    const auto first_of = [&](int i) {
      return (begin + i * kThreads + thread.index()) * kSlots - past;
    };

    Packed x[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; i++) x[i] = load_slots<T>(thread, z, first_of(i), n, aligned);

    RowSlope* shared = reinterpret_cast<RowSlope*>(thread.shared());
    if (thread.index() == 0) *shared = slope_of_token(thread, token);
    thread.sync_block();
    const RowSlope slope = *shared;

#pragma unroll
    for (int i = 0; i < kPieces; i++) {
      const int64_t first = first_of(i);
      if (first < n) store_slots(thread, row, first, n, gradients_of(x[i], slope, first), slope);
    }
  }

 private:
  struct RowSlope {
    Slope slope;
    int64_t target;  // among this rank's columns, or not
    bool zero;       // whatever the logits
    bool numbers;    // no gradient can be NaN
  };

  static_assert(sizeof(RowSlope) <= kSharedNbytes);

  struct Values {
    float x[kSlots];
  };

  template <class Thread>
  DEVICE_FN RowSlope slope_of_token(const Thread& thread, int64_t token) const {
    const auto at = [&](const float* gradient) {
      return gradient == nullptr ? 0.0f : thread.load(gradient + token);
    };
    const Upstream upstream{at(gradients.entropy),
                            has_target(labels, token) ? at(gradients.log_prob) : 0.0f,
                            at(gradients.log_sum_exp)};
    const Packed packed = thread.load(reinterpret_cast<const Packed*>(quads) + token);
    Quad quad;
    memcpy(&quad, &packed, sizeof quad);
    const Slope slope = slope_of(quad, upstream, logits.scale);
    const bool zero =
        upstream.entropy == 0.0f && upstream.log_prob == 0.0f && upstream.log_sum_exp == 0.0f;
    return {slope, target_column(labels, token), zero, gives_numbers(slope)};
  }

  DEVICE_FN Values gradients_of(const Packed& z, const RowSlope& row, int64_t first) const {
    Values values;
#pragma unroll
    for (int j = 0; j < kSlots; j++) {
      float d = T::widen(T::element(z, j)) - row.slope.shift;
      if (kScaled) d = d * logits.scale;
      d = clamped(d);
      values.x[j] = Exp::of_clamped(d) * fma(row.slope.b, d, row.slope.a);
    }
    if (row.target >= first && row.target < first + kSlots) {
#pragma unroll
      for (int j = 0; j < kSlots; j++) {
        if (row.target == first + j) values.x[j] = values.x[j] + row.slope.at_target;
      }
    }
    return values;
  }

  template <class Thread>
  DEVICE_FN void store_slots(const Thread& thread, S* row, int64_t first, int64_t n,
                             const Values& values, const RowSlope& slope) const {
    Packed y;
    if (slope.zero) {
      y = {{0, 0, 0, 0}};
    } else if (slope.numbers) {
      y = T::narrow_numbers(values.x);
    } else {
#pragma unroll
      for (int j = 0; j < kSlots; j++) T::set(&y, j, T::narrow(values.x[j]));
    }
    if (first >= 0 && first + kSlots <= n) {
      thread.stream(reinterpret_cast<Packed*>(row + first), y);
      return;
    }
#pragma unroll
    for (int j = 0; j < kSlots; j++) {
      if (first + j >= 0 && first + j < n) thread.store(row + first + j, T::element(y, j));
    }
  }
};

}  // namespace
}  // namespace primitives::vocab_entropy
