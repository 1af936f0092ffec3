#include "bindings/c10d_stream_work.hpp"

#include <ATen/core/LegacyTypeDispatch.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include <thread>

namespace primitives {
namespace {

c10::Stream current_stream(at::Device device) {
  return c10::impl::VirtualGuardImpl(device.type()).getStream(device);
}

// One that is completed; it records events of its own on the current stream.
c10::intrusive_ptr<c10::ivalue::Future> completed_future(at::Device device,
                                                         const std::vector<at::Tensor>& outputs) {
  auto future = c10::make_intrusive<c10::ivalue::Future>(
      c10::ListType::create(c10::TensorType::get()), std::vector<c10::Device>{device});
  future->markCompleted(c10::IValue(outputs));
  return future;
}

}  // namespace

StreamWork::StreamWork(c10d::OpType type, at::Device device, std::vector<at::Tensor> outputs,
                       c10::weak_intrusive_ptr<Backend> backend)
    : c10d::Work(-1, type),
      device_(device),
      stream_(current_stream(device)),
      event_(device.type()),
      outputs_(std::move(outputs)),
      backend_(std::move(backend)) {
  event_.record(stream_);
}

void StreamWork::check() {
  if (const auto backend = backend_.lock()) backend->check();
}

void StreamWork::synchronize() {
  check();
  event_.block(current_stream(device_));
}

bool StreamWork::wait(std::chrono::milliseconds timeout) {
  synchronize();
  if (timeout == kNoTimeout) return true;
  const auto deadline = Clock::now() + timeout;
  while (!event_.query()) {
    if (Clock::now() >= deadline) throw_wait_timeout(timeout);
    check_signals();
    std::this_thread::sleep_for(std::chrono::microseconds(100));
  }
  check();
  return true;
}

void StreamWork::abort() { TORCH_CHECK(false, "abort the process group, not one of its works"); }

c10::intrusive_ptr<c10::ivalue::Future> StreamWork::getFuture() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (future_) return future_;
  const c10::StreamGuard guard(stream_);
  return future_ = completed_future(device_, outputs_);
}

c10::intrusive_ptr<c10::ivalue::Future> StreamWork::getFutureResult() {
  return result_of(*getFuture());
}

bool HostToDeviceWork::wait(std::chrono::milliseconds timeout) {
  Work::wait(timeout);
  std::call_once(copied_, [this] {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    tensor_.copy_(on_host_);
  });
  return true;
}

c10::intrusive_ptr<c10::ivalue::Future> HostToDeviceWork::getFuture() {
  wait();
  return completed_future(tensor_.device(), {tensor_});
}

c10::intrusive_ptr<c10::ivalue::Future> HostToDeviceWork::getFutureResult() {
  return result_of(*getFuture());
}

}  // namespace primitives
