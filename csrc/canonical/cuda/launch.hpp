// The canonical kernels as a table of functions that launch them.
//
// Launcher, made anew for each call: run(kernel, grid) starts a kernel, on CUDA or on an emulated
// device, and throws std::runtime_error when it cannot; reads(x, numel, itemsize) and writes(...)
// say what memory the call may touch, which an emulated device checks; enough_blocks() is how many
// blocks of threads keep the device busy.
#pragma once

#include "canonical/cuda/columns.hpp"
#include "canonical/cuda/gemm.hpp"
#include "canonical/cuda/map.hpp"
#include "canonical/cuda/norms.hpp"
#include "canonical/cuda/rows.hpp"
#include "canonical/grid.hpp"

namespace primitives::canonical {
namespace {

inline int64_t itemsize(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// body(T{}) with the type of 16 bytes of a dtype.
template <class Body>
void with_packed(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(PackedFloat32{});
    case Dtype::kFloat16:
      return body(PackedFloat16{});
    case Dtype::kBFloat16:
      return body(PackedBFloat16{});
  }
}

template <int kValue>
struct Number {
  static constexpr int value = kValue;
};

// body(T{}, Number<warps>{}): how many warps share a row changes no bit.
template <class Body>
void with_rows(Dtype dtype, int64_t length, const Body& body) {
  with_packed(dtype, [&](auto type) {
    if (length > 1024) {
      body(type, Number<8>{});
    } else {
      body(type, Number<1>{});
    }
  });
}

template <class T>
const typename T::Storage* of(Input x) {
  return static_cast<const typename T::Storage*>(x.data);
}
template <class T>
typename T::Storage* of(Output x) {
  return static_cast<typename T::Storage*>(x.data);
}

template <class Launcher>
struct DeviceKernels {
  // What a call touches.
  static void reads(Launcher& device, Input x, int64_t numel) {
    if (x.data != nullptr) device.reads(x.data, numel, itemsize(x.dtype));
  }
  static void writes(Launcher& device, Output x, int64_t numel) {
    device.writes(x.data, numel, itemsize(x.dtype));
  }
  template <class V>
  static void reads(Launcher& device, const V* x, int64_t numel) {
    device.reads(x, numel, sizeof(V));
  }
  static void writes(Launcher& device, float* x, int64_t numel) {
    device.writes(x, numel, sizeof(float));
  }

  // A thread per item; a block of threads per row.
  template <class Kernel>
  static void run_items(Launcher& device, const Kernel& kernel, int64_t num_items) {
    if (num_items == 0) return;
    device.run(kernel, Grid{ceil_div(num_items, Kernel::kThreads), 1, 0});
  }
  template <class Kernel>
  static void run_rows(Launcher& device, const Kernel& kernel, int64_t rows) {
    if (rows > 0) device.run(kernel, Grid{rows, 1, 4 * Kernel::kWarps});
  }

  // ---- functions of elements ----

  template <class Function, class Inputs, class Outputs>
  static void map(const Function& function, Dtype dtype, int64_t n, const Inputs& inputs,
                  const Outputs& outputs) {
    Launcher device;
    with_packed(dtype, [&](auto type) {
      using T = decltype(type);
      Map<T, Function> kernel{function, n, {}, {}};
      for (int i = 0; i < Function::kIn; i++) {
        kernel.in[i] = of<T>(inputs[i]);
        reads(device, inputs[i], n);
      }
      for (int i = 0; i < Function::kOut; i++) {
        kernel.out[i] = of<T>(outputs[i]);
        writes(device, outputs[i], n);
      }
      run_items(device, kernel, ceil_div(n, T::kNumel));
    });
  }

  template <float (*kFunction)(float)>
  static void unary(Input x, int64_t n, Output y) {
    const Input in[] = {x};
    const Output out[] = {y};
    map(Unary<kFunction>{}, x.dtype, n, in, out);
  }

  template <float (*kDerivative)(float)>
  static void backward(Input dy, Input x, int64_t n, Output dx) {
    const Input in[] = {dy, x};
    const Output out[] = {dx};
    map(Backward<kDerivative>{}, x.dtype, n, in, out);
  }

