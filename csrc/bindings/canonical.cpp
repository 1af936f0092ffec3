// Matrix products, sums and elementwise functions. Formulas: docs/canonical-arithmetic.md.
#include "bindings/canonical_call.hpp"
#include "canonical/cuda/kernels.hpp"

namespace primitives {
namespace {

using canonical::Input;
using canonical::Kernels;
using OptionalTensor = std::optional<at::Tensor>;

at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, bool transpose_a, bool transpose_b,
                const OptionalTensor& bias, double alpha, at::ScalarType out_dtype) {
  const Call call("gemm", a);
  for (const Argument& x : {call("a", a), call("b", b)}) {
    const auto dims = x.tensor.dim();
    if (dims != 2 && dims != 3) x.fail("2- or 3-dimensional", "shape " + x.text(x.tensor.sizes()));
    if (x.tensor.stride(-1) != 1 && x.tensor.size(-1) > 1) {
      x.fail("stored with contiguous rows", "strides " + x.text(x.tensor.strides()));
    }
  }
  const int64_t m = a.size(transpose_a ? -1 : -2), k = a.size(transpose_a ? -2 : -1);
  const int64_t n = b.size(transpose_b ? -2 : -1), b_k = b.size(transpose_b ? -1 : -2);
  if (k != b_k) {
    call("b", b).fail("k = " + std::to_string(k) + " long like a " + Argument::text(a.sizes()),
                      Argument::text(b.sizes()));
  }
  const bool batched = a.dim() == 3 || b.dim() == 3;
  const int64_t num_batches = a.dim() == 3 ? a.size(0) : b.dim() == 3 ? b.size(0) : 1;
  if (b.dim() == 3 && b.size(0) != num_batches) {
    call("b", b).fail(std::to_string(num_batches) + " batches like a", Argument::text(b.sizes()));
  }
  Input bias_input{nullptr, canonical::Dtype::kFloat32};
  if (bias) {
    const Argument argument = call("bias", *bias);
    bias_input = argument.contiguous().input();
    if (bias->dim() == 2) {
      argument.shaped({num_batches, n});
    } else {
      argument.shaped({n});
    }
  }
  at::Tensor out =
      batched ? call.empty({num_batches, m, n}, out_dtype) : call.empty({m, n}, out_dtype);
  const canonical::Gemm arguments{call("a", a).input(),
                                  call("b", b).input(),
                                  bias_input,
                                  call("out_dtype", out).output(),
                                  num_batches,
                                  m,
                                  n,
                                  k,
                                  a.dim() == 3 ? a.stride(0) : 0,
                                  a.stride(-2),
                                  b.dim() == 3 ? b.stride(0) : 0,
                                  b.stride(-2),
                                  bias && bias->dim() == 2 ? n : 0,
                                  transpose_a,
                                  transpose_b,
                                  static_cast<float>(alpha)};
  call.run([&](const Kernels& kernels) { kernels.gemm(arguments); });
  return out;
}

at::Tensor tree_sum(const at::Tensor& x, int64_t dim, const OptionalTensor& bias,
                    at::ScalarType out_dtype) {
  const Call call("tree_sum", x);
  const Argument argument = call("x", x);
  argument.contiguous();
  if (dim < -x.dim() || dim >= x.dim()) {
    argument.fail("of more than " + std::to_string(dim < 0 ? -dim - 1 : dim) +
                      " dimensions to sum along dim " + std::to_string(dim),
                  "shape " + Argument::text(x.sizes()));
  }
  if (dim < 0) dim += x.dim();
  int64_t outer = 1, inner = 1;
  std::vector<int64_t> shape;
  for (int64_t i = 0; i < x.dim(); i++) {
    if (i < dim) outer *= x.size(i);
    if (i > dim) inner *= x.size(i);
    if (i != dim) shape.push_back(x.size(i));
  }
  Input bias_input{nullptr, canonical::Dtype::kFloat32};
  int64_t rows = 1, length = inner;
  if (bias) {
    const Argument bias_argument = call("bias", *bias);
    if (dim + 1 == x.dim()) bias_argument.fail("None when the last dim is summed", "a tensor");
    bias_input = bias_argument.contiguous().shaped({x.size(-1)}).input();
    length = x.size(-1);
    rows = length > 0 ? inner / length : 0;
  }
  at::Tensor out = call.empty(shape, out_dtype);
  const auto x_input = argument.input();
  const auto output = call("out_dtype", out).output();
  call.run([&](const Kernels& kernels) {
    kernels.tree_sum(x_input, outer, x.size(dim), rows, length, bias_input, output);
  });
  return out;
}

at::Tensor token_block_sum(const at::Tensor& dy, int64_t num_blocks) {
  const Call call("token_block_sum", dy);
  const Argument argument = call("dy", dy);
  argument.with_dims(2).contiguous().in_blocks(num_blocks);
  at::Tensor out = call.empty({num_blocks, dy.size(1)});
  const auto input = argument.input();
  const auto output = call("out", out).output();
  call.run([&](const Kernels& kernels) {
    kernels.tree_sum(input, num_blocks, dy.size(0) / num_blocks, 1, dy.size(1),
                     {nullptr, canonical::Dtype::kFloat32}, output);
  });
  return out;
}

at::Tensor sum_of_squares(const at::Tensor& x) {
  const Call call("sum_of_squares", x);
  const Argument argument = call("x", x);
  const float* data = argument.floats();
  if (x.dim() == 0) argument.fail("at least 1-dimensional", "a scalar");
  at::Tensor out = call.empty(x.sizes().slice(0, x.dim() - 1));
  float* result = out.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.sum_of_squares(data, out.numel(), x.size(-1), result);
  });
  return out;
}

