// Logits to quads: one pass over memory.
//
// While the exponentials of one block are computed, the largest element of the block after the next
// is found, so that the next one's is long known when it is needed, and the memory beyond that is
// prefetched.
//
// [Note: prefetch] Arithmetic takes about as long as memory, and what a core looks ahead by itself
// is full of arithmetic: only what is fetched ahead by instruction lets them overlap. Without it
// Zen 5 takes twice as long. But Zen 4 reads a third faster without, its own prefetchers being in
// the way of ours. Logits are read once: they go past the second-level cache, so that what comes
// next finds there what it left.
//
// [Note: two halves] An exponential is a chain of some 50 cycles. A core that looks for work among
// a hundred instructions that wait finds only two such chains a unit, and its units idle. So the
// first half of the chain of a vector stands beside the second half of that of the vector above it.
#pragma once

#include "canonical/dispatch.hpp"
#include "vocab_entropy/block_sums.hpp"
#include "vocab_entropy/columns.hpp"
#include "vocab_entropy/definition.hpp"
#include "vocab_entropy/kernels.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kPrefetchNbytes = 12288;

CANONICAL_FN float fold_lanes_max(Vec x) {
#pragma GCC unroll 8
  for (int half = kWidth / 2; half > 0; half /= 2) {
    x = larger_or_second(x, __builtin_shuffle(x, lane_numbers() ^ half));
  }
  return x[0];
}

// kRows whole rows, or what is left of a segment.
template <class T>
struct Block {
  const typename T::Storage* data;
  int length;
};

// The largest element of a block, a group of vectors at each step.
template <class T>
class Largest {
 public:
  Largest(const Block<T>& block, bool prefetch) : block_(block), prefetch_(prefetch) {}

  CANONICAL_FN bool more() const { return at_ + kGroupNumel <= block_.length; }

  CANONICAL_FN void step() {
    constexpr int kLine = 64 / sizeof(typename T::Storage);
    const auto* const p = block_.data + at_;
    Vec x = load_vector<T>(p, 0);
#pragma GCC unroll 4
    for (int j = 1; j < kGroup; j++) x = larger_or_second(x, load_vector<T>(p, j));
    largest_ = larger_or_second(largest_, x);
    if (prefetch_) {
#pragma GCC unroll 4
      for (int i = 0; i < kGroupNumel; i += kLine) {
        __builtin_prefetch(reinterpret_cast<const char*>(p + i) + kPrefetchNbytes, 0, 0);
      }
    }
    at_ += kGroupNumel;
  }

  CANONICAL_FN void finish() {
    while (more()) step();
    for_lanes(block_.length - at_, [&](int64_t i, auto lanes) {
      const Vec x = load<T>(block_.data + at_ + i, lanes);
      largest_ = larger_or_second(largest_, select(first_lanes(lanes), x, largest_));
    });
  }

  const Block<T>& block() const { return block_; }
  CANONICAL_FN float value() const { return fold_lanes_max(largest_) + 0.0f; }

 private:
  Block<T> block_;
  bool prefetch_;  // see [Note: prefetch]
  int at_ = 0;
  Vec largest_ = set<Vec>(-__builtin_inff());
};

