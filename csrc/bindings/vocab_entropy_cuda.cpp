// The kernels of the vocabulary entropy on CUDA tensors, enqueued on a stream of their device.
#ifdef PRIMITIVES_CUDA
#include <c10/core/DeviceGuard.h>

#include "bindings/cuda.hpp"
#include "bindings/tensor_checks.hpp"
#include "vocab_entropy/cuda.hpp"

namespace primitives {
namespace {

using vocab_entropy::CudaCall;
using vocab_entropy::Gradients;
using vocab_entropy::Labels;
using vocab_entropy::Logits;
using vocab_entropy::Mode;
using OptionalTensor = std::optional<at::Tensor>;

// One function of Python: its tensors, all on one device, and what it enqueues.
class Call {
 public:
  Call(const char* name, const at::Tensor& first, bool device_exp, uintptr_t stream)
      : name_(name), device_(first.device()) {
    if (!device_.is_cuda()) argument("input", first).fail("a CUDA tensor", device_.str());
    call_ = {device_.index(), reinterpret_cast<void*>(stream),
             device_exp ? Mode::kDevice : Mode::kPortable, error_, sizeof error_};
  }

  // Contiguous memory of a shape, for a vector access if it is of quads.
  void* data(const char* which, const at::Tensor& x, at::ScalarType type,
             at::IntArrayRef shape) const {
    argument(which, x).of(type).shaped(shape).contiguous();
    return x.numel() == 0 ? nullptr : x.mutable_data_ptr();
  }

  float* floats(const char* which, const at::Tensor& x, at::IntArrayRef shape) const {
    return static_cast<float*>(data(which, x, at::kFloat, shape));
  }

  const float* gradient(const char* which, const OptionalTensor& x, int64_t num_tokens) const {
    return x ? floats(which, *x, {num_tokens}) : nullptr;
  }

  float* quads(const at::Tensor& x, int64_t num_tokens) const {
    float* found = floats("quads", x, {num_tokens, 4});
    if (reinterpret_cast<uintptr_t>(found) % 16 != 0) {
      argument("quads", x).fail("aligned to 16 bytes", "another address");
    }
    return found;
  }

  Labels labels(const OptionalTensor& x, int64_t num_tokens, int64_t ignored, int64_t first) const {
    if (!x) return {nullptr, ignored, first};
    return {static_cast<int64_t*>(data("labels", *x, at::kLong, {num_tokens})), ignored, first};
  }

  // [tokens, columns] with contiguous rows, not overlapping.
  void rows(const char* which, const at::Tensor& x) const {
    const Argument of = argument(which, x).on_device().with_dims(2);
    const bool one_by_one = x.size(1) <= 1 || x.stride(1) == 1;
    if (!one_by_one || (x.size(0) > 1 && x.stride(0) < x.size(1))) {
      of.fail("[tokens, columns] with contiguous rows",
              "shape " + of.text(x.sizes()) + " with strides " + of.text(x.strides()));
    }
  }

  Logits logits(const at::Tensor& x, int64_t segment_length, int num_segments, double scale) const {
    rows("logits", x);
    return {
        x.const_data_ptr(), argument("logits", x).dtype(), x.stride(0), x.size(1), segment_length,
        num_segments,       static_cast<float>(scale),     false};
  }

  // enqueue(call) without the GIL.
  template <class Enqueue>
  void run(const Enqueue& enqueue) {
    int code;
    {
      const py::gil_scoped_release no_gil;
      const c10::DeviceGuard guard(device_);
      code = enqueue(call_);
    }
    if (code != 0) {
      throw std::runtime_error(std::string(name_) + " on " + device_.str() + ": " + error_);
    }
  }

 private:
  Argument argument(const char* which, const at::Tensor& x) const {
    return {name_, which, x, device_};
  }