template <canonical::Elementwise kFunction>
at::Tensor elementwise(const at::Tensor& x) {
  const Call call("elementwise function", x);
  const float* data = call("x", x).floats();
  at::Tensor out = at::empty_like(x);
  float* result = out.mutable_data_ptr<float>();
  call.run(
      [&](const Kernels& kernels) { kernels.elementwise(kFunction, data, x.numel(), result); });
  return out;
}

// Instead of the CPU's, where it is set.
const Kernels* emulated = nullptr;

}  // namespace

Call::Call(const char* name, const at::Tensor& first)
    : name_(name), device_(first.is_cuda() ? first.device() : at::kCPU) {
#ifndef PRIMITIVES_CUDA
  if (on_cuda()) {
    throw py::value_error(std::string(name) + ": the tensors are on " + device_.str() +
                          ", but this build has no CUDA kernels (there was no nvcc)");
  }
#endif
}

const Kernels& Call::kernels() const {
#ifdef PRIMITIVES_CUDA
  if (on_cuda()) {
    void* stream = c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
    canonical::set_cuda_stream({device_.index(), stream});
    return canonical::cuda_kernels();
  }
#endif
  return emulated ? *emulated : canonical::kernels();
}

void bind_canonical(py::module_& m) {
  using canonical::Elementwise;
  m.def("canonical_gemm", gemm);
  m.def("canonical_tree_sum", tree_sum);
  m.def("canonical_token_block_sum", token_block_sum);
  m.def("canonical_sum_of_squares", sum_of_squares);
  m.def("canonical_exp", elementwise<Elementwise::kExp>);
  m.def("canonical_log", elementwise<Elementwise::kLog>);
  m.def("canonical_sqrt", elementwise<Elementwise::kSqrt>);
  m.def("canonical_tanh", elementwise<Elementwise::kTanh>);
  m.def("canonical_erf", elementwise<Elementwise::kErf>);
  m.def("canonical_sigmoid", elementwise<Elementwise::kSigmoid>);
  m.def("canonical_rsqrt", elementwise<Elementwise::kRsqrt>);
  m.def(
      "emulate_canonical",
      [](uintptr_t table) { emulated = reinterpret_cast<const Kernels*>(table); },
      "For tests: CPU tensors go to the Kernels at this address; 0 for those of the CPU again.");
  bind_canonical_layers(m);
  bind_canonical_softmax(m);
  bind_canonical_training(m);
}

}  // namespace primitives
