// The operators primitives::vocab_entropy and its backward, for autograd and torch.compile.
//
// They check their arguments when they run, not when they are traced: then only shapes are known.
// What a trace needs beside them, their results' shapes, is in primitives/vocab_parallel/ops.py.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "bindings/tensor_checks.hpp"
#include "bindings/vocab_entropy_ranks.hpp"

namespace primitives::vocab_entropy {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;
using FourTensors = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;
using OptionalSymInt = std::optional<c10::SymInt>;

at::IntArrayRef tokens_shape(const at::Tensor& logits) {
  return logits.sizes().slice(0, static_cast<size_t>(logits.dim()) - 1);
}

// [..., columns] as [tokens, columns] with contiguous rows; copied only where it must be.
at::Tensor rows_of(at::Tensor logits) {
  const auto type = logits.scalar_type();
  const bool known = type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
  if (logits.dim() < 1 || !known || logits.layout() != at::kStrided) {
    std::ostringstream got;
    got << logits.sizes() << " of " << dtype_name(type) << ", " << logits.layout() << ", on "
        << logits.device();
    throw py::value_error(
        "logits: expected a dense [..., columns] of float32, bfloat16 or float16, got " +
        got.str());
  }
  const int64_t columns = logits.size(-1);
  const int64_t num_tokens = c10::multiply_integers(tokens_shape(logits));
  if (columns > 1 && logits.stride(-1) != 1) logits = logits.contiguous();
  const at::Tensor rows = logits.reshape({num_tokens, columns});
  return num_tokens <= 1 || rows.stride(0) >= columns ? rows : rows.contiguous();
}

// What forward and backward have in common.
struct Problem {
  Problem(const at::Tensor& of, const OptionalTensor& labels, const std::string& group_name,
          std::optional<int64_t> vocab_size, int64_t ignore_index, double temperature,
          std::string_view mode_name)
      : ranks(group_name),
        mode(mode_of(mode_name)),
        kernels(kernels_on(of.device())),
        rows(rows_of(of)),
        targets{labels_for(of, labels), ignore_index},
        shard(ranks.shard_of(of.size(-1), vocab_size)),
        scale(scale_of(temperature)) {}

