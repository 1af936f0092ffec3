// Logits to quads as CUDA threads do it: one pass over memory, in 16-byte accesses.
//
// Launch: a block of threads per token (x) and part of the row (y), a part being num_segments whole
// segments. Phases, with a barrier between: warps take the canonical blocks of the part in turn,
// several at once; warps fold the blocks of each segment; one warp combines the segments.
//
// [Note: lanes and columns] kLanes lanes share a canonical block of 16 rows x 64 columns. A lane
// reads 16 bytes at every step, a row after the other, so its slots are always the same columns,
// which it sums row by row, as the definition asks. Memory need not be aligned: then the lattice of
// 16-byte pieces begins up to a piece before the block, slot i holds column i - past (mod 64), and
// there is a step more. Slots outside the block are -inf, which adds nothing. The fold over columns
// pairs those half of the rest apart, in any rotation the same ones.
#pragma once

#include "canonical/packed.hpp"
#include "vocab_entropy/definition.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int kWarp = 32;

// larger_or_second in one instruction; for a where it does not matter what a NaN gives.
DEVICE_FN float larger(float a, float b) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
#else
  return larger_or_second(a, b);
#endif
}

// clamp_exponent.
DEVICE_FN float clamped(float d) { return larger(-87.5f, d); }

struct PortableExp {
  static DEVICE_FN float of_clamped(float d) { return exp_of_clamped(d); }
};

// ex2 has a relative error of about 2^-22, and a subnormal result is 0.
struct DeviceExp {
  static DEVICE_FN float of_clamped(float d) {
    const float x = d * kLog2E;
#if defined(__CUDA_ARCH__)
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    return x < -126.0f ? 0.0f : __builtin_exp2f(x);
#endif
  }
};

// The elements [first, first + T::kNumel) of p[0, n), and -inf for those outside. aligned: whether
// p + first is a multiple of 16 bytes.
template <class T, class Thread, class Index>
DEVICE_FN Packed load_slots(const Thread& thread, const typename T::Storage* p, Index first,
                            Index n, bool aligned) {
  if (aligned && first >= 0 && first + T::kNumel <= n) {
    return thread.stream(reinterpret_cast<const Packed*>(p + first));
  }
  Packed x = {{T::kMinusInfinity, T::kMinusInfinity, T::kMinusInfinity, T::kMinusInfinity}};
#pragma unroll
  for (int i = 0; i < T::kNumel; i++) {
    if (first + i >= 0 && first + i < n) T::set(&x, i, thread.load(p + first + i));
  }
  return x;
}

// How many elements p lies past a multiple of 16 bytes.
template <class T>
DEVICE_FN int elements_past(const typename T::Storage* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % sizeof(Packed) /
                          sizeof(typename T::Storage));
}

