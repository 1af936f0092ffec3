// C = A B with every output element one sequential fma chain over k from +0, whatever the blocking.
//
// A block of kKc steps of k is packed as float32: B in panels of kNr columns, A in panels of kMr
// rows. The micro kernel keeps a kMr x kNr tile of chains in registers. When k has several blocks,
// the chains wait between them in float32 scratch, which is exact. Alpha, bias and the one rounding
// come at the end.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/scratch.hpp"
#include "canonical/simd.hpp"

namespace primitives::canonical {
namespace {

// Tile: as many chains as the registers hold (32 vectors in AVX-512, 16 else), enough to hide fma
// latency.
constexpr int kMr = kWidth == 16 ? 12 : 4;
constexpr int kNv = kWidth == 16 ? 2 : 3;
constexpr int kNr = kNv * kWidth;
constexpr int64_t kKc = 256;
constexpr int64_t kMc = 16 * kMr;
constexpr int64_t kNc = 10 * kNr;
// Rows of an A panel stored row by row; the odd line keeps them out of one cache set.
constexpr int64_t kARow = kKc + 16;

// A panel element (i, k): row by row, or step by step for a transposed A, as the source is
// contiguous.
template <bool kTransposed>
CANONICAL_FN float a_element(const float* panel, int i, int64_t k) {
  return kTransposed ? panel[k * kMr + i] : panel[i * kARow + k];
}

template <int kVectors, bool kTransposed>
CANONICAL_FN void advance_chains(int64_t num_k, const float* a, const float* b,
                                 Vec chains[kMr][kVectors]) {
  for (int64_t k = 0; k < num_k; k++) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) row[v] = load<Float32>(b + k * kNr + v * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; i++) {
      const Vec element = set<Vec>(a_element<kTransposed>(a, i, k));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) chains[i][v] = fma(element, row[v], chains[i][v]);
    }
  }
}

// Where a finished tile goes.
struct Destination {
  Output out;
  int64_t row_stride, offset;  // offset of the tile's first element
  int num_rows, num_columns;
  const float* bias;  // of the tile's columns, padded to kNr; null for none
  float alpha;
};

template <int kVectors>
CANONICAL_FN void finish(const Destination& to, Vec chains[kMr][kVectors]) {
  with_dtype(to.out.dtype, [&](auto dtype) {
    using T = decltype(dtype);
    auto* out = static_cast<typename T::Storage*>(to.out.data) + to.offset;
#pragma GCC unroll 12
    for (int i = 0; i < kMr; i++) {
      if (i >= to.num_rows) break;
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        Vec y = chains[i][v];
        if (to.alpha != 1.0f) y = y * to.alpha;
        if (to.bias) y = y + load<Float32>(to.bias + v * kWidth);
        auto* target = out + i * to.row_stride + v * kWidth;
        const int num_lanes = to.num_columns - v * kWidth;
        if (num_lanes >= kWidth) {
          store<T>(target, y);
        } else {
          store<T>(target, y, num_lanes);
        }
      }
    }
  });
}

// One tile over one block of k. waiting: the tile's chains between blocks, null when there is one
// block.
template <int kVectors, bool kTransposed>
void tile(int64_t num_k, const float* a, const float* b, float* waiting, bool first, bool last,
          const Destination& to) {
  Vec chains[kMr][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      chains[i][v] = first ? Vec{} : load<Float32>(waiting + i * kNr + v * kWidth);
    }
  }
  advance_chains<kVectors, kTransposed>(num_k, a, b, chains);
  if (last) {
    finish<kVectors>(to, chains);
    return;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kMr; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) store_raw(waiting + i * kNr + v * kWidth, chains[i][v]);
  }
}

// Packs rows [row, row + num_rows) x steps [k, k + num_k) of A into panels; missing rows become
// zeros.
template <class T>
void pack_a(const typename T::Storage* a, int64_t row_stride, bool transposed, int64_t m,
            int64_t row, int64_t num_rows, int64_t k, int64_t num_k, float* packed) {
  for (int64_t i0 = 0; i0 < num_rows; i0 += kMr, packed += kMr * kARow) {
    const int rows_here = static_cast<int>(num_rows - i0 < kMr ? num_rows - i0 : kMr);
    if (transposed) {
      for (int64_t kk = 0; kk < num_k; kk++) {
        const auto* source = a + (k + kk) * row_stride + row + i0;
        // kMr is less than a vector or a whole one: whole vectors are read where A has them.
        const bool whole = m - row - i0 >= kWidth;
        const Vec x = whole ? load<T>(source) : load<T>(source, rows_here);
        memcpy(packed + kk * kMr, &x, 4 * kMr);
      }
    } else {
      for (int i = 0; i < kMr; i++) {
        float* target = packed + i * kARow;
        if (i >= rows_here) {
          memset(target, 0, static_cast<size_t>(num_k) * 4);
          continue;
        }
        const auto* source = a + (row + i0 + i) * row_stride + k;
        for_lanes(num_k, [&](int64_t kk, auto lanes) {
          store_raw(target + kk, load<T>(source + kk, lanes));
        });
      }
    }
  }
}