// The sums of a block, while the largest element of `next` is found. See [Note: two halves].
template <class T, bool kScaled>
CANONICAL_FN Sums sums_of_block(const Block<T>& block, float shift, float scale, Largest<T>& next) {
  using S = typename T::Storage;
  const int num_whole_rows = block.length / kColumns;
  const int num_rows = (block.length + kColumns - 1) / kColumns;
  alignas(64) S last[kColumns];  // a row that is not whole, and -inf
  if (num_whole_rows < num_rows) {
    for (int i = 0; i < kColumns; i += kWidth) {
      T::store_number(last + i, set<Vec>(-__builtin_inff()));
    }
    memcpy(last, block.data + num_whole_rows * kColumns,
           sizeof(S) * static_cast<unsigned>(block.length % kColumns));
  }
  Vec sums[kVectors], weighted[kVectors];
  const Vec shifts = set<Vec>(shift);
#pragma GCC unroll 8
  for (int column = 0; column < kVectors; column += kGroup) {
    Vec s[kGroup], t[kGroup], d[kGroup];
    ReducedExponent<Vec> reduced[kGroup];
    const auto begin = [&](const S* row, int j) __attribute__((always_inline)) {
      Vec x = load_vector<T>(row + column * kWidth, j) - shifts;
      if (kScaled) x = x * scale;
      d[j] = clamp_exponent(x);
      reduced[j] = reduce_exponent(d[j]);
    };
    const auto end = [&](int j) __attribute__((always_inline)) {
      const Vec e = exp_of_reduced(reduced[j]);
      s[j] = s[j] + e;
      t[j] = fma(d[j], e, t[j]);
    };
    const S* row = num_whole_rows > 0 ? block.data : last;
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; j++) {
      // -0, so that the first addition keeps the sign of its zero.
      s[j] = set<Vec>(0.0f);
      t[j] = set<Vec>(-0.0f);
      begin(row, j);
    }
#pragma GCC unroll 1
    for (int r = 1; r < num_rows; r++) {
      row = r < num_whole_rows ? row + kColumns : last;
#pragma GCC unroll 4
      for (int j = 0; j < kGroup; j++) {
        end(j);
        begin(row, j);
      }
      if (__builtin_expect(next.more(), 1)) next.step();
    }
#pragma GCC unroll 4
    for (int j = 0; j < kGroup; j++) {
      end(j);
      sums[column + j] = s[j];
      weighted[column + j] = t[j];
    }
    if (__builtin_expect(next.more(), 1)) next.step();
  }
  put_columns_in_order<T>(sums);
  put_columns_in_order<T>(weighted);
  return {fold_columns(sums), fold_columns(weighted)};
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The blocks of the rows [begin, end), one after the other; empty ones behind the last.
template <class T>
class Blocks {
 public:
  Blocks(const Logits& of, int64_t begin, int64_t end)
      : of_(of),
        row_(static_cast<const typename T::Storage*>(of.data) + begin * of.row_stride),
        rows_left_(end - begin),
        end_(first_end()) {}

  Block<T> take() {
    if (begin_ == of_.columns && rows_left_ > 1) {
      row_ += of_.row_stride;
      rows_left_--;
      begin_ = 0;
      end_ = first_end();
    }
    const Block<T> block{row_ + begin_, static_cast<int>(smaller(kBlock, end_ - begin_))};
    begin_ += block.length;
    if (begin_ == end_) end_ = smaller(end_ + of_.segment_length, of_.columns);
    return block;
  }

 private:
  int64_t first_end() const { return smaller(of_.segment_length, of_.columns); }

  const Logits& of_;
  const typename T::Storage* row_;
  int64_t rows_left_, begin_ = 0;  // of the next block, in its row
  int64_t end_;                    // of its segment
};

template <class T, bool kScaled>
inline void quads_of_rows(const Logits& of, int64_t begin, int64_t end, float* quads) {
  BlockSums sums((of.segment_length + kBlock - 1) / kBlock);
  Blocks<T> blocks(of, begin, end);
  Block<T> now = blocks.take();
  Largest<T> of_now(now, of.prefetch), of_next(blocks.take(), of.prefetch);
  of_now.finish();
  of_next.finish();
  float max = of_now.value();
  for (int64_t token = begin; token < end; token++) {
    sums.clear();
    int64_t column = 0;
    for (int segment = 0; segment < of.num_segments; segment++) {
      const int64_t segment_end = smaller((segment + 1) * of.segment_length, of.columns);
      for (int64_t i = 0; column < segment_end; i++) {
        const Block<T> next = of_next.block();
        const float next_max = of_next.value();
        of_next = Largest<T>(blocks.take(), of.prefetch);
        sums.add(segment, i, max, sums_of_block<T, kScaled>(now, shift_of(max), of.scale, of_next));
        of_next.finish();
        column += now.length;
        now = next;
        max = next_max;
      }
    }
    const Quad quad = sums.quad(of.num_segments, of.scale);
    memcpy(quads + 4 * token, &quad, sizeof quad);
  }
}

inline void forward(const Logits& logits, const Labels& labels, int64_t begin, int64_t end,
                    float* quads) {
  if (begin == end) return;
  with_dtype(logits.dtype, [&](auto type) {
    using T = decltype(type);
    if (logits.scale == 1.0f) {
      quads_of_rows<T, false>(logits, begin, end, quads);
    } else {
      quads_of_rows<T, true>(logits, begin, end, quads);
    }
    for (int64_t token = begin; token < end; token++) {
      const int64_t target = target_column(labels, token);
      if (target < 0 || target >= logits.columns) continue;
      const auto* row =
          static_cast<const typename T::Storage*>(logits.data) + token * logits.row_stride;
      quads[4 * token + 3] = load<T>(row + target, 1)[0];
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
