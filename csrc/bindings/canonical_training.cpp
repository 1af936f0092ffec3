// Embedding, cross entropy, random numbers, dropout and the optimizer step.
#include "bindings/canonical_call.hpp"

namespace primitives {
namespace {

using canonical::Input;
using canonical::Kernels;
using OptionalTensor = std::optional<at::Tensor>;

at::Tensor embedding(const at::Tensor& ids, const at::Tensor& weight) {
  const Call call("embedding", weight);
  call("weight", weight).with_dims(3).contiguous().input();
  call("ids", ids).with_dims(1).indices(weight.size(0) * weight.size(1));
  return weight.view({-1, weight.size(2)}).index_select(0, ids);
}

at::Tensor embedding_backward(const at::Tensor& dy, const at::Tensor& ids,
                              std::tuple<int64_t, int64_t, int64_t> vocab_shape) {
  const Call call("embedding_backward", dy);
  const auto [parts, width, hidden] = vocab_shape;
  const int64_t* rows = call("ids", ids).with_dims(1).indices(parts * width);
  const auto input = call("dy", dy).shaped({ids.size(0), hidden}).contiguous().input();
  at::Tensor table = call.empty({parts, width, hidden}).zero_();
  float* out = table.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.embedding_backward(input, rows, dy.size(0), hidden, parts * width, out);
  });
  return table;
}

at::Tensor vocabulary_max(const at::Tensor& logits) {
  const Call call("vocabulary_max", logits);
  const auto input = call("logits", logits).with_dims(3).contiguous().input();
  const int64_t parts = logits.size(0), tokens = logits.size(1), width = logits.size(2);
  at::Tensor max = call.empty({tokens});
  float* maxima = max.mutable_data_ptr<float>();
  call.run(
      [&](const Kernels& kernels) { kernels.vocabulary_max(input, parts, tokens, width, maxima); });
  return max;
}

// ``targets`` are global; ``first`` is the vocabulary index of the first of these logits.
std::tuple<at::Tensor, at::Tensor> cross_entropy_sums(const at::Tensor& logits,
                                                      const at::Tensor& targets,
                                                      const at::Tensor& max, int64_t first,
                                                      int64_t vocab_size) {
  const Call call("cross_entropy", logits);
  const auto input = call("logits", logits).with_dims(3).contiguous().input();
  const int64_t parts = logits.size(0), tokens = logits.size(1), width = logits.size(2);
  const int64_t* target = call("targets", targets).shaped({tokens}).indices(vocab_size);
  const float* maxima = call("max", max).shaped({tokens}).floats();
  at::Tensor sum_exp = call.empty({tokens});
  at::Tensor target_logit = at::empty_like(sum_exp);
  float* sums = sum_exp.mutable_data_ptr<float>();
  float* target_logits = target_logit.mutable_data_ptr<float>();
  call.run([&](const Kernels& kernels) {
    kernels.cross_entropy_sums(input, target, first, maxima, parts, tokens, width, sums,
                               target_logits);
  });
  return {sum_exp, target_logit};
}

at::Tensor cross_entropy_backward(const at::Tensor& logits, const at::Tensor& targets,
                                  const at::Tensor& max, const at::Tensor& sum_exp,
                                  const at::Tensor& grad_loss, int64_t first, int64_t vocab_size) {
  const Call call("cross_entropy_backward", logits);
  const auto input = call("logits", logits).with_dims(3).contiguous().input();
  const int64_t parts = logits.size(0), tokens = logits.size(1), width = logits.size(2);
  const int64_t* target = call("targets", targets).shaped({tokens}).indices(vocab_size);
  const float* maxima = call("max", max).shaped({tokens}).floats();
  const float* sums = call("sum_exp", sum_exp).shaped({tokens}).floats();
  const float* grads = call("grad_loss", grad_loss).shaped({tokens}).floats();
  at::Tensor dlogits = at::empty_like(logits);
  const auto output = call("dlogits", dlogits).output();
  call.run([&](const Kernels& kernels) {
    kernels.cross_entropy_backward(input, target, first, maxima, sums, grads, parts, tokens, width,
                                   output);
  });
  return dlogits;
}

