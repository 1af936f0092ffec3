// C = A B with every output element one sequential fma chain over k from +0.
//
// Launch: a block of threads per kTile x kTile elements of C. A thread holds kChains x kChains
// chains in registers, in groups of 4 x 4. kSteps steps of k of A and B lie in shared memory as
// float32, step by step, while the next ones are on their way into registers.
#pragma once

#include "canonical/cuda/elements.hpp"

namespace primitives::canonical {
namespace {

struct alignas(16) Four {
  float x[4];
};

// A or B: `extent` lines (rows of A, columns of B) of k elements.
struct Operand {
  Input x;
  int64_t batch_stride, row_stride, extent;
  bool k_adjacent;  // steps of k lie side by side; else the lines do
};

template <int kTile_, int kChains>
struct GemmKernel {
  static constexpr int kTile = kTile_;
  static constexpr int kSide = kTile / kChains, kThreads = kSide * kSide, kMinBlocks = 1;
  static constexpr int kGroups = kChains / 4;
  static constexpr int kSteps = 16, kFetched = kTile * kSteps / kThreads;
  static constexpr int kStride = kTile + 4;  // of a step; spreads the banks
  static constexpr int64_t kSharedNbytes = 4 * 2 * kSteps * kStride;

  Operand a, b;
  Input bias;
  Output out;
  int64_t k, bias_batch_stride, tiles_m, tiles_n;
  float alpha;

  // Which line and step of a tile element number e is; neighbours in memory have neighbours.
  static DEVICE_FN int line_of(const Operand& from, int e) {
    return from.k_adjacent ? e / kSteps : e % kTile;
  }
  static DEVICE_FN int step_of(const Operand& from, int e) {
    return from.k_adjacent ? e % kSteps : e / kTile;
  }

  // This thread's elements of the steps [begin, begin + kSteps); zeros outside.
  template <class Thread>
  DEVICE_FN void fetch(const Thread& thread, const Operand& from, int64_t batch, int64_t first_line,
                       int64_t begin, float fetched[kFetched]) const {
#pragma unroll
    for (int i = 0; i < kFetched; i++) {
      const int e = thread.index() + i * kThreads;
      const int64_t line = first_line + line_of(from, e), step = begin + step_of(from, e);
      const int64_t place =
          from.k_adjacent ? line * from.row_stride + step : step * from.row_stride + line;
      const bool exists = line < from.extent && step < k;
      fetched[i] = exists ? load_any(thread, from.x, batch * from.batch_stride + place) : 0.0f;
    }
  }

  template <class Thread>
  DEVICE_FN void keep(const Thread& thread, const Operand& from, const float fetched[kFetched],
                      float* shared) const {
#pragma unroll
    for (int i = 0; i < kFetched; i++) {
      const int e = thread.index() + i * kThreads;
      shared[step_of(from, e) * kStride + line_of(from, e)] = fetched[i];
    }
  }

  // Where the thread's line i lies in a tile.
  static DEVICE_FN int line_in_tile(int place, int i) {
    return i / 4 * (kTile / kGroups) + place * 4 + i % 4;
  }

  // kChains elements of a step.
  static DEVICE_FN void load_lines(const float* step, int place, float x[kChains]) {
#pragma unroll
    for (int i = 0; i < kChains; i += 4) {
      const Four four = *reinterpret_cast<const Four*>(step + line_in_tile(place, i));
#pragma unroll
      for (int j = 0; j < 4; j++) x[i + j] = four.x[j];
    }
  }

  static DEVICE_FN void advance(const float* a_step, const float* b_step, int row, int column,
                                float chains[kChains][kChains]) {
    float x[kChains], y[kChains];
    load_lines(a_step, row, x);
    load_lines(b_step, column, y);
#pragma unroll
    for (int i = 0; i < kChains; i++) {
#pragma unroll
      for (int j = 0; j < kChains; j++) chains[i][j] = fma(x[i], y[j], chains[i][j]);
    }
  }

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t tile = thread.block_x();
    const int64_t batch = tile / (tiles_m * tiles_n);
    const int64_t first_row = tile / tiles_n % tiles_m * kTile,
                  first_column = tile % tiles_n * kTile;
    const int row = thread.index() / kSide, column = thread.index() % kSide;
    float* a_steps = thread.shared();
    float* b_steps = a_steps + kSteps * kStride;
    float chains[kChains][kChains] = {};
    float a_next[kFetched], b_next[kFetched];
    fetch(thread, a, batch, first_row, 0, a_next);
    fetch(thread, b, batch, first_column, 0, b_next);
    for (int64_t begin = 0; begin < k; begin += kSteps) {
      keep(thread, a, a_next, a_steps);
      keep(thread, b, b_next, b_steps);
      thread.sync_block();
      fetch(thread, a, batch, first_row, begin + kSteps, a_next);
      fetch(thread, b, batch, first_column, begin + kSteps, b_next);
      if (begin + kSteps <= k) {
#pragma unroll
        for (int s = 0; s < kSteps; s++) {
          advance(a_steps + s * kStride, b_steps + s * kStride, row, column, chains);
        }
      } else {  // a step of zeros would turn a chain of -0 into +0
        for (int s = 0; s < static_cast<int>(k - begin); s++) {
          advance(a_steps + s * kStride, b_steps + s * kStride, row, column, chains);
        }
      }
      thread.sync_block();
    }
#pragma unroll
    for (int i = 0; i < kChains; i++) {
      const int64_t m = first_row + line_in_tile(row, i);
#pragma unroll
      for (int j = 0; j < kChains; j++) {
        const int64_t n = first_column + line_in_tile(column, j);
        if (m >= a.extent || n >= b.extent) continue;
        float y = chains[i][j];
        if (alpha != 1.0f) y = y * alpha;
        if (bias.data != nullptr) y = y + load_any(thread, bias, batch * bias_batch_stride + n);
        store_any(thread, out, (batch * a.extent + m) * b.extent + n, y);
      }
    }
  }
};

}  // namespace
}  // namespace primitives::canonical
