// Entropy and log-probability over a split vocabulary. Definition: docs/canonical-arithmetic.md.
#include "bindings/vocab_entropy.hpp"

#include <ATen/Parallel.h>

#include <algorithm>
#include <thread>

#include "bindings/tensor_checks.hpp"
#include "bindings/vocab_entropy_ranks.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr int64_t kNumelPerThread = 1 << 18;  // less is not worth a thread
constexpr int64_t kStreamNbytes = 8 << 20;    // results that no cache would keep anyway

// body(begin, end) on runs of the tokens, on as many threads as torch may use. A token's result
// does not depend on who computes it. The threads live for one call, so that a process may fork.
template <class Body>
void share_out(int64_t num_tokens, int64_t columns, const Body& body) {
  const int64_t worth = num_tokens * columns / kNumelPerThread;
  const int64_t num_threads =
      std::clamp<int64_t>(std::min<int64_t>(at::get_num_threads(), worth), 1, num_tokens + 1);
  const auto part = [&](int64_t i) {
    body(num_tokens * i / num_threads, num_tokens * (i + 1) / num_threads);
  };
  std::vector<std::jthread> others;
  for (int64_t i = 1; i < num_threads; i++) {
    others.emplace_back([&part, i] {
      const ExactRounding exact;
      part(i);
    });
  }
  part(0);
}

Logits logits_of(const Argument& x, const Columns& columns, double scale) {
  const auto input = x.with_contiguous_rows().input();
  // See [Note: prefetch]: not on Zen 1 to 4.
  static const bool prefetch = !__builtin_cpu_is("amdfam17h") && !__builtin_cpu_is("amdfam19h");
  return {input.data,
          input.dtype,
          x.tensor.stride(0),
          x.tensor.size(1),
          columns.segment_length,
          columns.num_segments,
          static_cast<float>(scale),
          prefetch};
}

Labels labels_of(const char* function, const Targets& targets, int64_t num_tokens, int64_t first) {
  if (!targets.labels) return {nullptr, targets.ignored, first};
  Argument{function, "labels", *targets.labels}.of(at::kLong).shaped({num_tokens}).contiguous();
  return {targets.labels->const_data_ptr<int64_t>(), targets.ignored, first};
}

float* quads_of(const char* function, const at::Tensor& quads, int64_t num_tokens) {
  return Argument{function, "quads", quads}.shaped({num_tokens, 4}).mutable_floats();
}

void forward(const at::Tensor& logits, const Targets& targets, const Columns& columns, double scale,
             Mode, const at::Tensor& quads) {
  const char* name = "vocab_entropy_forward";
  const auto of = logits_of({name, "logits", logits}, columns, scale);
  const int64_t num_tokens = logits.size(0);
  const auto labels = labels_of(name, targets, num_tokens, columns.first);
  float* out = quads_of(name, quads, num_tokens);
  const ExactRounding exact;
  share_out(num_tokens, of.columns,
            [&](int64_t begin, int64_t end) { kernels().forward(of, labels, begin, end, out); });
}

Results finish(const at::Tensor& shards, const Targets& targets, double scale) {
  const char* name = "vocab_entropy_finish";
  const Argument argument{name, "shards", shards};
  argument.of(at::kFloat).with_dims(3);
  const int64_t num_tokens = shards.size(1);
  const auto labels = labels_of(name, targets, num_tokens, 0);
  if (shards.size(2) != 4 || shards.stride(2) != 1 || (num_tokens > 1 && shards.stride(1) != 4)) {
    argument.fail("[ranks, tokens, 4] with contiguous quads",
                  "shape " + argument.text(shards.sizes()) + " with strides " +
                      argument.text(shards.strides()));
  }
  const int num_ranks = static_cast<int>(shards.size(0));
  if (num_ranks != 1 && num_ranks != 2 && num_ranks != 4 && num_ranks != 8 && num_ranks != 16) {
    argument.fail("of 1, 2, 4, 8 or 16 ranks", std::to_string(num_ranks));
  }
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, shards.options()); };
  const Results results{empty({num_tokens, 4}), empty({num_tokens}), empty({num_tokens}),
                        empty({num_tokens})};
  const ExactRounding exact;
  kernels().finish(
      shards.const_data_ptr<float>(), shards.stride(0), num_ranks, labels,
      static_cast<float>(scale), 0, num_tokens, results.quads.mutable_data_ptr<float>(),
      results.entropy.mutable_data_ptr<float>(), results.log_prob.mutable_data_ptr<float>(),
      results.log_sum_exp.mutable_data_ptr<float>());
  return results;
}

