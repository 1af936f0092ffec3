// Functions of single elements: activations, optimizer step, dropout, gradient of cross entropy.
//
// Launch: a thread per piece of 16 bytes. A function has kIn inputs and kOut outputs of one type:
// operator()(thread, i, x, y) computes y[kOut] from x[kIn], the elements i. An output may be an
// input.
#pragma once

#include "canonical/activation.hpp"
#include "canonical/cuda/elements.hpp"
#include "canonical/philox.hpp"

namespace primitives::canonical {
namespace {

template <class T, class Function>
struct Map {
  using S = typename T::Storage;
  static constexpr int kThreads = 256, kMinBlocks = 4;
  static constexpr int kIn = Function::kIn, kOut = Function::kOut;

  Function function;
  int64_t n;
  const S* in[kIn];
  S* out[kOut];

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    const int64_t number = int64_t{thread.block_x()} * kThreads + thread.index();
    const int64_t first = number * T::kNumel;
    if (first >= n) return;
    float from[kIn][T::kNumel], to[kOut][T::kNumel] = {};
#pragma unroll
    for (int j = 0; j < kIn; j++) load_piece<T>(thread, in[j], first, n, from[j]);
#pragma unroll
    for (int i = 0; i < T::kNumel; i++) {
      if (first + i >= n) break;
      float x[kIn], y[kOut];
#pragma unroll
      for (int j = 0; j < kIn; j++) x[j] = from[j][i];
      function(thread, first + i, x, y);
#pragma unroll
      for (int j = 0; j < kOut; j++) to[j][i] = y[j];
    }
#pragma unroll
    for (int j = 0; j < kOut; j++) store_piece<T>(thread, out[j], first, n, to[j]);
  }
};

template <float (*kFunction)(float)>
struct Unary {
  static constexpr int kIn = 1, kOut = 1;
  template <class Thread>
  DEVICE_FN void operator()(const Thread&, int64_t, const float x[1], float y[1]) const {
    y[0] = kFunction(x[0]);
  }
};

// (dy, x) -> dx
template <float (*kDerivative)(float)>
struct Backward {
  static constexpr int kIn = 2, kOut = 1;
  template <class Thread>
  DEVICE_FN void operator()(const Thread&, int64_t, const float x[2], float y[1]) const {
    y[0] = x[0] * kDerivative(x[1]);
  }
};

// (gate, value) -> y
struct Swiglu {
  static constexpr int kIn = 2, kOut = 1;
  template <class Thread>
  DEVICE_FN void operator()(const Thread&, int64_t, const float x[2], float y[1]) const {
    y[0] = silu(x[0]) * x[1];
  }
};

// (dy, gate, value) -> (dgate, dvalue)
struct SwigluBackward {
  static constexpr int kIn = 3, kOut = 2;
  template <class Thread>
  DEVICE_FN void operator()(const Thread&, int64_t, const float x[3], float y[2]) const {
    y[0] = (x[0] * x[2]) * silu_derivative(x[1]);
    y[1] = x[0] * silu(x[1]);
  }
};

// (param, grad, exp_avg, exp_avg_sq) -> (param, exp_avg, exp_avg_sq)
struct Adam {
  static constexpr int kIn = 4, kOut = 3;
  AdamStep step;
  template <class Thread>
  DEVICE_FN void operator()(const Thread&, int64_t, const float x[4], float y[3]) const {
    const float g = x[1];
    const float m = fma(g, step.one_minus_beta1, x[2] * step.beta1);
    const float v = fma(g * g, step.one_minus_beta2, x[3] * step.beta2);
    const float denominator = sqrt(v) / step.bias_correction2_sqrt + step.eps;
    y[0] = fma(m / denominator, -step.step_size, x[0] * step.decay);
    y[1] = m;
    y[2] = v;
  }
};

// x, or (x, residual), each [rows, width] -> y
template <bool kWithResidual>
struct DropoutOf {
  static constexpr int kIn = kWithResidual ? 2 : 1, kOut = 1;
  Dropout dropout;
  const int64_t* row_ids;
  int64_t width;
  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread, int64_t i, const float x[kIn], float y[1]) const {
    const int64_t column = i % width;
    const auto counter = static_cast<uint64_t>(column / 4);
    const auto row = static_cast<uint64_t>(thread.load(row_ids + i / width));
    uint32_t words[4];
    philox(dropout.key, static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32),
           static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32), words);
    const int which = static_cast<int>(column % 4);
    const uint32_t word = which < 2    ? which == 0 ? words[0] : words[1]
                          : which == 2 ? words[2]
                                       : words[3];
    y[0] = word >= dropout.threshold ? x[0] * dropout.scale : 0.0f;
    if (kWithResidual) y[0] = x[kIn - 1] + y[0];
  }
};

// logits [parts, tokens, width] -> dlogits
struct CrossEntropyBackward {
  static constexpr int kIn = 1, kOut = 1;
  const int64_t* targets;
  int64_t first;
  const float *max, *sum_exp, *grad_loss;
  int64_t tokens, width;
  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread, int64_t i, const float x[1], float y[1]) const {
    const int64_t row = i / width, part = row / tokens, t = row % tokens;
    const int64_t target = thread.load(targets + t) - first - part * width;
    const float inverse = 1.0f / thread.load(sum_exp + t);
    float p = exp_nonpositive(x[0] - thread.load(max + t)) * inverse;
    if (target == i % width) p = p - 1.0f;
    y[0] = p * thread.load(grad_loss + t);
  }
};

}  // namespace
}  // namespace primitives::canonical
