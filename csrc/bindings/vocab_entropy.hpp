// Entropy and log-probability over a split vocabulary, on tensors.
//
// Nothing here needs the GIL, or may be called with it where ranks wait for each other. A wrong
// argument is Python's ValueError.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string_view>

#include "vocab_entropy/cuda.hpp"

namespace primitives::vocab_entropy {

using OptionalTensor = std::optional<at::Tensor>;

// Labels [tokens] int64, if any, and which of them stands for no target.
struct Targets {
  OptionalTensor labels;
  int64_t ignored;
};

// The columns of the vocabulary that logits hold: segments, of which the last may be cut short.
struct Columns {
  int64_t first, segment_length;
  int num_segments;
};

// Of the loss by the results, [tokens] float32 each; none: zeros.
struct ResultGradients {
  OptionalTensor entropy, log_prob, log_sum_exp;
};

// quads [tokens, 4], the others [tokens], float32.
struct Results {
  at::Tensor quads, entropy, log_prob, log_sum_exp;
};

// vocab_entropy/kernels.hpp on tensors of one kind of device; logits [tokens, columns] with
// contiguous rows.
struct TensorKernels {
  void (*forward)(const at::Tensor& logits, const Targets& targets, const Columns& columns,
                  double scale, Mode mode, const at::Tensor& quads);
  Results (*finish)(const at::Tensor& shards, const Targets& targets, double scale);
  void (*backward)(const at::Tensor& logits, const Targets& targets, int64_t first, double scale,
                   Mode mode, const at::Tensor& quads, const ResultGradients& gradients,
                   const at::Tensor& out);
  // Whether the current stream of the device is captured into a graph.
  bool (*is_captured)(at::Device device);
};

extern const TensorKernels kCpuTensorKernels, kCudaTensorKernels;

const TensorKernels& kernels_on(at::Device device);

Mode mode_of(std::string_view name);

}  // namespace primitives::vocab_entropy
