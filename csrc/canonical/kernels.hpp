// The canonical kernels as a table of functions, one table per instruction set, all with the same
// bits.
//
// Plain pointers and sizes: the bindings check tensors, the kernels trust them. Sizes and strides
// count elements; "rows" are contiguous. The formulas and orders are in
// docs/canonical-arithmetic.md.
#pragma once

#include <stdint.h>

namespace primitives::canonical {

enum class Dtype { kFloat32, kFloat16, kBFloat16 };

// A tensor's data and how its elements are stored.
struct Input {
  const void* data;
  Dtype dtype;
};
struct Output {
  void* data;
  Dtype dtype;
};

// out[b] = alpha * a[b] b[b] + bias[b]; a batch stride of 0 shares an operand. bias.data may be
// null.
struct Gemm {
  Input a, b, bias;
  Output out;  // [num_batches, m, n], contiguous
  int64_t num_batches, m, n, k;
  int64_t a_batch_stride, a_row_stride, b_batch_stride, b_row_stride, bias_batch_stride;
  bool transpose_a, transpose_b;  // stored as [k, m], as [n, k]
  float alpha;
};

enum class Elementwise { kExp, kLog, kSqrt, kTanh, kErf, kSigmoid, kRsqrt };

struct AdamStep {
  float beta1, one_minus_beta1, beta2, one_minus_beta2, eps, decay, step_size,
      bias_correction2_sqrt;
};

struct Dropout {
  uint64_t key;
  uint32_t threshold;  // kept iff the random word is >= threshold
  float scale;         // applied to kept elements
};

struct Kernels {
  void (*gemm)(const Gemm& gemm);
  // x [outer, n, rows, length] -> out [outer, rows, length]; bias [length] or null
  void (*tree_sum)(Input x, int64_t outer, int64_t n, int64_t rows, int64_t length, Input bias,
                   Output out);
  // x [rows, n] -> out [rows]
  void (*row_sum)(Input x, int64_t rows, int64_t n, Output out);
  void (*sum_of_squares)(const float* x, int64_t rows, int64_t n, float* out);
  void (*elementwise)(Elementwise function, const float* x, int64_t n, float* out);
  void (*layer_norm)(Input x, Input weight, Input bias, float eps, int64_t tokens, int64_t hidden,
                     Output y, float* mean, float* rstd);
  // dweight, dbias [num_blocks, hidden]
  void (*layer_norm_backward)(Input dy, Input x, const float* mean, const float* rstd, Input weight,
                              int64_t tokens, int64_t hidden, int64_t num_blocks, Output dx,
                              float* dweight, float* dbias);
  void (*rms_norm)(Input x, Input weight, float eps, int64_t tokens, int64_t hidden, Output y,
                   float* rstd);
  // dweight [num_blocks, hidden]
  void (*rms_norm_backward)(Input dy, Input x, const float* rstd, Input weight, int64_t tokens,
                            int64_t hidden, int64_t num_blocks, Output dx, float* dweight);
  void (*gelu)(Input x, int64_t n, Output y);
  void (*gelu_backward)(Input dy, Input x, int64_t n, Output dx);
  void (*gelu_erf)(Input x, int64_t n, Output y);
  void (*gelu_erf_backward)(Input dy, Input x, int64_t n, Output dx);
  void (*silu)(Input x, int64_t n, Output y);
  void (*silu_backward)(Input dy, Input x, int64_t n, Output dx);
  void (*swiglu)(Input gate, Input value, int64_t n, Output y);
  void (*swiglu_backward)(Input dy, Input gate, Input value, int64_t n, Output dgate,
                          Output dvalue);
  // [rows, length]
  void (*softmax)(Input scores, int64_t rows, int64_t length, float scale, Output probs);
  void (*softmax_backward)(Input dprobs, Input probs, int64_t rows, int64_t length, float scale,
                           Output dscores);
  // [num, length, length]
  void (*causal_softmax)(Input scores, int64_t num, int64_t length, float scale, Output probs);
  void (*causal_softmax_backward)(Input dprobs, Input probs, int64_t num, int64_t length,
                                  float scale, Output dscores);
  // the same; matrix i sees its first visible[i] columns, at least one
  void (*padded_softmax)(Input scores, const int64_t* visible, int64_t num, int64_t length,
                         float scale, Output probs);
  void (*padded_softmax_backward)(Input dprobs, Input probs, const int64_t* visible, int64_t num,
                                  int64_t length, float scale, Output dscores);
  // table [vocabulary, hidden], float32, zeroed by the caller
  void (*embedding_backward)(Input dy, const int64_t* ids, int64_t tokens, int64_t hidden,
                             int64_t vocabulary, float* table);
  // logits [parts, tokens, width]
  void (*vocabulary_max)(Input logits, int64_t parts, int64_t tokens, int64_t width, float* max);
  // first: vocabulary index of the first logit; a target outside these parts is another shard's
  void (*cross_entropy_sums)(Input logits, const int64_t* targets, int64_t first, const float* max,
                             int64_t parts, int64_t tokens, int64_t width, float* sum_exp,
                             float* target_logit);
  void (*cross_entropy_backward)(Input logits, const int64_t* targets, int64_t first,
                                 const float* max, const float* sum_exp, const float* grad_loss,
                                 int64_t parts, int64_t tokens, int64_t width, Output dlogits);
  void (*random_normal)(uint64_t key, uint64_t first_index, int64_t n, float* out);
  void (*random_words)(uint64_t key, uint64_t counter_high, int64_t n, uint32_t* out);
  // x, out [rows, width]; residual may be null
  void (*dropout)(Input x, Input residual, const Dropout& dropout, const int64_t* row_ids,
                  int64_t rows, int64_t width, Output out);
  void (*adam_step)(const AdamStep& step, int64_t n, float* param, const float* grad,
                    float* exp_avg, float* exp_avg_sq);
  int64_t (*count_zeros)(Input x, int64_t n);
};

extern const Kernels kScalarKernels, kAvx2Kernels, kAvx512Kernels, kAvx512Bf16Kernels;

// The table for active_isa().
const Kernels& kernels();

}  // namespace primitives::canonical
