// Logits to quads: one pass over memory.
//
// While the exponentials of one block are computed from the first-level cache, the next block is
// fetched: widened to float32, its maximum taken, and the memory beyond it prefetched.
//
// [Note: prefetch] Arithmetic takes about as long as memory, and what a core looks ahead by itself
// is full of arithmetic: only what is fetched ahead by instruction lets them overlap. Without it
// Zen 5 takes 1.4 (bfloat16: 1.6) times as long. But Zen 4 reads a third faster without, its own
// prefetchers being in the way of ours.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/scratch.hpp"
#include "vocab_entropy/definition.hpp"
#include "vocab_entropy/group.hpp"
#include "vocab_entropy/kernels.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kVectors = kColumns / kWidth;  // of a row of a block
constexpr int kPrefetchNbytes = 8192;

CANONICAL_FN float fold_lanes_max(Vec x) {
#pragma GCC unroll 8
  for (int half = kWidth / 2; half > 0; half /= 2) {
    x = larger_or_second(x, __builtin_shuffle(x, lane_numbers() ^ half));
  }
  return x[0];
}

// x[i] + x[i + half], half and half again.
CANONICAL_FN float fold_lanes(Vec x) {
#pragma GCC unroll 8
  for (int half = kWidth / 2; half > 0; half /= 2) {
    x = x + __builtin_shuffle(x, lane_numbers() ^ half);
  }
  return x[0];
}

CANONICAL_FN float fold_columns(Vec x[kVectors]) {
#pragma GCC unroll 8
  for (int half = kVectors / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < half; i++) x[i] = x[i] + x[i + half];
  }
  return fold_lanes(x[0]);
}

// A block in reach of the first-level cache: length elements as float32, and -inf up to a whole
// row.
struct Staged {
  const float* z;
  int length;
  Vec largest;  // lane by lane
};

template <class T>
inline Staged stage(const typename T::Storage* z, int length, float* buffer) {
  const Vec minus_infinity = set<Vec>(-__builtin_inff());
  Vec largest = minus_infinity;
  for_lanes(length, [&](int64_t i, auto lanes) {
    const Vec x = select(first_lanes(lanes), load<T>(z + i, lanes), minus_infinity);
    store_raw(buffer + i, x);
    largest = larger_or_second(largest, x);
  });
  for (int i = (length + kWidth - 1) / kWidth * kWidth; i % kColumns != 0; i += kWidth) {
    store_raw(buffer + i, minus_infinity);
  }
  return {buffer, length, largest};
}

// Stages a whole block step by step, a group of vectors at each step.
template <class T>
struct Stager {
  const typename T::Storage* source;
  float* buffer;
  bool prefetch;
  Vec largest = set<Vec>(-__builtin_inff());
  int at = 0;

  // float32 stays where it is.
  static constexpr bool kInPlace = sizeof(typename T::Storage) == 4;

  CANONICAL_FN void step() {
    constexpr int kNumel = kGroup * kWidth, kLine = 64 / sizeof(typename T::Storage);
    const Group x = load_group<T>(source + at);
    if (!kInPlace) {
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; j++) store_raw(buffer + at + j * kWidth, x.v[j]);
    }
    largest = larger_or_second(largest, larger_or_second(larger_or_second(x.v[0], x.v[1]),
                                                         larger_or_second(x.v[2], x.v[3])));
    if (prefetch) {
#pragma GCC unroll 4
      for (int i = 0; i < kNumel; i += kLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(source + at + i) + kPrefetchNbytes);
      }
    }
    at += kNumel;
  }

  CANONICAL_FN Staged staged() const {
    if constexpr (kInPlace) return {source, kBlock, largest};
    return {buffer, kBlock, largest};
  }
};

struct NoStager {
  CANONICAL_FN void step() {}
};

struct Sums {
  float sum, weighted;
};

// Rows that are -inf throughout would add +0 and -0, which change nothing: they are left out.
template <bool kScaled, class StagerOfNext>
CANONICAL_FN Sums sums_of_block(const float* z, int num_rows, float shift, float scale,
                                StagerOfNext& next) {
  Vec sums[kVectors], weighted[kVectors];
#pragma GCC unroll 4
  for (int column = 0; column < kVectors; column += kGroup) {
    // -0, so that the first addition keeps the sign of its zero.
    Group s = set<Group>(0.0f), t = set<Group>(-0.0f);
    const float* row = z + column * kWidth;
#pragma GCC unroll 1
    for (int r = 0; r < num_rows; r++, row += kColumns) {
      Group d = load_group<Float32>(row) - shift;
      if (kScaled) d = d * scale;
      d = clamp_exponent(d);
      const Group e = exp_of_clamped(d);
      s = s + e;
      t = fma(d, e, t);
      next.step();
    }
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; j++) {
      sums[column + j] = s.v[j];
      weighted[column + j] = t.v[j];
    }
  }
  return {fold_columns(sums), fold_columns(weighted)};
}

// The maxima and sums of a segment's blocks, and what they come to.
class BlockSums {
 public:
  explicit BlockSums(int64_t max_blocks) : room_(padded(max_blocks)), scratch_(3 * room_) {}

  void add(float max, Sums sums) {
    maxima()[num_blocks_] = max;
    this->sums()[num_blocks_] = sums.sum;
    weighted()[num_blocks_] = sums.weighted;
    num_blocks_++;
  }

