// The kernels of the vocabulary entropy on CUDA tensors, enqueued on a stream of their device.
#ifdef PRIMITIVES_CUDA
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bindings/tensor_checks.hpp"
#include "bindings/vocab_entropy.hpp"
#include "collectives/cuda/launch.h"

namespace primitives::vocab_entropy {
namespace {

void* current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
}

// One call: its tensors, all on one device, and what it enqueues on the current stream.
class Call {
 public:
  Call(const char* name, const at::Tensor& first, Mode mode)
      : name_(name), device_(first.device()) {
    call_ = {device_.index(), current_stream(device_), mode, error_, sizeof error_};
  }

  Argument argument(const char* which, const at::Tensor& x) const {
    return {name_, which, x, device_};
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

  Labels labels(const Targets& targets, int64_t num_tokens, int64_t first) const {
    if (!targets.labels) return {nullptr, targets.ignored, first};
    const void* found = data("labels", *targets.labels, at::kLong, {num_tokens});
    return {static_cast<const int64_t*>(found), targets.ignored, first};
  }

  Logits logits(const at::Tensor& x, const Columns& columns, double scale) const {
    argument("logits", x).with_contiguous_rows();
    return {x.const_data_ptr(),
            argument("logits", x).dtype(),
            x.stride(0),
            x.size(1),
            columns.segment_length,
            columns.num_segments,
            static_cast<float>(scale),
            false};
  }

  template <class Enqueue>
  void run(const Enqueue& enqueue) {
    int code;
    {
      const c10::DeviceGuard guard(device_);
      code = enqueue(call_);
    }
    if (code != 0) {
      throw std::runtime_error(std::string(name_) + " on " + device_.str() + ": " + error_);
    }
  }

 private:
  const char* name_;
  at::Device device_;
  char error_[256] = "";
  CudaCall call_;
};

void forward(const at::Tensor& logits, const Targets& targets, const Columns& columns, double scale,
             Mode mode, const at::Tensor& quads) {
  Call call("vocab_entropy_forward", logits, mode);
  const Logits of = call.logits(logits, columns, scale);
  const int64_t n = logits.size(0);
  const Labels labels = call.labels(targets, n, columns.first);
  float* out = call.quads(quads, n);
  const int64_t numel = primitives_vocab_workspace(of, n);
  const at::Tensor workspace = at::empty({numel}, quads.options());
  float* room = numel == 0 ? nullptr : workspace.mutable_data_ptr<float>();
  call.run(
      [&](const CudaCall& c) { return primitives_vocab_forward(c, of, labels, n, room, out); });
}

Results finish(const at::Tensor& shards, const Targets& targets, double scale) {
  Call call("vocab_entropy_finish", shards, Mode::kPortable);
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
  const Labels labels = call.labels(targets, n, 0);
  const auto empty = [&](at::IntArrayRef shape) { return at::empty(shape, shards.options()); };
  const Results results{empty({n, 4}), empty({n}), empty({n}), empty({n})};
  float* quads = call.quads(results.quads, n);
  call.run([&](const CudaCall& c) {
    return primitives_vocab_finish(
        c, shards.const_data_ptr<float>(), shards.stride(0), static_cast<int>(num_ranks), labels,
        static_cast<float>(scale), n, quads, results.entropy.mutable_data_ptr<float>(),
        results.log_prob.mutable_data_ptr<float>(), results.log_sum_exp.mutable_data_ptr<float>());
  });
  return results;
}

// out may be the logits.
void backward(const at::Tensor& logits, const Targets& targets, int64_t first, double scale,
              Mode mode, const at::Tensor& quads, const ResultGradients& by,
              const at::Tensor& out) {
  Call call("vocab_entropy_backward", logits, mode);
  const Logits of = call.logits(logits, {first, 1, 1}, scale);
  const int64_t n = logits.size(0);
  const Labels labels = call.labels(targets, n, first);
  const float* in = call.quads(quads, n);
  const Gradients gradients{call.gradient("grad_entropy", by.entropy, n),
                            call.gradient("grad_log_prob", by.log_prob, n),
                            call.gradient("grad_log_sum_exp", by.log_sum_exp, n)};
  call.argument("out", out).with_contiguous_rows();
  if (out.sizes() != logits.sizes() || out.scalar_type() != logits.scalar_type()) {
    Argument{"vocab_entropy_backward", "out", out}.fail("like the logits",
                                                        "another shape or dtype");
  }
  void* target = out.mutable_data_ptr();
  call.run([&](const CudaCall& c) {
    return primitives_vocab_backward(c, of, labels, in, gradients, n, target, out.stride(0));
  });
}

bool is_captured(at::Device device) {
  const c10::DeviceGuard guard(device);
  primitives_cuda_error error;
  const int captured = primitives_cuda_is_captured(device.index(), current_stream(device), &error);
  if (captured < 0)
    throw std::runtime_error("vocab_entropy on " + device.str() + ": " + error.text);
  return captured != 0;
}

}  // namespace

const TensorKernels kCudaTensorKernels{forward, finish, backward, is_captured};

}  // namespace primitives::vocab_entropy
#endif
