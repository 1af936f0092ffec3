// From the sums over the columns of each block to the quad of a row.
#pragma once

#include "canonical/scratch.hpp"
#include "vocab_entropy/columns.hpp"
#include "vocab_entropy/definition.hpp"

namespace primitives::vocab_entropy {
namespace {

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

struct Sums {
  float sum, weighted;
};

// The maxima and sums of a row's blocks, and what they come to: all segments at once, each in a
// lane of its own.
class BlockSums {
 public:
  explicit BlockSums(int64_t max_blocks)
      : num_blocks_(power_of_two(max_blocks)), scratch_(3 * num_blocks_ * kNumSegments) {}

  // Forgets all blocks.
  void clear() {
    for (int64_t i = 0; i < num_blocks_ * kNumSegments; i += kWidth) {
      store_raw(maxima() + i, set<Vec>(-__builtin_inff()));
      store_raw(sums() + i, Vec{});
      store_raw(weighted() + i, Vec{});
    }
  }

  void add(int segment, int64_t block, float max, Sums sums) {
    const int64_t i = block * kNumSegments + segment;
    maxima()[i] = max;
    this->sums()[i] = sums.sum;
    weighted()[i] = sums.weighted;
  }

  // The quad of the first num_segments segments, a power of two of them.
  Quad quad(int num_segments, float scale) {
    alignas(64) float max[2 * kNumSegments] = {}, sum[2 * kNumSegments] = {},
                              weighted[2 * kNumSegments] = {};
    for (int lane = 0; lane < num_segments; lane += kWidth) {
      put(of_segments(lane, scale), lane, max, sum, weighted);
    }
    for (int left = num_segments / 2; left > 0; left /= 2) {
      for (int i = 0; i < left; i += kWidth) {
        const auto pair = [i](const float* x, auto lanes_of) __attribute__((always_inline)) {
          return lanes_of(load<Float32>(x + 2 * i), load<Float32>(x + 2 * i + kWidth));
        };
        const Triple<Vec> even{pair(max, even_lanes), pair(sum, even_lanes),
                               pair(weighted, even_lanes)};
        const Triple<Vec> odd{pair(max, odd_lanes), pair(sum, odd_lanes),
                              pair(weighted, odd_lanes)};
        put(combine(even, odd, scale), i, max, sum, weighted);
      }
    }
    return {max[0], sum[0], weighted[0], -__builtin_inff()};
  }

 private:
  static CANONICAL_FN void put(const Triple<Vec>& x, int at, float* max, float* sum,
                               float* weighted) {
    store_raw(max + at, x.max);
    store_raw(sum + at, x.sum);
    store_raw(weighted + at, x.weighted);
  }

  static CANONICAL_FN void add_to(float* x, const float* y) {
    store_raw(x, load<Float32>(x) + load<Float32>(y));
  }

  // Of the kWidth segments from the first one on.
  Triple<Vec> of_segments(int first, float scale) {
    const auto at = [first](float* x, int64_t block) { return x + block * kNumSegments + first; };
    Vec max = set<Vec>(-__builtin_inff());
    for (int64_t i = 0; i < num_blocks_; i++) {
      max = larger_or_second(load<Float32>(at(maxima(), i)), max);
    }
    const Vec shift = shift_of(max);
    for (int64_t i = 0; i < num_blocks_; i++) {
      const Vec d = clamp_exponent((load<Float32>(at(maxima(), i)) - shift) * scale);
      const Vec factor = exp_of_clamped(d), sum = load<Float32>(at(sums(), i));
      store_raw(at(weighted(), i), fma(d, sum, load<Float32>(at(weighted(), i))) * factor);
      store_raw(at(sums(), i), sum * factor);
    }
    for (int64_t half = num_blocks_ / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; i++) {
        add_to(at(sums(), i), at(sums(), i + half));
        add_to(at(weighted(), i), at(weighted(), i + half));
      }
    }
    return {max, load<Float32>(at(sums(), 0)), load<Float32>(at(weighted(), 0)) + 0.0f};
  }

  // At least n; zeros added to a sum change nothing.
  static int64_t power_of_two(int64_t n) {
    int64_t result = 1;
    while (result < n) result *= 2;
    return result;
  }

  float* maxima() { return scratch_.data(); }
  float* sums() { return scratch_.data() + num_blocks_ * kNumSegments; }
  float* weighted() { return scratch_.data() + 2 * num_blocks_ * kNumSegments; }

  int64_t num_blocks_;  // of a segment: a power of two
  Scratch scratch_;
};

}  // namespace
}  // namespace primitives::vocab_entropy