// out may be the logits.
void backward(const at::Tensor& logits, const Targets& targets, int64_t first, double scale, Mode,
              const at::Tensor& quads, const ResultGradients& by, const at::Tensor& out) {
  const char* name = "vocab_entropy_backward";
  const auto of = logits_of({name, "logits", logits}, {first, 0, 1}, scale);
  const int64_t num_tokens = logits.size(0);
  const auto labels = labels_of(name, targets, num_tokens, first);
  const float* in = quads_of(name, quads, num_tokens);
  const auto gradient = [&](const char* which, const OptionalTensor& x) {
    return x ? Argument{name, which, *x}.shaped({num_tokens}).floats() : nullptr;
  };
  const Gradients gradients{gradient("grad_entropy", by.entropy),
                            gradient("grad_log_prob", by.log_prob),
                            gradient("grad_log_sum_exp", by.log_sum_exp)};
  const Argument result{name, "out", out};
  result.of(logits.scalar_type()).shaped(logits.sizes()).with_contiguous_rows();
  void* target = out.mutable_data_ptr();
  const bool stream = target != of.data && out.numel() * out.element_size() >= kStreamNbytes;
  const ExactRounding exact;
  share_out(num_tokens, of.columns, [&](int64_t begin, int64_t end) {
    kernels().backward(of, labels, in, gradients, begin, end, target, out.stride(0), stream);
  });
}

bool is_captured(at::Device) { return false; }

uint32_t* words_of(const char* function, const at::Tensor& x) {
  const Argument argument{function, "x", x};
  argument.on_device().contiguous();
  if (x.nbytes() % 1024 != 0) {
    argument.fail("a multiple of 1024 bytes", std::to_string(x.nbytes()));
  }
  return static_cast<uint32_t*>(x.mutable_data_ptr());
}

}  // namespace

const TensorKernels kCpuTensorKernels{forward, finish, backward, is_captured};

const TensorKernels& kernels_on(at::Device device) {
  if (device.is_cpu()) return kCpuTensorKernels;
  std::string kernels_for = "the CPU";
#ifdef PRIMITIVES_CUDA
  if (device.is_cuda()) return kCudaTensorKernels;
  kernels_for += " and CUDA";
#endif
  throw py::value_error("logits: they are on " + device.str() +
                        ", but this build of primitives has kernels for " + kernels_for +
                        (device.is_cuda() ? "; there was no nvcc when it was built: build it again "
                                            "where nvcc is found, PRIMITIVES_CUDA=1 insists"
                                          : ""));
}

Mode mode_of(std::string_view name) {
  if (name == "portable") return Mode::kPortable;
  if (name == "device") return Mode::kDevice;
  throw py::value_error("mode: expected one of portable, device, got '" + std::string(name) + "'");
}

}  // namespace primitives::vocab_entropy

namespace primitives {

void bind_vocab_entropy(py::module_& m) {
  using namespace vocab_entropy;
  using NoGil = py::call_guard<py::gil_scoped_release>;
  m.def(
      "vocab_entropy_forward",
      [](const at::Tensor& logits, OptionalTensor labels, int64_t ignored, int64_t first,
         int64_t segment_length, int num_segments, double scale, const at::Tensor& quads,
         const std::string& mode) {
        kernels_on(logits.device())
            .forward(logits, {std::move(labels), ignored}, {first, segment_length, num_segments},
                     scale, mode_of(mode), quads);
      },
      py::arg("logits"), py::arg("labels"), py::arg("ignored"), py::arg("first"),
      py::arg("segment_length"), py::arg("num_segments"), py::arg("scale"), py::arg("quads"),
      py::arg("mode") = "portable", NoGil());
  m.def(
      "vocab_entropy_finish",
      [](const at::Tensor& shards, OptionalTensor labels, int64_t ignored, double scale) {
        const Results results =
            kernels_on(shards.device()).finish(shards, {std::move(labels), ignored}, scale);
        return std::make_tuple(results.quads, results.entropy, results.log_prob,
                               results.log_sum_exp);
      },
      NoGil());
  m.def(
      "vocab_entropy_backward",
      [](const at::Tensor& logits, OptionalTensor labels, int64_t ignored, int64_t first,
         double scale, const at::Tensor& quads, OptionalTensor entropy, OptionalTensor log_prob,
         OptionalTensor log_sum_exp, const at::Tensor& out, const std::string& mode) {
        kernels_on(logits.device())
            .backward(logits, {std::move(labels), ignored}, first, scale, mode_of(mode), quads,
                      {std::move(entropy), std::move(log_prob), std::move(log_sum_exp)}, out);
      },
      py::arg("logits"), py::arg("labels"), py::arg("ignored"), py::arg("first"), py::arg("scale"),
      py::arg("quads"), py::arg("grad_entropy"), py::arg("grad_log_prob"),
      py::arg("grad_log_sum_exp"), py::arg("out"), py::arg("mode") = "portable", NoGil());
  bind_vocab_entropy_ranks(m);
  m.def("read_words", [](const at::Tensor& x, bool prefetch) {
    const uint32_t* words = words_of("read_words", x);
    const KernelCall call;
    return kernels().read_words(words, static_cast<int64_t>(x.nbytes() / 4), prefetch);
  });
  m.def("flip_words", [](const at::Tensor& x, bool prefetch) {
    uint32_t* words = words_of("flip_words", x);
    const KernelCall call;
    kernels().flip_words(words, static_cast<int64_t>(x.nbytes() / 4), prefetch);
  });
}

}  // namespace primitives
