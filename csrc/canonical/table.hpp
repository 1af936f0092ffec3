// The table of this instruction set's kernels. See [Note: anonymous namespaces] in portable.hpp.
#pragma once

#include "canonical/gemm.hpp"
#include "canonical/layer.hpp"
#include "canonical/softmax.hpp"
#include "canonical/sums.hpp"
#include "canonical/training.hpp"

namespace primitives::canonical {
namespace {

constexpr Kernels make_table() {
  return {.gemm = gemm,
          .tree_sum = tree_sum,
          .row_sum = row_sum,
          .sum_of_squares = sum_of_squares,
          .elementwise = elementwise,
          .layer_norm = layer_norm,
          .layer_norm_backward = layer_norm_backward,
          .rms_norm = rms_norm,
          .rms_norm_backward = rms_norm_backward,
          .gelu = gelu,
          .gelu_backward = gelu_backward,
          .gelu_erf = gelu_erf,
          .gelu_erf_backward = gelu_erf_backward,
          .silu = silu,
          .silu_backward = silu_backward,
          .swiglu = swiglu,
          .swiglu_backward = swiglu_backward,
          .softmax = softmax,
          .softmax_backward = softmax_backward,
          .causal_softmax = causal_softmax,
          .causal_softmax_backward = causal_softmax_backward,
          .padded_softmax = padded_softmax,
          .padded_softmax_backward = padded_softmax_backward,
          .embedding_backward = embedding_backward,
          .vocabulary_max = vocabulary_max,
          .cross_entropy_sums = cross_entropy_sums,
          .cross_entropy_backward = cross_entropy_backward,
          .random_normal = random_normal,
          .random_words = random_words,
          .dropout = dropout,
          .adam_step = adam_step,
          .count_zeros = count_zeros};
}

}  // namespace
}  // namespace primitives::canonical