at::Tensor random_normal(const std::vector<int64_t>& shape, uint64_t key, uint64_t first_index) {
  at::Tensor out = at::empty(shape, at::TensorOptions().dtype(at::kFloat));
  float* data = out.mutable_data_ptr<float>();
  const KernelCall call;
  canonical::kernels().random_normal(key, first_index, out.numel(), data);
  return out;
}

// Words of Philox as int32 bit patterns, for known-answer tests.
at::Tensor random_words(int64_t num_words, uint64_t key, uint64_t counter_high) {
  at::Tensor out = at::empty({num_words}, at::TensorOptions().dtype(at::kInt));
  auto* data = reinterpret_cast<uint32_t*>(out.mutable_data_ptr<int32_t>());
  const KernelCall call;
  canonical::kernels().random_words(key, counter_high, num_words, data);
  return out;
}

at::Tensor dropout(const at::Tensor& x, const OptionalTensor& residual, double probability,
                   uint64_t key, const at::Tensor& row_ids) {
  const char* name = residual ? "dropout_add" : "dropout";
  const char* x_name = residual ? "y" : "x";
  if (!(probability >= 0.0 && probability < 1.0)) {
    throw py::value_error(std::string(name) + ": probability must be in [0, 1), got " +
                          std::to_string(probability));
  }
  const Call call(name, x);
  const auto input = call(x_name, x).with_dims(2).contiguous().input();
  Input residual_input{nullptr, canonical::Dtype::kFloat32};
  if (residual) {
    residual_input = call("residual", *residual).like(x).input();
  }
  const int64_t* row_id = call("row_ids", row_ids).shaped({x.size(0)}).integers();
  at::Tensor out = at::empty_like(x);
  const auto output = call("out", out).output();
  const canonical::Dropout arguments{key, static_cast<uint32_t>(probability * 4294967296.0),
                                     static_cast<float>(1.0 / (1.0 - probability))};
  call.run([&](const Kernels& kernels) {
    kernels.dropout(input, residual_input, arguments, row_id, x.size(0), x.size(1), output);
  });
  return out;
}

void adam_step(const at::Tensor& param, const at::Tensor& grad, const at::Tensor& exp_avg,
               const at::Tensor& exp_avg_sq, double lr, double beta1, double beta2, double eps,
               double weight_decay, double bias_correction1, double bias_correction2_sqrt) {
  const Call call("adam_step", param);
  const auto shape = param.sizes();
  float* p = call("param", param).mutable_floats();
  const float* g = call("grad", grad).shaped(shape).floats();
  float* m = call("exp_avg", exp_avg).shaped(shape).mutable_floats();
  float* v = call("exp_avg_sq", exp_avg_sq).shaped(shape).mutable_floats();
  const canonical::AdamStep step{
      .beta1 = static_cast<float>(beta1),
      .one_minus_beta1 = static_cast<float>(1.0 - beta1),
      .beta2 = static_cast<float>(beta2),
      .one_minus_beta2 = static_cast<float>(1.0 - beta2),
      .eps = static_cast<float>(eps),
      .decay = static_cast<float>(1.0 - lr * weight_decay),
      .step_size = static_cast<float>(lr / bias_correction1),
      .bias_correction2_sqrt = static_cast<float>(bias_correction2_sqrt)};
  call.run([&](const Kernels& kernels) { kernels.adam_step(step, param.numel(), p, g, m, v); });
}

int64_t count_zeros(const at::Tensor& x) {
  const Call call("count_zeros", x);
  const auto input = call("x", x).contiguous().input();
  if (call.on_cuda()) return (x == 0).sum().item<int64_t>();
  const KernelCall no_gil;
  return canonical::kernels().count_zeros(input, x.numel());
}

}  // namespace

void bind_canonical_training(py::module_& m) {
  m.def("canonical_embedding", embedding);
  m.def("canonical_embedding_backward", embedding_backward);
  m.def("canonical_vocabulary_max", vocabulary_max);
  m.def("canonical_cross_entropy_sums", cross_entropy_sums);
  m.def("canonical_cross_entropy_backward", cross_entropy_backward);
  m.def("canonical_random_normal", random_normal);
  m.def("canonical_random_words", random_words);
  m.def("canonical_dropout", dropout);
  m.def("canonical_adam_step", adam_step);
  m.def("canonical_count_zeros", count_zeros);
}

}  // namespace primitives