  static void elementwise(Elementwise function, const float* x, int64_t n, float* out) {
    const Input in{x, Dtype::kFloat32};
    const Output y{out, Dtype::kFloat32};
    switch (function) {
      case Elementwise::kExp:
        return unary<exp<float>>(in, n, y);
      case Elementwise::kLog:
        return unary<log<float>>(in, n, y);
      case Elementwise::kSqrt:
        return unary<sqrt>(in, n, y);
      case Elementwise::kTanh:
        return unary<tanh<float>>(in, n, y);
      case Elementwise::kErf:
        return unary<erf<float>>(in, n, y);
      case Elementwise::kSigmoid:
        return unary<sigmoid<float>>(in, n, y);
      case Elementwise::kRsqrt:
        return unary<rsqrt<float>>(in, n, y);
    }
  }

  static void swiglu(Input gate, Input value, int64_t n, Output y) {
    const Input in[] = {gate, value};
    const Output out[] = {y};
    map(Swiglu{}, gate.dtype, n, in, out);
  }

  static void swiglu_backward(Input dy, Input gate, Input value, int64_t n, Output dgate,
                              Output dvalue) {
    const Input in[] = {dy, gate, value};
    const Output out[] = {dgate, dvalue};
    map(SwigluBackward{}, gate.dtype, n, in, out);
  }

  static void adam_step(const AdamStep& step, int64_t n, float* param, const float* grad,
                        float* exp_avg, float* exp_avg_sq) {
    constexpr Dtype kType = Dtype::kFloat32;
    const Input in[] = {{param, kType}, {grad, kType}, {exp_avg, kType}, {exp_avg_sq, kType}};
    const Output out[] = {{param, kType}, {exp_avg, kType}, {exp_avg_sq, kType}};
    map(Adam{step}, kType, n, in, out);
  }

  static void dropout(Input x, Input residual, const Dropout& dropout, const int64_t* row_ids,
                      int64_t rows, int64_t width, Output out) {
    Launcher device;
    with_packed(x.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t n = rows * width;
      reads(device, x, n);
      reads(device, residual, n);
      reads(device, row_ids, rows);
      writes(device, out, n);
      const int64_t pieces = ceil_div(n, T::kNumel);
      if (residual.data == nullptr) {
        const Map<T, DropoutOf<false>> kernel{
            {dropout, row_ids, width}, n, {of<T>(x)}, {of<T>(out)}};
        run_items(device, kernel, pieces);
      } else {
        const Map<T, DropoutOf<true>> kernel{
            {dropout, row_ids, width}, n, {of<T>(x), of<T>(residual)}, {of<T>(out)}};
        run_items(device, kernel, pieces);
      }
    });
  }

  static void cross_entropy_backward(Input logits, const int64_t* targets, int64_t first,
                                     const float* max, const float* sum_exp, const float* grad_loss,
                                     int64_t parts, int64_t tokens, int64_t width, Output dlogits) {
    Launcher device;
    with_packed(logits.dtype, [&](auto type) {
      using T = decltype(type);
      const int64_t n = parts * tokens * width;
      reads(device, logits, n);
      reads(device, targets, tokens);
      for (const float* x : {max, sum_exp, grad_loss}) reads(device, x, tokens);
      writes(device, dlogits, n);
      const Map<T, CrossEntropyBackward> kernel{
          {targets, first, max, sum_exp, grad_loss, tokens, width},
          n,
          {of<T>(logits)},
          {of<T>(dlogits)}};
      run_items(device, kernel, ceil_div(n, T::kNumel));
    });
  }

  // ---- functions of rows ----

  template <bool kSquared>
  static void sum_rows(Input x, int64_t rows, int64_t n, Output out) {
    Launcher device;
    reads(device, x, rows * n);
    writes(device, out, rows);
    with_rows(x.dtype, n, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(device, RowSum<T, decltype(warps)::value, kSquared>{{}, of<T>(x), n, out}, rows);
    });
  }

  static void row_sum(Input x, int64_t rows, int64_t n, Output out) {
    sum_rows<false>(x, rows, n, out);
  }

