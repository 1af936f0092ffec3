// Entropy and log-probability over a split vocabulary. Definition: docs/canonical-arithmetic.md.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "bindings/tensor_checks.hpp"
#include "vocab_entropy/kernels.hpp"

namespace primitives {
namespace {

using vocab_entropy::Gradients;
using vocab_entropy::kernels;
using vocab_entropy::Labels;
using vocab_entropy::Logits;
using OptionalTensor = std::optional<at::Tensor>;

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

// [tokens, columns] with contiguous rows, not overlapping.
const Argument& rows(const Argument& x) {
  x.on_device().with_dims(2);
  const at::Tensor& t = x.tensor;
  const bool one_by_one = t.size(1) <= 1 || t.stride(1) == 1;
  if (!one_by_one || (t.size(0) > 1 && t.stride(0) < t.size(1))) {
    x.fail("[tokens, columns] with contiguous rows",
           "shape " + x.text(t.sizes()) + " with strides " + x.text(t.strides()));
  }
  return x;
}

Logits logits_of(const Argument& x, int64_t segment_length, int num_segments, double scale) {
  const auto input = rows(x).input();
  // See [Note: prefetch]: not on Zen 1 to 4.
  static const bool prefetch = !__builtin_cpu_is("amdfam17h") && !__builtin_cpu_is("amdfam19h");
  return {input.data,     input.dtype,  x.tensor.stride(0),        x.tensor.size(1),
          segment_length, num_segments, static_cast<float>(scale), prefetch};
}

Labels labels_of(const char* function, const OptionalTensor& labels, int64_t num_tokens,
                 int64_t ignored, int64_t first) {
  if (!labels) return {nullptr, ignored, first};
  Argument{function, "labels", *labels}.of(at::kLong).shaped({num_tokens}).contiguous();
  return {labels->const_data_ptr<int64_t>(), ignored, first};
}

float* quads_of(const char* function, const at::Tensor& quads, int64_t num_tokens) {
  return Argument{function, "quads", quads}.shaped({num_tokens, 4}).mutable_floats();
}

// message [>= 8] float32: the header that primitives/vocab_parallel/exchange.py describes.
void write_header(const at::Tensor& message, const OptionalTensor& labels, int64_t vocab_size,
                  int64_t ignored) {
  const char* name = "vocab_entropy_write_header";
  const Argument argument{name, "message", message};
  float* out = argument.with_dims(1).mutable_floats();
  if (message.numel() < 8) argument.fail("8 elements", std::to_string(message.numel()));
  const auto targets = labels_of(name, labels, labels ? labels->numel() : 0, ignored, 0);
  int64_t header[4] = {vocab_size, -1, 0, 0};
  for (int64_t i = 0; targets.data != nullptr && i < labels->numel(); i++) {
    const int64_t label = targets.data[i];
    if (label == ignored || (label >= 0 && label < vocab_size)) continue;
    header[1] = i;
    header[2] = label;
    break;
  }
  std::memcpy(out, header, sizeof header);
}

void forward(const at::Tensor& logits, const OptionalTensor& labels, int64_t ignored, int64_t first,
             int64_t segment_length, int num_segments, double scale, const at::Tensor& quads) {
  const char* name = "vocab_entropy_forward";
  const auto of = logits_of({name, "logits", logits}, segment_length, num_segments, scale);
  const int64_t num_tokens = logits.size(0);
  const auto targets = labels_of(name, labels, num_tokens, ignored, first);
  float* out = quads_of(name, quads, num_tokens);
  const KernelCall call;
  share_out(num_tokens, of.columns,
            [&](int64_t begin, int64_t end) { kernels().forward(of, targets, begin, end, out); });
}

// The quads of all ranks [num_ranks, tokens, 4] -> quads, entropy, log_prob, log_sum_exp.
auto finish(const at::Tensor& shards, const OptionalTensor& labels, int64_t ignored, double scale) {
  const char* name = "vocab_entropy_finish";
  const Argument argument{name, "shards", shards};
  argument.of(at::kFloat).with_dims(3);
  const int64_t num_tokens = shards.size(1);
  const auto targets = labels_of(name, labels, num_tokens, ignored, 0);
  if (shards.size(2) != 4 || shards.stride(2) != 1 || (num_tokens > 1 && shards.stride(1) != 4)) {
    argument.fail("[ranks, tokens, 4] with contiguous quads",
                  "shape " + argument.text(shards.sizes()) + " with strides " +
                      argument.text(shards.strides()));
  }
  const int num_ranks = static_cast<int>(shards.size(0));
  if (num_ranks != 1 && num_ranks != 2 && num_ranks != 4 && num_ranks != 8 && num_ranks != 16) {
    argument.fail("of 1, 2, 4, 8 or 16 ranks", std::to_string(num_ranks));
  }
  at::Tensor quads = at::empty({num_tokens, 4}, shards.options());
  at::Tensor results[3];
  for (at::Tensor& result : results) result = at::empty({num_tokens}, shards.options());
  const float* in = shards.const_data_ptr<float>();
  const int64_t rank_stride = shards.stride(0);
  float* out[] = {quads.mutable_data_ptr<float>(), results[0].mutable_data_ptr<float>(),
                  results[1].mutable_data_ptr<float>(), results[2].mutable_data_ptr<float>()};
  {
    const KernelCall call;
    kernels().finish(in, rank_stride, num_ranks, targets, static_cast<float>(scale), 0, num_tokens,
                     out[0], out[1], out[2], out[3]);
  }
  return std::make_tuple(quads, results[0], results[1], results[2]);
}

// out may be the logits.
void backward(const at::Tensor& logits, const OptionalTensor& labels, int64_t ignored,
              int64_t first, double scale, const at::Tensor& quads, const OptionalTensor& entropy,
              const OptionalTensor& log_prob, const OptionalTensor& log_sum_exp,
              const at::Tensor& out) {
  const char* name = "vocab_entropy_backward";
  const auto of = logits_of({name, "logits", logits}, 0, 1, scale);
  const int64_t num_tokens = logits.size(0);
  const auto targets = labels_of(name, labels, num_tokens, ignored, first);
  const float* in = quads_of(name, quads, num_tokens);
  const auto gradient = [&](const char* which, const OptionalTensor& x) {
    return x ? Argument{name, which, *x}.shaped({num_tokens}).floats() : nullptr;
  };
  const Gradients gradients{gradient("grad_entropy", entropy), gradient("grad_log_prob", log_prob),
                            gradient("grad_log_sum_exp", log_sum_exp)};
  const Argument result{name, "out", out};
  rows(result.of(logits.scalar_type()).shaped(logits.sizes()));
  void* target = out.mutable_data_ptr();
  const bool stream = target != of.data && out.numel() * out.element_size() >= kStreamNbytes;
  const KernelCall call;
  share_out(num_tokens, of.columns, [&](int64_t begin, int64_t end) {
    kernels().backward(of, targets, in, gradients, begin, end, target, out.stride(0), stream);
  });
}

uint32_t* words_of(const char* function, const at::Tensor& x) {
  const Argument argument{function, "x", x};
  argument.on_device().contiguous();
  if (x.nbytes() % 1024 != 0) {
    argument.fail("a multiple of 1024 bytes", std::to_string(x.nbytes()));
  }
  return static_cast<uint32_t*>(x.mutable_data_ptr());
}

}  // namespace

void bind_vocab_entropy(py::module_& m) {
  m.def("vocab_entropy_write_header", write_header);
  m.def("vocab_entropy_forward", forward);
  m.def("vocab_entropy_finish", finish);
  m.def("vocab_entropy_backward", backward);
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
