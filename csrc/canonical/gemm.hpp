// C = A B with every output element one sequential fma chain over k from +0, whatever the blocking.
//
// A block of kKc words of k is packed: B in panels of kNr columns, A in panels of kMr rows. The
// micro kernel keeps a kMr x kNr tile of chains in registers. When k has several blocks, the chains
// wait between them in float32 scratch, which is exact. Alpha, bias and the one rounding come at
// the end.
#pragma once

#include "canonical/gemm_panels.hpp"
#include "canonical/scratch.hpp"

namespace primitives::canonical {
namespace {

// Word w of row i of an A panel, in every lane: as an integer, since no float operation may touch
// it.
template <bool kTransposed>
CANONICAL_FN Vec a_word(const float* panel, int i, int64_t w) {
  return as_float(IVec{} + as_int(kTransposed ? panel[w * kMr + i] : panel[i * kARow + w]));
}

template <class Form, int kVectors, bool kTransposed>
CANONICAL_FN void advance_chains(int64_t words, const float* a, const float* b,
                                 Vec chains[kMr][kVectors]) {
  for (int64_t w = 0; w < words; w++) {
    Vec row[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) row[v] = load<Float32>(b + w * kNr + v * kWidth);
#pragma GCC unroll 12
    for (int i = 0; i < kMr; i++) {
      const Vec word = a_word<kTransposed>(a, i, w);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) {
        chains[i][v] = Form::advance(word, row[v], chains[i][v]);
      }
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
template <class Form, int kVectors, bool kTransposed>
__attribute__((noinline)) void tile(int64_t words, const float* a, const float* b, float* waiting,
                                    bool first, bool last, const Destination& to) {
  Vec chains[kMr][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kMr; i++) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; v++) {
      chains[i][v] = first ? Vec{} : load<Float32>(waiting + i * kNr + v * kWidth);
    }
  }
  advance_chains<Form, kVectors, kTransposed>(words, a, b, chains);
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

template <class Form, bool kTransposed>
CANONICAL_FN void choose_tile(int64_t words, const float* a, const float* b, float* waiting,
                              bool first, bool last, const Destination& to) {
  const int vectors = (to.num_columns + kWidth - 1) / kWidth;
  if (vectors == kNv) {
    tile<Form, kNv, kTransposed>(words, a, b, waiting, first, last, to);
  } else if (vectors == 2) {
    tile<Form, 2, kTransposed>(words, a, b, waiting, first, last, to);
  } else {
    tile<Form, 1, kTransposed>(words, a, b, waiting, first, last, to);
  }
}

inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

template <class Form>
inline void product(const Gemm& g) {
  constexpr int64_t kBlockSteps = kKc * Form::kSteps;
  const int64_t num_k_blocks = g.k == 0 ? 1 : (g.k + kBlockSteps - 1) / kBlockSteps;
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
        const int64_t k = block * kBlockSteps, num_k = smaller(g.k - k, kBlockSteps);
        if (!(one_b_block && batch > 0 && g.b_batch_stride == 0)) {
          Form::with_words(g.b.dtype, [&](auto form) {
            using Words = decltype(form);
            const auto* b = static_cast<const typename Words::Storage*>(g.b.data);
            pack_b<Words>(b + batch * g.b_batch_stride, g.b_row_stride, g.transpose_b, k, num_k,
                          column, num_columns, packed_b.data());
          });
        }
        for (int64_t row = 0; row < g.m; row += kMc) {
          const int64_t num_rows = smaller(g.m - row, kMc);
          if (!(one_a_block && (batch > 0 || column > 0) && g.a_batch_stride == 0)) {
            Form::with_words(g.a.dtype, [&](auto form) {
              using Words = decltype(form);
              const auto* a = static_cast<const typename Words::Storage*>(g.a.data);
              pack_a<Words>(a + batch * g.a_batch_stride, g.a_row_stride, g.transpose_a, g.m, row,
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
                choose_tile<Form, true>(num_words<Form>(num_k), a_panel, b_panel, chains, first,
                                        last, to);
              } else {
                choose_tile<Form, false>(num_words<Form>(num_k), a_panel, b_panel, chains, first,
                                         last, to);
              }
            }
          }
        }
      }
    }
  }
}

inline void gemm(const Gemm& g) { product<Singles>(g); }

}  // namespace
}  // namespace primitives::canonical