  Ranks ranks;
  Mode mode;
  const TensorKernels& kernels;
  at::Tensor rows;
  Targets targets;
  Shard shard;
  double scale;
};

FourTensors forward(const at::Tensor& logits, const OptionalTensor& labels,
                    std::string_view group_name, std::optional<int64_t> vocab_size,
                    int64_t ignore_index, double temperature, bool, std::string_view mode,
                    bool check_input) {
  const Problem problem(logits, labels, std::string(group_name), vocab_size, ignore_index,
                        temperature, mode);
  const bool reads_back = check_input && (labels || !problem.ranks.alone());
  if (reads_back && problem.kernels.is_captured(logits.device())) {
    throw py::value_error("check_input: expected False while a CUDA graph is captured, got True");
  }
  Message message(problem.rows.size(0), logits.device());
  if (reads_back) message.write_header(problem.shard.vocab_size(), problem.targets);
  problem.kernels.forward(problem.rows, problem.targets, problem.shard.columns(), problem.scale,
                          problem.mode, message.quads());
  const auto shape = tokens_shape(logits);
  const at::Tensor shards = message.exchange(problem.ranks);
  if (reads_back) message.check_headers(shape);
  const Results results = problem.kernels.finish(shards, problem.targets, problem.scale);
  std::vector<int64_t> quads_shape = shape.vec();
  quads_shape.push_back(4);
  return {results.entropy.view(shape), results.log_prob.view(shape),
          results.log_sum_exp.view(shape), results.quads.view(quads_shape)};
}

void write_gradient(const at::Tensor& out, const at::Tensor& logits, const OptionalTensor& labels,
                    const at::Tensor& quads, const ResultGradients& gradients,
                    std::string_view group_name, std::optional<int64_t> vocab_size,
                    int64_t ignore_index, double temperature, std::string_view mode) {
  const Problem problem(logits, labels, std::string(group_name), vocab_size, ignore_index,
                        temperature, mode);
  const auto flat = [](const OptionalTensor& x) {
    return x ? OptionalTensor(x->reshape(-1).contiguous()) : x;
  };
  const ResultGradients by{flat(gradients.entropy), flat(gradients.log_prob),
                           flat(gradients.log_sum_exp)};
  problem.kernels.backward(problem.rows, problem.targets, problem.shard.columns().first,
                           problem.scale, problem.mode, quads.view({problem.rows.size(0), 4}), by,
                           out.view(problem.rows.sizes()));
}

at::Tensor backward(const at::Tensor& logits, const OptionalTensor& labels, const at::Tensor& quads,
                    const OptionalTensor& entropy, const OptionalTensor& log_prob,
                    const OptionalTensor& log_sum_exp, std::string_view group_name,
                    std::optional<int64_t> vocab_size, int64_t ignore_index, double temperature,
                    std::string_view mode) {
  const at::Tensor out = at::empty(logits.sizes(), logits.options());
  write_gradient(out, logits, labels, quads, {entropy, log_prob, log_sum_exp}, group_name,
                 vocab_size, ignore_index, temperature, mode);
  return out;
}

void backward_in_place(const at::Tensor& logits, const OptionalTensor& labels,
                       const at::Tensor& quads, const OptionalTensor& entropy,
                       const OptionalTensor& log_prob, const OptionalTensor& log_sum_exp,
                       std::string_view group_name, std::optional<int64_t> vocab_size,
                       int64_t ignore_index, double temperature, std::string_view mode) {
  write_gradient(logits, logits, labels, quads, {entropy, log_prob, log_sum_exp}, group_name,
                 vocab_size, ignore_index, temperature, mode);
  if (!logits.is_inference()) logits.unsafeGetTensorImpl()->bump_version();  // autograd checks it
}

template <class Signature>
auto operator_named(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

template <class Result>
using BackwardSignature = Result(const at::Tensor&, const OptionalTensor&, const at::Tensor&,
                                 const OptionalTensor&, const OptionalTensor&,
                                 const OptionalTensor&, std::string_view, OptionalSymInt,
                                 c10::SymInt, double, std::string_view);

class VocabEntropy : public torch::autograd::Function<VocabEntropy> {
 public:
  // `quads` is no output: compiled autograd knows none without a gradient.
  static variable_list forward(AutogradContext* ctx, at::Tensor* quads, const at::Tensor& logits,
                               const OptionalTensor& labels, std::string_view group_name,
                               OptionalSymInt vocab_size, c10::SymInt ignore_index,
                               double temperature, bool inplace_backward, std::string_view mode,
                               bool check_input) {
    static const auto op = operator_named<FourTensors(
        const at::Tensor&, const OptionalTensor&, std::string_view, OptionalSymInt, c10::SymInt,
        double, bool, std::string_view, bool)>("primitives::vocab_entropy");
    const at::AutoDispatchBelowADInplaceOrView below;
    at::Tensor entropy, log_prob, log_sum_exp;
    std::tie(entropy, log_prob, log_sum_exp, *quads) =
        op.call(logits, labels, group_name, vocab_size, ignore_index, temperature, inplace_backward,
                mode, check_input);
    ctx->save_for_backward({logits, labels.value_or(at::Tensor()), *quads});
    ctx->set_materialize_grads(false);
    ctx->saved_data["group_name"] = std::string(group_name);
    ctx->saved_data["vocab_size"] = vocab_size;
    ctx->saved_data["ignore_index"] = ignore_index;
    ctx->saved_data["temperature"] = temperature;
    ctx->saved_data["inplace_backward"] = inplace_backward;
    ctx->saved_data["mode"] = std::string(mode);
    return {entropy, log_prob, log_sum_exp};
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    variable_list result(10);  // one for each argument of forward
    const auto given = [&](size_t i) {
      return gradients[i].defined() ? OptionalTensor(gradients[i]) : std::nullopt;
    };
    if (!given(0) && !given(1) && !given(2)) return result;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor& logits = saved[0];
    const auto labels = saved[1].defined() ? OptionalTensor(saved[1]) : std::nullopt;
    const auto& settings = ctx->saved_data;
    const auto call = [&](const auto& op) {
      return op.call(logits, labels, saved[2], given(0), given(1), given(2),
                     settings.at("group_name").toStringRef(),
                     settings.at("vocab_size").toOptional<c10::SymInt>(),
                     settings.at("ignore_index").toSymInt(), settings.at("temperature").toDouble(),
                     settings.at("mode").toStringRef());
    };
    if (settings.at("inplace_backward").toBool()) {
      TORCH_CHECK(!at::GradMode::is_enabled(),
                  "inplace_backward: the derivative of the gradient is not implemented, expected "
                  "create_graph=False");
      static const auto op =
          operator_named<BackwardSignature<void>>("primitives::vocab_entropy_backward_");
      call(op);
      result[1] = logits.detach();
    } else {
      static const auto op =
          operator_named<BackwardSignature<at::Tensor>>("primitives::vocab_entropy_backward");
      result[1] = call(op);
    }
    return result;
  }
};

FourTensors with_autograd(const at::Tensor& logits, const OptionalTensor& labels,
                          std::string_view group_name, OptionalSymInt vocab_size,
                          c10::SymInt ignore_index, double temperature, bool inplace_backward,
                          std::string_view mode, bool check_input) {
  at::Tensor quads;
  const auto results = VocabEntropy::apply(&quads, logits, labels, group_name,
                                           std::move(vocab_size), std::move(ignore_index),
                                           temperature, inplace_backward, mode, check_input);
  return {results[0], results[1], results[2], quads};
}

const std::string kBackwardArguments =
    "Tensor? labels, Tensor quads, Tensor? grad_entropy, Tensor? grad_log_prob, "
    "Tensor? grad_log_sum_exp, str group_name, SymInt? vocab_size, SymInt ignore_index, "
    "float temperature, str ";

}  // namespace

TORCH_LIBRARY_FRAGMENT(primitives, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "vocab_entropy(Tensor logits, Tensor? labels, str group_name, SymInt? vocab_size, "
      "SymInt ignore_index, float temperature, bool inplace_backward, str mode=\"portable\", "
      "bool check_input=True) -> (Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(("vocab_entropy_backward(Tensor logits, " + kBackwardArguments +
         "mode=\"portable\") -> Tensor")
            .c_str(),
        tags);
  // (Functionalization has an argument of its own that is called mode.)
  m.def(("vocab_entropy_backward_(Tensor(a!) logits, " + kBackwardArguments +
         "exp_mode=\"portable\") -> ()")
            .c_str(),
        tags);
}

TORCH_LIBRARY_IMPL(primitives, CompositeExplicitAutograd, m) {
  m.impl("vocab_entropy", forward);
  m.impl("vocab_entropy_backward", backward);
  m.impl("vocab_entropy_backward_", backward_in_place);
}

TORCH_LIBRARY_IMPL(primitives, Autograd, m) {
  m.impl("vocab_entropy", with_autograd);
  m.impl("vocab_entropy_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("vocab_entropy_backward_", torch::autograd::autogradNotImplementedFallback());
}

}  // namespace primitives::vocab_entropy
