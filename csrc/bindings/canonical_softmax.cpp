// Softmax of rows, and over the visible columns of attention scores. Formulas:
// docs/canonical-arithmetic.md.
#include "bindings/tensor_checks.hpp"

namespace primitives {
namespace {

using canonical::kernels;

const Argument& square(const Argument& x) {
  x.with_dims(3).contiguous();
  if (x.tensor.size(1) != x.tensor.size(2)) x.fail("[N, S, S]", x.text(x.tensor.sizes()));
  return x;
}

at::Tensor softmax(const at::Tensor& scores, double scale) {
  const Argument argument{"softmax", "scores", scores};
  const auto input = argument.contiguous().input();
  if (scores.dim() == 0) argument.fail("at least 1-dimensional", "a scalar");
  at::Tensor probs = at::empty_like(scores);
  const auto output = Argument{"softmax", "probs", probs}.output();
  if (scores.numel() == 0) return probs;
  const int64_t length = scores.size(-1);
  const KernelCall call;
  kernels().softmax(input, scores.numel() / length, length, static_cast<float>(scale), output);
  return probs;
}

at::Tensor softmax_backward(const at::Tensor& dprobs, const at::Tensor& probs, double scale) {
  const char* name = "softmax_backward";
  const Argument argument{name, "probs", probs};
  const auto input = argument.contiguous().input();
  if (probs.dim() == 0) argument.fail("at least 1-dimensional", "a scalar");
  const auto dprobs_input = Argument{name, "dprobs", dprobs}.like(probs).input();
  at::Tensor dscores = at::empty_like(probs);
  const auto output = Argument{name, "dscores", dscores}.output();
  if (probs.numel() == 0) return dscores;
  const int64_t length = probs.size(-1);
  const KernelCall call;
  kernels().softmax_backward(dprobs_input, input, probs.numel() / length, length,
                             static_cast<float>(scale), output);
  return dscores;
}

at::Tensor causal_softmax(const at::Tensor& scores, double scale) {
  const auto input = square({"causal_softmax", "scores", scores}).input();
  at::Tensor probs = at::empty_like(scores);
  const auto output = Argument{"causal_softmax", "probs", probs}.output();
  const KernelCall call;
  kernels().causal_softmax(input, scores.size(0), scores.size(1), static_cast<float>(scale),
                           output);
  return probs;
}

at::Tensor causal_softmax_backward(const at::Tensor& dprobs, const at::Tensor& probs,
                                   double scale) {
  const char* name = "causal_softmax_backward";
  const auto input = square({name, "probs", probs}).input();
  const auto dprobs_input = Argument{name, "dprobs", dprobs}.like(probs).input();
  at::Tensor dscores = at::empty_like(probs);
  const auto output = Argument{name, "dscores", dscores}.output();
  const KernelCall call;
  kernels().causal_softmax_backward(dprobs_input, input, probs.size(0), probs.size(1),
                                    static_cast<float>(scale), output);
  return dscores;
}

// How many columns each matrix sees: [N] int64 in [1, S].
const int64_t* visible_columns(const char* name, const at::Tensor& visible, int64_t num,
                               int64_t length) {
  const Argument argument{name, "visible", visible};
  argument.of(at::kLong).shaped({num}).contiguous();
  const int64_t* data = visible.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < num; i++) {
    if (data[i] < 1 || data[i] > length) {
      argument.fail("in [1, " + std::to_string(length) + "]",
                    std::to_string(data[i]) + " at position " + std::to_string(i));
    }
  }
  return data;
}

at::Tensor padded_softmax(const at::Tensor& scores, const at::Tensor& visible, double scale) {
  const char* name = "padded_softmax";
  const auto input = square({name, "scores", scores}).input();
  const int64_t* columns = visible_columns(name, visible, scores.size(0), scores.size(1));
  at::Tensor probs = at::empty_like(scores);
  const auto output = Argument{name, "probs", probs}.output();
  const KernelCall call;
  kernels().padded_softmax(input, columns, scores.size(0), scores.size(1),
                           static_cast<float>(scale), output);
  return probs;
}

at::Tensor padded_softmax_backward(const at::Tensor& dprobs, const at::Tensor& probs,
                                   const at::Tensor& visible, double scale) {
  const char* name = "padded_softmax_backward";
  const auto input = square({name, "probs", probs}).input();
  const auto dprobs_input = Argument{name, "dprobs", dprobs}.like(probs).input();
  const int64_t* columns = visible_columns(name, visible, probs.size(0), probs.size(1));
  at::Tensor dscores = at::empty_like(probs);
  const auto output = Argument{name, "dscores", dscores}.output();
  const KernelCall call;
  kernels().padded_softmax_backward(dprobs_input, input, columns, probs.size(0), probs.size(1),
                                    static_cast<float>(scale), output);
  return dscores;
}

}  // namespace

void bind_canonical_softmax(py::module_& m) {
  m.def("canonical_softmax", softmax);
  m.def("canonical_softmax_backward", softmax_backward);
  m.def("canonical_causal_softmax", causal_softmax);
  m.def("canonical_causal_softmax_backward", causal_softmax_backward);
  m.def("canonical_padded_softmax", padded_softmax);
  m.def("canonical_padded_softmax_backward", padded_softmax_backward);
}

}  // namespace primitives