// Packs steps [k, k + num_k) x columns [column, column + num_columns) of B into panels of kNr
// columns; missing columns become zeros.
template <class T>
void pack_b(const typename T::Storage* b, int64_t row_stride, bool transposed, int64_t k,
            int64_t num_k, int64_t column, int64_t num_columns, float* packed) {
  for (int64_t j0 = 0; j0 < num_columns; j0 += kNr, packed += kKc * kNr) {
    const int64_t columns_here = num_columns - j0 < kNr ? num_columns - j0 : kNr;
    if (!transposed) {
      for (int64_t kk = 0; kk < num_k; kk++) {
        const auto* source = b + (k + kk) * row_stride + column + j0;
        float* target = packed + kk * kNr;
        for_lanes(columns_here, [&](int64_t j, auto lanes) {
          store_raw(target + j, load<T>(source + j, lanes));
        });
      }
      continue;
    }
    for (int64_t j = 0; j < columns_here; j += kWidth) {
      const int vectors = static_cast<int>(columns_here - j < kWidth ? columns_here - j : kWidth);
      const auto* source = b + (column + j0 + j) * row_stride + k;
      for_lanes(num_k, [&](int64_t kk, auto lanes) {
        Vec block[kWidth];
        for (int i = 0; i < kWidth; i++) {
          block[i] = i < vectors ? load<T>(source + i * row_stride + kk, lanes) : Vec{};
        }
        transpose(block);
        for (int i = 0; i < lanes; i++) store_raw(packed + (kk + i) * kNr + j, block[i]);
      });
    }
  }
}

template <bool kTransposed>
CANONICAL_FN void choose_tile(int64_t num_k, const float* a, const float* b, float* waiting,
                              bool first, bool last, const Destination& to) {
  const int vectors = (to.num_columns + kWidth - 1) / kWidth;
  if (vectors == kNv) {
    tile<kNv, kTransposed>(num_k, a, b, waiting, first, last, to);
  } else if (vectors == 2) {
    tile<2, kTransposed>(num_k, a, b, waiting, first, last, to);
  } else {
    tile<1, kTransposed>(num_k, a, b, waiting, first, last, to);
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline void gemm(const Gemm& g) {
  const int64_t num_k_blocks = g.k == 0 ? 1 : (g.k + kKc - 1) / kKc;
  const int64_t panels_m = (g.m + kMr - 1) / kMr;
  const int64_t block_panels_n = (smaller(g.n, kNc) + kNr - 1) / kNr;
  Scratch packed_a((kMc / kMr) * kMr * kARow + kWidth);
  Scratch packed_b(block_panels_n * kKc * kNr);
  Scratch waiting(num_k_blocks > 1 ? panels_m * block_panels_n * kMr * kNr : 0);
  Scratch bias(kNc);
  const bool one_a_block = g.m <= kMc && num_k_blocks == 1;
  const bool one_b_block = g.n <= kNc && num_k_blocks == 1;

  for (int64_t batch = 0; batch < g.num_batches; batch++) {
    for (int64_t column = 0; column < g.n; column += kNc) {
      const int64_t num_columns = smaller(g.n - column, kNc);
      if (g.bias.data) {
        with_dtype(g.bias.dtype, [&](auto dtype) {
          using T = decltype(dtype);
          const auto* source = static_cast<const typename T::Storage*>(g.bias.data) +
                               batch * g.bias_batch_stride + column;
          for_lanes(num_columns, [&](int64_t j, auto lanes) {
            store_raw(bias.data() + j, load<T>(source + j, lanes));
          });
        });
      }
      for (int64_t block = 0; block < num_k_blocks; block++) {
        const int64_t k = block * kKc, num_k = smaller(g.k - k, kKc);
        if (!(one_b_block && batch > 0 && g.b_batch_stride == 0)) {
          with_dtype(g.b.dtype, [&](auto dtype) {
            using T = decltype(dtype);
            const auto* b = static_cast<const typename T::Storage*>(g.b.data);
            pack_b<T>(b + batch * g.b_batch_stride, g.b_row_stride, g.transpose_b, k, num_k, column,
                      num_columns, packed_b.data());
          });
        }
        for (int64_t row = 0; row < g.m; row += kMc) {
          const int64_t num_rows = smaller(g.m - row, kMc);
          if (!(one_a_block && (batch > 0 || column > 0) && g.a_batch_stride == 0)) {
            with_dtype(g.a.dtype, [&](auto dtype) {
              using T = decltype(dtype);
              const auto* a = static_cast<const typename T::Storage*>(g.a.data);
              pack_a<T>(a + batch * g.a_batch_stride, g.a_row_stride, g.transpose_a, g.m, row,
                        num_rows, k, num_k, packed_a.data());
            });
          }
          for (int64_t i = 0; i < num_rows; i += kMr) {
            const float* a_panel = packed_a.data() + i * kARow;
            for (int64_t j = 0; j < num_columns; j += kNr) {
              const int64_t tile_number = (row + i) / kMr * block_panels_n + j / kNr;
              const Destination to{g.out,
                                   g.n,
                                   (batch * g.m + row + i) * g.n + column + j,
                                   static_cast<int>(smaller(num_rows - i, kMr)),
                                   static_cast<int>(smaller(num_columns - j, kNr)),
                                   g.bias.data ? bias.data() + j : nullptr,
                                   g.alpha};
              const float* b_panel = packed_b.data() + j * kKc;
              float* chains = num_k_blocks > 1 ? waiting.data() + tile_number * kMr * kNr : nullptr;
              const bool first = block == 0, last = block + 1 == num_k_blocks;
              if (g.transpose_a) {
                choose_tile<true>(num_k, a_panel, b_panel, chains, first, last, to);
              } else {
                choose_tile<false>(num_k, a_panel, b_panel, chains, first, last, to);
              }
            }
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace primitives::canonical