  const char* name_;
  at::Device device_;
  char error_[256] = "";
  CudaCall call_;
};

void forward(const at::Tensor& logits, const OptionalTensor& labels, int64_t ignored, int64_t first,
             int64_t segment_length, int num_segments, double scale, const at::Tensor& quads,
             bool device_exp, uintptr_t stream) {
  Call call("vocab_entropy_forward", logits, device_exp, stream);
  const Logits of = call.logits(logits, segment_length, num_segments, scale);
  const int64_t n = logits.size(0);
  const Labels targets = call.labels(labels, n, ignored, first);
  float* out = call.quads(quads, n);
  const int64_t numel = vocab_entropy::primitives_vocab_workspace(of, n);
  const at::Tensor workspace = at::empty({numel}, quads.options());
  float* room = numel == 0 ? nullptr : workspace.mutable_data_ptr<float>();
  call.run([&](const CudaCall& c) {
    return vocab_entropy::primitives_vocab_forward(c, of, targets, n, room, out);
  });
}

// The quads of all ranks [num_ranks, tokens, 4] -> quads, entropy, log_prob, log_sum_exp.
auto finish(const at::Tensor& shards, const OptionalTensor& labels, int64_t ignored, double scale,
            uintptr_t stream) {
  Call call("vocab_entropy_finish", shards, false, stream);
  const Argument of{"vocab_entropy_finish", "shards", shards};
  const int64_t num_ranks = of.with_dims(3).tensor.size(0), n = shards.size(1);
  if (shards.scalar_type() != at::kFloat || shards.size(2) != 4 || shards.stride(2) != 1 ||
      (n > 1 && shards.stride(1) != 4) || shards.stride(0) % 4 != 0 ||
      reinterpret_cast<uintptr_t>(shards.const_data_ptr()) % 16 != 0) {
    of.fail("float32 [ranks, tokens, 4] with contiguous quads, aligned to 16 bytes",
            "shape " + of.text(shards.sizes()) + " with strides " + of.text(shards.strides()));
  }
  if (num_ranks < 1 || num_ranks > 16 || (num_ranks & (num_ranks - 1)) != 0) {
    of.fail("of 1, 2, 4, 8 or 16 ranks", std::to_string(num_ranks));
  }
  const Labels targets = call.labels(labels, n, ignored, 0);
  const at::Tensor quads = at::empty({n, 4}, shards.options());
  at::Tensor results[3];
  float* out[3];
  for (int i = 0; i < 3; i++) {
    results[i] = at::empty({n}, shards.options());
    out[i] = results[i].mutable_data_ptr<float>();
  }
  float* full = call.quads(quads, n);
  const float* in = shards.const_data_ptr<float>();
  call.run([&](const CudaCall& c) {
    return vocab_entropy::primitives_vocab_finish(
        c, in, shards.stride(0), static_cast<int>(num_ranks), targets, static_cast<float>(scale), n,
        full, out[0], out[1], out[2]);
  });
  return std::make_tuple(quads, results[0], results[1], results[2]);
}

// out may be the logits.
void backward(const at::Tensor& logits, const OptionalTensor& labels, int64_t ignored,
              int64_t first, double scale, const at::Tensor& quads, const OptionalTensor& entropy,
              const OptionalTensor& log_prob, const OptionalTensor& log_sum_exp,
              const at::Tensor& out, bool device_exp, uintptr_t stream) {
  Call call("vocab_entropy_backward", logits, device_exp, stream);
  const Logits of = call.logits(logits, 1, 1, scale);
  const int64_t n = logits.size(0);
  const Labels targets = call.labels(labels, n, ignored, first);
  const float* in = call.quads(quads, n);
  const Gradients gradients{call.gradient("grad_entropy", entropy, n),
                            call.gradient("grad_log_prob", log_prob, n),
                            call.gradient("grad_log_sum_exp", log_sum_exp, n)};
  call.rows("out", out);
  if (out.sizes() != logits.sizes() || out.scalar_type() != logits.scalar_type()) {
    Argument{"vocab_entropy_backward", "out", out}.fail("like the logits",
                                                        "another shape or dtype");
  }
  void* target = out.mutable_data_ptr();
  call.run([&](const CudaCall& c) {
    return vocab_entropy::primitives_vocab_backward(c, of, targets, in, gradients, n, target,
                                                    out.stride(0));
  });
}

}  // namespace

void bind_vocab_entropy_cuda(py::module_& m) {
  m.def("vocab_entropy_cuda_forward", forward);
  m.def("vocab_entropy_cuda_finish", finish);
  m.def("vocab_entropy_cuda_backward", backward);
}

}  // namespace primitives
#endif