  static void sum_of_squares(const float* x, int64_t rows, int64_t n, float* out) {
    sum_rows<true>({x, Dtype::kFloat32}, rows, n, {out, Dtype::kFloat32});
  }

  static void any_softmax(Input scores, const Visible& visible, int64_t rows, float scale,
                          Output probs) {
    Launcher device;
    reads(device, scores, rows * visible.length);
    writes(device, probs, rows * visible.length);
    if (visible.of_matrix != nullptr) reads(device, visible.of_matrix, rows / visible.length);
    with_rows(scores.dtype, visible.length, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(device,
               Softmax<T, decltype(warps)::value>{{}, of<T>(scores), visible, scale, of<T>(probs)},
               rows);
    });
  }

  static void any_softmax_backward(Input dprobs, Input probs, const Visible& visible, int64_t rows,
                                   float scale, Output dscores) {
    Launcher device;
    reads(device, dprobs, rows * visible.length);
    reads(device, probs, rows * visible.length);
    writes(device, dscores, rows * visible.length);
    if (visible.of_matrix != nullptr) reads(device, visible.of_matrix, rows / visible.length);
    with_rows(probs.dtype, visible.length, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(device,
               SoftmaxBackward<T, decltype(warps)::value>{
                   {}, of<T>(dprobs), of<T>(probs), visible, scale, of<T>(dscores)},
               rows);
    });
  }

  static void softmax(Input scores, int64_t rows, int64_t length, float scale, Output probs) {
    any_softmax(scores, {Visible::Kind::kAll, length, nullptr}, rows, scale, probs);
  }
  static void softmax_backward(Input dprobs, Input probs, int64_t rows, int64_t length, float scale,
                               Output dscores) {
    any_softmax_backward(dprobs, probs, {Visible::Kind::kAll, length, nullptr}, rows, scale,
                         dscores);
  }
  static void causal_softmax(Input scores, int64_t num, int64_t length, float scale, Output probs) {
    any_softmax(scores, {Visible::Kind::kCausal, length, nullptr}, num * length, scale, probs);
  }
  static void causal_softmax_backward(Input dprobs, Input probs, int64_t num, int64_t length,
                                      float scale, Output dscores) {
    any_softmax_backward(dprobs, probs, {Visible::Kind::kCausal, length, nullptr}, num * length,
                         scale, dscores);
  }
  static void padded_softmax(Input scores, const int64_t* visible, int64_t num, int64_t length,
                             float scale, Output probs) {
    if (num * length == 0) return;
    any_softmax(scores, {Visible::Kind::kPadded, length, visible}, num * length, scale, probs);
  }
  static void padded_softmax_backward(Input dprobs, Input probs, const int64_t* visible,
                                      int64_t num, int64_t length, float scale, Output dscores) {
    if (num * length == 0) return;
    any_softmax_backward(dprobs, probs, {Visible::Kind::kPadded, length, visible}, num * length,
                         scale, dscores);
  }

  static void vocabulary_max(Input logits, int64_t parts, int64_t tokens, int64_t width,
                             float* max) {
    Launcher device;
    reads(device, logits, parts * tokens * width);
    writes(device, max, tokens);
    with_rows(logits.dtype, width, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(
          device,
          VocabularyMax<T, decltype(warps)::value>{{}, of<T>(logits), parts, tokens, width, max},
          tokens);
    });
  }

  static void cross_entropy_sums(Input logits, const int64_t* targets, int64_t first,
                                 const float* max, int64_t parts, int64_t tokens, int64_t width,
                                 float* sum_exp, float* target_logit) {
    Launcher device;
    reads(device, logits, parts * tokens * width);
    reads(device, targets, tokens);
    reads(device, max, tokens);
    writes(device, sum_exp, tokens);
    writes(device, target_logit, tokens);
    with_rows(logits.dtype, width, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(
          device,
          CrossEntropySums<T, decltype(warps)::value>{
              {}, of<T>(logits), targets, first, max, parts, tokens, width, sum_exp, target_logit},
          tokens);
    });
  }

  static void layer_norm(Input x, Input weight, Input bias, float eps, int64_t tokens,
                         int64_t hidden, Output y, float* mean, float* rstd) {
    Launcher device;
    reads(device, x, tokens * hidden);
    reads(device, weight, hidden);
    reads(device, bias, hidden);
    writes(device, y, tokens * hidden);
    writes(device, mean, tokens);
    writes(device, rstd, tokens);
    with_rows(x.dtype, hidden, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(device,
               LayerNorm<T, decltype(warps)::value>{
                   {}, of<T>(x), weight, bias, eps, hidden, of<T>(y), mean, rstd},
               tokens);
    });
  }

  static void rms_norm(Input x, Input weight, float eps, int64_t tokens, int64_t hidden, Output y,
                       float* rstd) {
    Launcher device;
    reads(device, x, tokens * hidden);
    reads(device, weight, hidden);
    writes(device, y, tokens * hidden);
    writes(device, rstd, tokens);
    with_rows(x.dtype, hidden, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(
          device,
          RmsNorm<T, decltype(warps)::value>{{}, of<T>(x), weight, eps, hidden, of<T>(y), rstd},
          tokens);
    });
  }

  // mean and dbias are null for RMSNorm.
  template <bool kCentred>
  static void norm_backward(Input dy, Input x, const float* mean, const float* rstd, Input weight,
                            int64_t tokens, int64_t hidden, int64_t num_blocks, Output dx,
                            float* dweight, float* dbias) {
    Launcher device;
    reads(device, dy, tokens * hidden);
    reads(device, x, tokens * hidden);
    reads(device, weight, hidden);
    reads(device, rstd, tokens);
    writes(device, dx, tokens * hidden);
    writes(device, dweight, num_blocks * hidden);
    if (kCentred) {
      reads(device, mean, tokens);
      writes(device, dbias, num_blocks * hidden);
    }
    with_rows(x.dtype, hidden, [&](auto type, auto warps) {
      using T = decltype(type);
      run_rows(device,
               NormBackward<T, decltype(warps)::value, kCentred>{
                   {}, of<T>(dy), of<T>(x), mean, rstd, weight, hidden, of<T>(dx)},
               tokens);
    });
    with_packed(x.dtype, [&](auto type) {
      using T = decltype(type);
      run_items(device,
                NormWeightGradient<T, kCentred>{of<T>(dy), of<T>(x), mean, rstd, tokens, hidden,
                                                num_blocks, dweight, dbias},
                num_blocks * hidden);
    });
  }

  static void layer_norm_backward(Input dy, Input x, const float* mean, const float* rstd,
                                  Input weight, int64_t tokens, int64_t hidden, int64_t num_blocks,
                                  Output dx, float* dweight, float* dbias) {
    norm_backward<true>(dy, x, mean, rstd, weight, tokens, hidden, num_blocks, dx, dweight, dbias);
  }
  static void rms_norm_backward(Input dy, Input x, const float* rstd, Input weight, int64_t tokens,
                                int64_t hidden, int64_t num_blocks, Output dx, float* dweight) {
    norm_backward<false>(dy, x, nullptr, rstd, weight, tokens, hidden, num_blocks, dx, dweight,
                         nullptr);
  }

  // ---- sums over rows ----

  static void tree_sum(Input x, int64_t outer, int64_t n, int64_t rows, int64_t length, Input bias,
                       Output out) {
    if (rows * length == 1 && bias.data == nullptr) return row_sum(x, outer, n, out);
    Launcher device;
    reads(device, x, outer * n * rows * length);
    reads(device, bias, length);
    writes(device, out, outer * rows * length);
    with_packed(x.dtype, [&](auto type) {
      using T = decltype(type);
      run_items(device, TreeSum<T>{of<T>(x), outer, n, rows, length, bias, out},
                outer * rows * length);
    });
  }

  static void embedding_backward(Input dy, const int64_t* ids, int64_t tokens, int64_t hidden,
                                 int64_t vocabulary, float* table) {
    Launcher device;
    reads(device, dy, tokens * hidden);
    reads(device, ids, tokens);
    writes(device, table, vocabulary * hidden);
    if (tokens == 0) return;
    with_packed(dy.dtype, [&](auto type) {
      using T = decltype(type);
      using Kernel = EmbeddingBackward<T>;
      device.run(Kernel{of<T>(dy), ids, tokens, hidden, table},
                 Grid{tokens, 1, Kernel::kSharedNbytes});
    });
  }

  // ---- matrix product ----

  static int64_t span(int64_t num_batches, int64_t batch_stride, int64_t rows, int64_t row_stride,
                      int64_t columns) {
    if (num_batches == 0 || rows == 0 || columns == 0) return 0;
    return (num_batches - 1) * batch_stride + (rows - 1) * row_stride + columns;
  }

  template <class Kernel>
  static void run_tiles(Launcher& device, const Gemm& g) {
    const int64_t tiles_m = ceil_div(g.m, Kernel::kTile), tiles_n = ceil_div(g.n, Kernel::kTile);
    const Kernel kernel{{g.a, g.a_batch_stride, g.a_row_stride, g.m, !g.transpose_a},
                        {g.b, g.b_batch_stride, g.b_row_stride, g.n, g.transpose_b},
                        g.bias,
                        g.out,
                        g.k,
                        g.bias_batch_stride,
                        tiles_m,
                        tiles_n,
                        g.alpha};
    device.run(kernel, Grid{g.num_batches * tiles_m * tiles_n, 1, Kernel::kSharedNbytes});
  }

  static void gemm(const Gemm& g) {
    using Large = GemmKernel<128, 8>;
    using Small = GemmKernel<32, 4>;
    Launcher device;
    reads(device, g.a,
          span(g.num_batches, g.a_batch_stride, g.transpose_a ? g.k : g.m, g.a_row_stride,
               g.transpose_a ? g.m : g.k));
    reads(device, g.b,
          span(g.num_batches, g.b_batch_stride, g.transpose_b ? g.n : g.k, g.b_row_stride,
               g.transpose_b ? g.k : g.n));
    reads(device, g.bias, (g.num_batches - 1) * g.bias_batch_stride + g.n);
    writes(device, g.out, g.num_batches * g.m * g.n);
    if (g.num_batches * g.m * g.n == 0) return;
    const int64_t large_tiles =
        g.num_batches * ceil_div(g.m, Large::kTile) * ceil_div(g.n, Large::kTile);
    if (large_tiles >= device.enough_blocks()) {
      run_tiles<Large>(device, g);
    } else {
      run_tiles<Small>(device, g);
    }
  }
};

