// Panels of A and B for gemm.hpp: 32-bit words in the order in which the micro kernel reads them.
//
// A form says what a word holds, how words are read from a matrix and how a chain takes one:
// Singles here, Pairs in gemm_pairs.hpp.
#pragma once

#include "canonical/dispatch.hpp"
#include "canonical/simd.hpp"

namespace primitives::canonical {
namespace {

// Tile: as many chains as the registers hold (32 vectors in AVX-512, 16 else), enough to hide fma
// latency.
constexpr int kMr = kWidth == 16 ? 12 : 4;
constexpr int kNv = kWidth == 16 ? 2 : 3;
constexpr int kNr = kNv * kWidth;
constexpr int64_t kKc = 256;  // words
constexpr int64_t kMc = 16 * kMr;
constexpr int64_t kNc = 10 * kNr;
// Rows of an A panel stored row by row; the odd line keeps them out of one cache set.
constexpr int64_t kARow = kKc + 16;

// A word is one step of k, widened from T to float32.
template <class T>
struct Single {
  using Storage = typename T::Storage;
  static constexpr int64_t kSteps = 1;

  // The words of up to num_steps steps that follow each other in memory; then zeros.
  static CANONICAL_FN Vec along_k(const Storage* p, int64_t num_steps) {
    return num_steps >= kWidth ? load<T>(p) : load<T>(p, static_cast<int>(num_steps));
  }

  // The word of the next step, of num_steps, for each of neighbouring rows or columns; steps are
  // row_stride apart.
  template <class Lanes>
  static CANONICAL_FN Vec across_k(const Storage* p, int64_t, int64_t, Lanes lanes) {
    return load<T>(p, lanes);
  }
};

struct Singles {
  static constexpr int64_t kSteps = 1;
  static CANONICAL_FN Vec advance(Vec a, Vec b, Vec chain) { return fma(a, b, chain); }

  template <class Body>
  static CANONICAL_FN void with_words(Dtype dtype, Body body) {
    with_dtype(dtype, [&](auto type) { body(Single<decltype(type)>{}); });
  }
};

template <class Form>
CANONICAL_FN int64_t num_words(int64_t num_steps) {
  return (num_steps + Form::kSteps - 1) / Form::kSteps;
}

// Packs rows [row, row + num_rows) x steps [k, k + num_k) of A into panels of kMr rows, stored row
// by row, or word by word for a transposed A, as the source is contiguous; missing rows become
// zeros.
template <class Words>
void pack_a(const typename Words::Storage* a, int64_t row_stride, bool transposed, int64_t m,
            int64_t row, int64_t num_rows, int64_t k, int64_t num_k, float* packed) {
  const int64_t words = num_words<Words>(num_k);
  for (int64_t i0 = 0; i0 < num_rows; i0 += kMr, packed += kMr * kARow) {
    const int rows_here = static_cast<int>(num_rows - i0 < kMr ? num_rows - i0 : kMr);
    if (transposed) {
      // kMr is less than a vector or a whole one: whole vectors are read where A has them.
      const bool whole = m - row - i0 >= kWidth;
      for (int64_t w = 0; w < words; w++) {
        const int64_t step = w * Words::kSteps, steps_left = num_k - step;
        const auto* source = a + (k + step) * row_stride + row + i0;
        const Vec x = whole ? Words::across_k(source, row_stride, steps_left, AllLanes{})
                            : Words::across_k(source, row_stride, steps_left, rows_here);
        memcpy(packed + w * kMr, &x, 4 * kMr);
      }
      continue;
    }
    for (int i = 0; i < kMr; i++) {
      float* target = packed + i * kARow;
      if (i >= rows_here) {
        memset(target, 0, static_cast<size_t>(words) * 4);
        continue;
      }
      const auto* source = a + (row + i0 + i) * row_stride + k;
      for (int64_t w = 0; w < words; w += kWidth) {
        const int64_t step = w * Words::kSteps;
        store_raw(target + w, Words::along_k(source + step, num_k - step));
      }
    }
  }
}

// Packs steps [k, k + num_k) x columns [column, column + num_columns) of B into panels of kNr
// columns, word by word; missing columns become zeros.
template <class Words>
void pack_b(const typename Words::Storage* b, int64_t row_stride, bool transposed, int64_t k,
            int64_t num_k, int64_t column, int64_t num_columns, float* packed) {
  const int64_t words = num_words<Words>(num_k);
  for (int64_t j0 = 0; j0 < num_columns; j0 += kNr, packed += kKc * kNr) {
    const int64_t columns_here = num_columns - j0 < kNr ? num_columns - j0 : kNr;
    if (!transposed) {
      for (int64_t w = 0; w < words; w++) {
        const int64_t step = w * Words::kSteps;
        const auto* source = b + (k + step) * row_stride + column + j0;
        float* target = packed + w * kNr;
        for_lanes(columns_here, [&](int64_t j, auto lanes) {
          store_raw(target + j, Words::across_k(source + j, row_stride, num_k - step, lanes));
        });
      }
      continue;
    }
    for (int64_t j = 0; j < columns_here; j += kWidth) {
      const int vectors = static_cast<int>(columns_here - j < kWidth ? columns_here - j : kWidth);
      const auto* source = b + (column + j0 + j) * row_stride + k;
      for_lanes(words, [&](int64_t w, auto lanes) {
        const int64_t step = w * Words::kSteps;
        Vec block[kWidth];
        for (int i = 0; i < kWidth; i++) {
          block[i] =
              i < vectors ? Words::along_k(source + i * row_stride + step, num_k - step) : Vec{};
        }
        transpose(block);
        for (int i = 0; i < lanes; i++) store_raw(packed + (w + i) * kNr + j, block[i]);
      });
    }
  }
}

}  // namespace
}  // namespace primitives::canonical
