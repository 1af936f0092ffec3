// LayerNorm, RMSNorm and the activations. Formulas: docs/canonical-arithmetic.md.
#include "bindings/canonical_call.hpp"

namespace primitives {
namespace {

using canonical::Input;
using canonical::Kernels;

// [tokens, hidden], hidden above 0.
const Argument& token_rows(const Argument& x) {
  x.with_dims(2).contiguous();
  if (x.tensor.size(1) == 0) x.fail("of a hidden size above 0", "0");
  return x;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm(const at::Tensor& x,
                                                          const at::Tensor& weight,
                                                          const at::Tensor& bias, double eps) {
  const Call call("layer_norm", x);
  const auto x_input = token_rows(call("x", x)).input();
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const auto w = call("weight", weight).shaped({hidden}).contiguous().input();
  const auto b = call("bias", bias).shaped({hidden}).contiguous().input();
  at::Tensor y = at::empty_like(x), mean = call.empty({tokens}), rstd = at::empty_like(mean);
  const auto output = call("y", y).output();
  float* means = mean.mutable_data_ptr<float>();
  float* rstds = rstd.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.layer_norm(x_input, w, b, static_cast<float>(eps), tokens, hidden, output, means,
                       rstds);
  });
  return {y, mean, rstd};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> layer_norm_backward(
    const at::Tensor& dy, const at::Tensor& x, const at::Tensor& mean, const at::Tensor& rstd,
    const at::Tensor& weight, int64_t num_blocks) {
  const Call call("layer_norm_backward", x);
  const auto x_input = token_rows(call("x", x)).in_blocks(num_blocks).input();
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const auto dy_input = call("dy", dy).like(x).input();
  const float* means = call("mean", mean).shaped({tokens}).floats();
  const float* rstds = call("rstd", rstd).shaped({tokens}).floats();
  const auto w = call("weight", weight).shaped({hidden}).contiguous().input();
  at::Tensor dx = at::empty_like(x), dweight = call.empty({num_blocks, hidden});
  at::Tensor dbias = at::empty_like(dweight);
  const auto output = call("dx", dx).output();
  float* dweights = dweight.mutable_data_ptr<float>();
  float* dbiases = dbias.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.layer_norm_backward(dy_input, x_input, means, rstds, w, tokens, hidden, num_blocks,
                                output, dweights, dbiases);
  });
  return {dx, dweight, dbias};
}

std::tuple<at::Tensor, at::Tensor> rms_norm(const at::Tensor& x, const at::Tensor& weight,
                                            double eps) {
  const Call call("rms_norm", x);
  const auto x_input = token_rows(call("x", x)).input();
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const auto w = call("weight", weight).shaped({hidden}).contiguous().input();
  at::Tensor y = at::empty_like(x), rstd = call.empty({tokens});
  const auto output = call("y", y).output();
  float* rstds = rstd.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.rms_norm(x_input, w, static_cast<float>(eps), tokens, hidden, output, rstds);
  });
  return {y, rstd};
}

std::tuple<at::Tensor, at::Tensor> rms_norm_backward(const at::Tensor& dy, const at::Tensor& x,
                                                     const at::Tensor& rstd,
                                                     const at::Tensor& weight, int64_t num_blocks) {
  const Call call("rms_norm_backward", x);
  const auto x_input = token_rows(call("x", x)).in_blocks(num_blocks).input();
  const int64_t tokens = x.size(0), hidden = x.size(1);
  const auto dy_input = call("dy", dy).like(x).input();
  const float* rstds = call("rstd", rstd).shaped({tokens}).floats();
  const auto w = call("weight", weight).shaped({hidden}).contiguous().input();
  at::Tensor dx = at::empty_like(x), dweight = call.empty({num_blocks, hidden});
  const auto output = call("dx", dx).output();
  float* dweights = dweight.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.rms_norm_backward(dy_input, x_input, rstds, w, tokens, hidden, num_blocks, output,
                              dweights);
  });
  return {dx, dweight};
}