  // The segment's quad; forgets its blocks.
  Quad take(float scale) {
    const int64_t padded_blocks = padded(num_blocks_);
    float max = -__builtin_inff();
    for (int64_t i = 0; i < num_blocks_; i++) max = larger_or_second(maxima()[i], max);
    for (int64_t i = num_blocks_; i < padded_blocks; i++) {
      maxima()[i] = -__builtin_inff();
      sums()[i] = weighted()[i] = 0.0f;
    }
    const float shift = shift_of(max);
    for (int64_t i = 0; i < padded_blocks; i += kWidth) {
      const Vec d = clamp_exponent((load<Float32>(maxima() + i) - shift) * scale);
      const Vec factor = exp_of_clamped(d);
      const Vec sum = load<Float32>(sums() + i);
      store_raw(weighted() + i, fma(d, sum, load<Float32>(weighted() + i)) * factor);
      store_raw(sums() + i, sum * factor);
    }
    num_blocks_ = 0;
    return {max, fold(sums(), padded_blocks), fold(weighted(), padded_blocks) + 0.0f,
            -__builtin_inff()};
  }

 private:
  // A power of two of whole vectors; zeros added to a sum change nothing.
  static int64_t padded(int64_t num_blocks) {
    int64_t result = kWidth;
    while (result < num_blocks) result *= 2;
    return result;
  }

  static float fold(float* x, int64_t n) {
    for (int64_t half = n / 2; half >= kWidth; half /= 2) {
      for (int64_t i = 0; i < half; i += kWidth) {
        store_raw(x + i, load<Float32>(x + i) + load<Float32>(x + i + half));
      }
    }
    return fold_lanes(load<Float32>(x));
  }

  float* maxima() { return scratch_.data(); }
  float* sums() { return scratch_.data() + room_; }
  float* weighted() { return scratch_.data() + 2 * room_; }

  int64_t room_, num_blocks_ = 0;
  Scratch scratch_;
};

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, bool kScaled>
inline Quad quad_of_row(const typename T::Storage* row, const Logits& of, BlockSums& blocks) {
  alignas(64) float buffers[2][kBlock];
  Quad quads[kNumSegments];
  const int64_t first_end = smaller(of.segment_length, of.columns);
  Staged now = stage<T>(row, static_cast<int>(smaller(kBlock, first_end)), buffers[0]);
  int64_t begin = 0, num_staged = 1;
  for (int segment = 0; segment < of.num_segments; segment++) {
    const int64_t end = smaller((segment + 1) * of.segment_length, of.columns);
    if (begin >= end) {
      quads[segment] = empty_quad();
      continue;
    }
    while (begin < end) {
      const float max = fold_lanes_max(now.largest) + 0.0f, shift = shift_of(max);
      const int num_rows = (now.length + kColumns - 1) / kColumns;
      begin += now.length;
      // The next block begins where this one ends, be it in this segment or in the next one.
      const int64_t next_end = begin < end ? end : smaller(end + of.segment_length, of.columns);
      const int length = static_cast<int>(smaller(kBlock, next_end - begin));
      float* buffer = buffers[num_staged++ % 2];
      if (length == kBlock && num_rows == kRows) {
        Stager<T> next{row + begin, buffer, of.prefetch};
        blocks.add(max, sums_of_block<kScaled>(now.z, kRows, shift, of.scale, next));
        now = next.staged();
      } else {
        NoStager none;
        blocks.add(max, sums_of_block<kScaled>(now.z, num_rows, shift, of.scale, none));
        if (length > 0) now = stage<T>(row + begin, length, buffer);
      }
    }
    quads[segment] = blocks.take(of.scale);
  }
  return tree_of_quads(quads, of.num_segments, of.scale);
}

inline void forward(const Logits& logits, const Labels& labels, int64_t begin, int64_t end,
                    float* quads) {
  BlockSums blocks((logits.segment_length + kBlock - 1) / kBlock);
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t token = begin; token < end; token++) {
      const auto* row =
          static_cast<const typename T::Storage*>(logits.data) + token * logits.row_stride;
      Quad quad = logits.scale == 1.0f ? quad_of_row<T, false>(row, logits, blocks)
                                       : quad_of_row<T, true>(row, logits, blocks);
      const int64_t target = target_column(labels, token);
      if (target >= 0 && target < logits.columns) {
        quad.target = load<T>(row + target, 1)[0];
      }
      memcpy(quads + 4 * token, &quad, sizeof quad);
    }
  });
}

inline void finish(const float* shards, int64_t rank_stride, int num_ranks, const Labels& labels,
                   float scale, int64_t begin, int64_t end, float* quads, float* entropy,
                   float* log_prob, float* log_sum_exp) {
  for (int64_t token = begin; token < end; token++) {
    Quad of_rank[kNumSegments];
    for (int rank = 0; rank < num_ranks; rank++) {
      memcpy(&of_rank[rank], shards + rank * rank_stride + 4 * token, sizeof(Quad));
    }
    const Quad quad = canonical_quad(tree_of_quads(of_rank, num_ranks, scale));
    const Result result = result_of(quad, scale);
    memcpy(quads + 4 * token, &quad, sizeof quad);
    entropy[token] = result.entropy;
    log_prob[token] = has_target(labels, token) ? result.log_prob : 0.0f;
    log_sum_exp[token] = result.log_sum_exp;
  }
}

}  // namespace
}  // namespace primitives::vocab_entropy