// random_normal, random_words and count_zeros have no kernel on a device.
template <class Launcher>
constexpr Kernels device_table() {
  using Device = DeviceKernels<Launcher>;
  Kernels table{};
  table.gemm = Device::gemm;
  table.tree_sum = Device::tree_sum;
  table.row_sum = Device::row_sum;
  table.sum_of_squares = Device::sum_of_squares;
  table.elementwise = Device::elementwise;
  table.layer_norm = Device::layer_norm;
  table.layer_norm_backward = Device::layer_norm_backward;
  table.rms_norm = Device::rms_norm;
  table.rms_norm_backward = Device::rms_norm_backward;
  table.gelu = Device::template unary<gelu<float>>;
  table.gelu_backward = Device::template backward<gelu_derivative<float>>;
  table.gelu_erf = Device::template unary<gelu_erf<float>>;
  table.gelu_erf_backward = Device::template backward<gelu_erf_derivative<float>>;
  table.silu = Device::template unary<silu<float>>;
  table.silu_backward = Device::template backward<silu_derivative<float>>;
  table.swiglu = Device::swiglu;
  table.swiglu_backward = Device::swiglu_backward;
  table.softmax = Device::softmax;
  table.softmax_backward = Device::softmax_backward;
  table.causal_softmax = Device::causal_softmax;
  table.causal_softmax_backward = Device::causal_softmax_backward;
  table.padded_softmax = Device::padded_softmax;
  table.padded_softmax_backward = Device::padded_softmax_backward;
  table.embedding_backward = Device::embedding_backward;
  table.vocabulary_max = Device::vocabulary_max;
  table.cross_entropy_sums = Device::cross_entropy_sums;
  table.cross_entropy_backward = Device::cross_entropy_backward;
  table.dropout = Device::dropout;
  table.adam_step = Device::adam_step;
  return table;
}

}  // namespace
}  // namespace primitives::canonical