using Activation = void (*Kernels::*)(Input x, int64_t n, canonical::Output y);
using ActivationBackward = void (*Kernels::*)(Input dy, Input x, int64_t n, canonical::Output dx);

at::Tensor activation(const char* name, Activation kernel, const at::Tensor& x) {
  const Call call(name, x);
  const auto input = call("x", x).contiguous().input();
  at::Tensor y = at::empty_like(x);
  const auto output = call("y", y).output();
  call.run([&](const Kernels& kernels) { (kernels.*kernel)(input, x.numel(), output); });
  return y;
}

at::Tensor activation_backward(const char* name, ActivationBackward kernel, const at::Tensor& dy,
                               const at::Tensor& x) {
  const Call call(name, x);
  const auto input = call("x", x).contiguous().input();
  const auto dy_input = call("dy", dy).like(x).input();
  at::Tensor dx = at::empty_like(x);
  const auto output = call("dx", dx).output();
  call.run([&](const Kernels& kernels) { (kernels.*kernel)(dy_input, input, x.numel(), output); });
  return dx;
}

at::Tensor gelu(const at::Tensor& x) { return activation("gelu", &Kernels::gelu, x); }

at::Tensor gelu_backward(const at::Tensor& dy, const at::Tensor& x) {
  return activation_backward("gelu_backward", &Kernels::gelu_backward, dy, x);
}

at::Tensor gelu_erf(const at::Tensor& x) { return activation("gelu_erf", &Kernels::gelu_erf, x); }

at::Tensor gelu_erf_backward(const at::Tensor& dy, const at::Tensor& x) {
  return activation_backward("gelu_erf_backward", &Kernels::gelu_erf_backward, dy, x);
}

at::Tensor silu(const at::Tensor& x) { return activation("silu", &Kernels::silu, x); }

at::Tensor silu_backward(const at::Tensor& dy, const at::Tensor& x) {
  return activation_backward("silu_backward", &Kernels::silu_backward, dy, x);
}

at::Tensor swiglu(const at::Tensor& gate, const at::Tensor& value) {
  const Call call("swiglu", gate);
  const auto gate_input = call("gate", gate).contiguous().input();
  const auto value_input = call("value", value).like(gate).input();
  at::Tensor y = at::empty_like(gate);
  const auto output = call("y", y).output();
  call.run([&](const Kernels& kernels) {
    kernels.swiglu(gate_input, value_input, gate.numel(), output);
  });
  return y;
}

std::tuple<at::Tensor, at::Tensor> swiglu_backward(const at::Tensor& dy, const at::Tensor& gate,
                                                   const at::Tensor& value) {
  const Call call("swiglu_backward", gate);
  const auto gate_input = call("gate", gate).contiguous().input();
  const auto dy_input = call("dy", dy).like(gate).input();
  const auto value_input = call("value", value).like(gate).input();
  at::Tensor dgate = at::empty_like(gate), dvalue = at::empty_like(gate);
  const auto dgate_output = call("dgate", dgate).output();
  const auto dvalue_output = call("dvalue", dvalue).output();
  call.run([&](const Kernels& kernels) {
    kernels.swiglu_backward(dy_input, gate_input, value_input, gate.numel(), dgate_output,
                            dvalue_output);
  });
  return {dgate, dvalue};
}

}  // namespace

void bind_canonical_layers(py::module_& m) {
  m.def("canonical_layer_norm", layer_norm);
  m.def("canonical_layer_norm_backward", layer_norm_backward);
  m.def("canonical_rms_norm", rms_norm);
  m.def("canonical_rms_norm_backward", rms_norm_backward);
  m.def("canonical_gelu", gelu);
  m.def("canonical_gelu_backward", gelu_backward);
  m.def("canonical_gelu_erf", gelu_erf);
  m.def("canonical_gelu_erf_backward", gelu_erf_backward);
  m.def("canonical_silu", silu);
  m.def("canonical_silu_backward", silu_backward);
  m.def("canonical_swiglu", swiglu);
  m.def("canonical_swiglu_backward", swiglu_backward);
}

}  // namespace primitives