DEVICE_FN int64_t smaller_of(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, class Exp, bool kScaled>
struct Forward {
  using S = typename T::Storage;
  static constexpr int kThreads = 128, kMinBlocks = 4;
  static constexpr int kSlots = T::kNumel;          // of a lane: 8 or 4
  static constexpr int kLanes = kColumns / kSlots;  // of a canonical block: 8 or 16
  static constexpr int kBlocks = kWarp / kLanes;    // canonical blocks that a warp works on
  static constexpr int kSteps = kRows + 1;          // for memory that is not aligned

  Logits logits;
  Labels labels;
  int64_t num_tokens;
  int num_segments;    // of a part
  int segment_blocks;  // canonical blocks of a segment, at most
  float* quads;        // [parts, tokens, 4]

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t token = thread.block_x();
    const int num_blocks = num_segments * segment_blocks;
    const Sums sums{thread.shared(), num_blocks};
    Quad* of_segment = reinterpret_cast<Quad*>(thread.shared());  // the sums are not needed then
    const S* row = static_cast<const S*>(logits.data) + token * logits.row_stride;
    const int warp = thread.index() / kWarp, lane = thread.index() % kWarp;
    for (int i = warp * kBlocks; i < num_blocks; i += kThreads / kWarp * kBlocks) {
      sum_blocks(thread, row, i + lane / kLanes, lane % kLanes, sums);
    }
    thread.sync_block();
    for (int i = warp; i < num_segments; i += kThreads / kWarp) {
      fold_segment(thread, lane, sums.from(i * segment_blocks));
    }
    thread.sync_block();
    if (warp == 0) combine_segments(thread, lane, sums, of_segment);
    if (thread.index() == 0) write(thread, row, token, of_segment[0]);
  }

 private:
  // Of canonical blocks, in shared memory.
  struct Sums {
    float* data;
    int num_blocks;
    DEVICE_FN float& max(int i) const { return data[i]; }
    DEVICE_FN float& sum(int i) const { return data[num_blocks + i]; }
    DEVICE_FN float& weighted(int i) const { return data[2 * num_blocks + i]; }
    DEVICE_FN Sums from(int i) const { return {data + i, num_blocks}; }
  };

  DEVICE_FN int64_t first_segment(int part) const {
    return static_cast<int64_t>(part) * num_segments;
  }

  // Block number `block` of this part by the lanes [0, kLanes) of it; a warp's lanes together.
  template <class Thread>
  DEVICE_FN void sum_blocks(const Thread& thread, const S* row, int block, int lane,
                            const Sums& sums) const {
    const int64_t segment = first_segment(thread.block_y()) + block / segment_blocks;
    const int64_t segment_end = smaller_of((segment + 1) * logits.segment_length, logits.columns);
    const int64_t begin =
        segment * logits.segment_length + int64_t{block % segment_blocks} * kBlock;
    const bool exists = block < sums.num_blocks && begin < segment_end;
    const int length = exists ? static_cast<int>(smaller_of(kBlock, segment_end - begin)) : 0;
    const S* p = row + begin;
    const int past = elements_past<T>(p), first = lane * kSlots - past;

    Packed z[kSteps];
    int num_steps = kRows;
    if (thread.all(past == 0 && length == kBlock)) {
#pragma unroll
      for (int i = 0; i < kRows; i++) {
        z[i] = thread.stream(reinterpret_cast<const Packed*>(p + first + i * kColumns));
      }
    } else {
      num_steps = (past + length + kColumns - 1) / kColumns;
#pragma unroll
      for (int mask = kLanes; mask < kWarp; mask *= 2) {
        const int theirs = thread.shuffle_xor(num_steps, mask);
        num_steps = theirs > num_steps ? theirs : num_steps;
      }
#pragma unroll
      for (int i = 0; i < kSteps; i++) {
        if (i < num_steps) z[i] = load_slots<T>(thread, p, first + i * kColumns, length, true);
      }
    }

    float max = -__builtin_inff();
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      if (i < num_steps) {
#pragma unroll
        for (int j = 0; j < kSlots; j++) {
          max = larger(max, T::widen(T::element(z[i], j)));
        }
      }
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      max = larger(max, thread.shuffle_xor(max, mask));
    }
    max = max + 0.0f;
    const float shift = shift_of(max);

    float sum[kSlots], weighted[kSlots];
#pragma unroll
    for (int j = 0; j < kSlots; j++) {
      sum[j] = 0.0f;
      weighted[j] = -0.0f;  // so that the first addition keeps the sign of its zero
    }
#pragma unroll
    for (int i = 0; i < kSteps; i++) {
      if (i < num_steps) {
#pragma unroll
        for (int j = 0; j < kSlots; j++) {
          float d = T::widen(T::element(z[i], j)) - shift;
          if (kScaled) d = d * logits.scale;
          d = clamped(d);
          const float e = Exp::of_clamped(d);
          sum[j] = sum[j] + e;
          weighted[j] = fma(d, e, weighted[j]);
        }
      }
    }
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {  // columns 32, 16, 8 (and 4) apart
#pragma unroll
      for (int j = 0; j < kSlots; j++) {
        sum[j] = sum[j] + thread.shuffle_xor(sum[j], mask);
        weighted[j] = weighted[j] + thread.shuffle_xor(weighted[j], mask);
      }
    }
#pragma unroll
    for (int half = kSlots / 2; half > 0; half /= 2) {
#pragma unroll
      for (int j = 0; j < half; j++) {
        sum[j] = sum[j] + sum[j + half];
        weighted[j] = weighted[j] + weighted[j + half];
      }
    }
    if (lane == 0 && block < sums.num_blocks) {
      sums.max(block) = max;
      sums.sum(block) = sum[0];
      sums.weighted(block) = weighted[0];
    }
  }

  // The blocks [0, segment_blocks) of sums into the first of them; a warp's lanes together. Blocks
  // that do not exist are (-inf, 0, 0), as the zeros of the definition.
  template <class Thread>
  DEVICE_FN void fold_segment(const Thread& thread, int lane, const Sums& sums) const {
    float max = -__builtin_inff();
    for (int i = lane; i < segment_blocks; i += kWarp) max = larger(sums.max(i), max);
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      max = larger(max, thread.shuffle_xor(max, mask));
    }
    const float shift = shift_of(max);
    for (int i = lane; i < segment_blocks; i += kWarp) {
      const float d = clamp_exponent((sums.max(i) - shift) * logits.scale);
      const float factor = exp_of_clamped(d);
      sums.weighted(i) = fma(d, sums.sum(i), sums.weighted(i)) * factor;
      sums.sum(i) = sums.sum(i) * factor;
    }
    int half = 1;
    while (half < segment_blocks) half *= 2;
    for (int n = segment_blocks; half > 1; n = half) {
      half /= 2;
      thread.sync_warp();
      for (int i = lane; i < half && i + half < n; i += kWarp) {
        sums.sum(i) = sums.sum(i) + sums.sum(i + half);
        sums.weighted(i) = sums.weighted(i) + sums.weighted(i + half);
      }
    }
    thread.sync_warp();
    if (lane == 0) {
      sums.max(0) = max;
      sums.weighted(0) = sums.weighted(0) + 0.0f;
    }
  }

  // The tree over the segments of the part into quads[0]; a warp's lanes together.
  template <class Thread>
  DEVICE_FN void combine_segments(const Thread& thread, int lane, const Sums& sums,
                                  Quad* quads) const {
    Quad quad = empty_quad();
    if (lane < num_segments) {
      const int i = lane * segment_blocks;
      quad = {sums.max(i), sums.sum(i), sums.weighted(i), -__builtin_inff()};
    }
    thread.sync_warp();
    if (lane < num_segments) quads[lane] = quad;
    for (int left = num_segments / 2; left > 0; left /= 2) {
      thread.sync_warp();
      if (lane < left) quad = combine(quads[2 * lane], quads[2 * lane + 1], logits.scale);
      thread.sync_warp();
      if (lane < left) quads[lane] = quad;
    }
  }

  template <class Thread>
  DEVICE_FN void write(const Thread& thread, const S* row, int64_t token, Quad quad) const {
    const int64_t segment = first_segment(thread.block_y());
    const int64_t begin = segment * logits.segment_length;
    const int64_t end =
        smaller_of((segment + num_segments) * logits.segment_length, logits.columns);
    const int64_t target = target_column(labels, token);
    if (target >= begin && target < end) quad.target = T::widen(thread.load(row + target));
    Packed packed;
    memcpy(&packed, &quad, sizeof quad);
    thread.store(reinterpret_cast<Packed*>(quads) + thread.block_y() * num_tokens + token, packed);
  }
};

}  // namespace
}  // namespace primitives::vocab_entropy
