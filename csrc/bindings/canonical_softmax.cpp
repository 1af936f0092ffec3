// Softmax of rows, and over the visible columns of attention scores. Formulas:
// docs/canonical-arithmetic.md.
#include "bindings/canonical_call.hpp"

namespace primitives {
namespace {

using canonical::Kernels;

const Argument& square(const Argument& x) {
  x.with_dims(3).contiguous();
  if (x.tensor.size(1) != x.tensor.size(2)) x.fail("[N, S, S]", x.text(x.tensor.sizes()));
  return x;
}

at::Tensor softmax(const at::Tensor& scores, double scale) {
  const Call call("softmax", scores);
  const Argument argument = call("scores", scores);
  const auto input = argument.contiguous().input();
  if (scores.dim() == 0) argument.fail("at least 1-dimensional", "a scalar");
  at::Tensor probs = at::empty_like(scores);
  const auto output = call("probs", probs).output();
  if (scores.numel() == 0) return probs;
  const int64_t length = scores.size(-1);
  call.run([&](const Kernels& kernels) {
    kernels.softmax(input, scores.numel() / length, length, static_cast<float>(scale), output);
  });
  return probs;
}

at::Tensor softmax_backward(const at::Tensor& dprobs, const at::Tensor& probs, double scale) {
  const Call call("softmax_backward", probs);
  const Argument argument = call("probs", probs);
  const auto input = argument.contiguous().input();
  if (probs.dim() == 0) argument.fail("at least 1-dimensional", "a scalar");
  const auto dprobs_input = call("dprobs", dprobs).like(probs).input();
  at::Tensor dscores = at::empty_like(probs);
  const auto output = call("dscores", dscores).output();
  if (probs.numel() == 0) return dscores;
  const int64_t length = probs.size(-1);
  call.run([&](const Kernels& kernels) {
    kernels.softmax_backward(dprobs_input, input, probs.numel() / length, length,
                             static_cast<float>(scale), output);
  });
  return dscores;
}

at::Tensor causal_softmax(const at::Tensor& scores, double scale) {
  const Call call("causal_softmax", scores);
  const auto input = square(call("scores", scores)).input();
  at::Tensor probs = at::empty_like(scores);
  const auto output = call("probs", probs).output();
  call.run([&](const Kernels& kernels) {
    kernels.causal_softmax(input, scores.size(0), scores.size(1), static_cast<float>(scale),
                           output);
  });
  return probs;
}

at::Tensor causal_softmax_backward(const at::Tensor& dprobs, const at::Tensor& probs,
                                   double scale) {
  const Call call("causal_softmax_backward", probs);
  const auto input = square(call("probs", probs)).input();
  const auto dprobs_input = call("dprobs", dprobs).like(probs).input();
  at::Tensor dscores = at::empty_like(probs);
  const auto output = call("dscores", dscores).output();
  call.run([&](const Kernels& kernels) {
    kernels.causal_softmax_backward(dprobs_input, input, probs.size(0), probs.size(1),
                                    static_cast<float>(scale), output);
  });
  return dscores;
}

// How many columns each matrix sees: [N] int64 in [1, S].
const int64_t* visible_columns(const Argument& visible, int64_t num, int64_t length) {
  visible.shaped({num});
  return visible.integers_in(1, length + 1, "[1, " + std::to_string(length) + "]");
}

at::Tensor padded_softmax(const at::Tensor& scores, const at::Tensor& visible, double scale) {
  const Call call("padded_softmax", scores);
  const auto input = square(call("scores", scores)).input();
  const int64_t* columns =
      visible_columns(call("visible", visible), scores.size(0), scores.size(1));
  at::Tensor probs = at::empty_like(scores);
  const auto output = call("probs", probs).output();
  call.run([&](const Kernels& kernels) {
    kernels.padded_softmax(input, columns, scores.size(0), scores.size(1),
                           static_cast<float>(scale), output);
  });
  return probs;
}

at::Tensor padded_softmax_backward(const at::Tensor& dprobs, const at::Tensor& probs,
                                   const at::Tensor& visible, double scale) {
  const Call call("padded_softmax_backward", probs);
  const auto input = square(call("probs", probs)).input();
  const auto dprobs_input = call("dprobs", dprobs).like(probs).input();
  const int64_t* columns = visible_columns(call("visible", visible), probs.size(0), probs.size(1));
  at::Tensor dscores = at::empty_like(probs);
  const auto output = call("dscores", dscores).output();
  call.run([&](const Kernels& kernels) {
    kernels.padded_softmax_backward(dprobs_input, input, columns, probs.size(0), probs.size(1),
                                    static_cast<float>(scale), output);
  });
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
