// c10d's send and recv on the mailbox.
#include <cstdio>
#include <stdexcept>

#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_errors.hpp"
#include "bindings/c10d_stream_work.hpp"

namespace primitives {
namespace {

Envelope envelope_of(const at::Tensor& tensor, int tag) {
  const Call call = make_call(Op::kSend, tensor, tensor.numel());
  Envelope envelope{tensor.nbytes(), call.numel, tag, ""};
  std::snprintf(envelope.dtype, sizeof envelope.dtype, "%s", call.dtype);
  return envelope;
}

void check_peer(int peer, int world_size, const char* what) {
  if (peer >= 0 && peer < world_size) return;
  throw std::invalid_argument(std::string(what) + ": expected a rank in [0, " +
                              std::to_string(world_size) + "), got " + std::to_string(peer));
}

// The error of an operation that ended on the mailbox thread, as Python shall see it.
std::exception_ptr as_python_error(std::exception_ptr error) {
  if (!error) return nullptr;
  try {
    std::rethrow_exception(error);
  } catch (...) {
    return current_python_error();
  }
}

}  // namespace

Backend::WorkPtr Backend::send(Tensors& tensors, int dst, int tag) {
  return translated([&]() -> WorkPtr {
    const at::Tensor& tensor = only(tensors, "send");
    check_tensor(tensor, "send");
    check_peer(dst, getSize(), "send");
    // From a device by way of the host, which waits for the current stream.
    StagedTensor source(tensor.is_cuda() ? tensor.to(at::kCPU) : tensor);
    source.load();
    auto work = c10::make_intrusive<Work>(c10d::OpType::SEND, tensors, callbacks_);
    transport_->send(
        source.data(), envelope_of(tensor, tag), dst, options_->timeout,
        [work, source](std::exception_ptr error, int) { work->complete(as_python_error(error)); });
    if (coalescing_) coalesced_.push_back(work);
    return work;
  });
}

Backend::WorkPtr Backend::receive(Tensors& tensors, int src, int tag) {
  const at::Tensor& tensor = only(tensors, "recv");
  check_writable(tensor, "recv");
  const auto type = src == kAnySource ? c10d::OpType::RECVANYSOURCE : c10d::OpType::RECV;
  c10::intrusive_ptr<Work> work;
  at::Tensor on_host = tensor;
  if (tensor.is_cuda()) {
    on_host = at::empty(tensor.sizes(), tensor.options().device(at::kCPU));
    work = c10::make_intrusive<HostToDeviceWork>(type, tensor, on_host, callbacks_);
  } else {
    work = c10::make_intrusive<Work>(type, tensors, callbacks_);
  }
  StagedTensor result(on_host);
  transport_->recv(result.data(), envelope_of(tensor, tag), src, options_->timeout,
                   [work, result](std::exception_ptr error, int from) mutable {
                     try {
                       if (!error) result.store();
                     } catch (...) {
                       error = std::current_exception();
                     }
                     work->set_source_rank(from);
                     work->complete(as_python_error(error));
                   });
  if (coalescing_) coalesced_.push_back(work);
  return work;
}

Backend::WorkPtr Backend::recv(Tensors& tensors, int src, int tag) {
  return translated([&] {
    check_peer(src, getSize(), "recv");
    return receive(tensors, src, tag);
  });
}

Backend::WorkPtr Backend::recvAnysource(Tensors& tensors, int tag) {
  return translated([&] { return receive(tensors, kAnySource, tag); });
}

}  // namespace primitives
