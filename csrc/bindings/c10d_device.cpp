// The backend on CUDA tensors: its transport, and how a collective comes onto the caller's stream.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_stream_work.hpp"
#include "bindings/make_transport.hpp"

namespace primitives {

Transport& Backend::on(const at::Tensor& tensor) {
  return tensor.device().is_cpu() ? *transport_ : *device_;
}

// The first call on a device is a meeting of all ranks, in the order of the group's calls.
void Backend::meet_on(at::Device device) {
  if (!device_) {
    const auto stream = [device] {
      return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
    };
    std::string said;  // later: no job may need the GIL
    const auto say = [&](const std::string& text) { said = text; };
    queue_->run_sync([&] {
      device_ = make_device_transport(
          *transport_, {getRank(), getSize(), device.index(), stream, options_->timeout, say});
    });
    device_index_ = device.index();
    if (!said.empty()) warn(said);
  }
  if (device.index() == device_index_) return;
  throw std::invalid_argument(
      "collectives on cuda: expected tensors on cuda:" + std::to_string(device_index_) +
      ", the device of this group's first call, got one on " + device.str());
}

at::Tensor Backend::empty_on(at::Device device, const Call& call, at::IntArrayRef shape,
                             at::ScalarType dtype) {
  if (!device.is_cuda()) {
    throw std::invalid_argument("empty: device: expected cpu or cuda, got " + device.str());
  }
  const c10::DeviceGuard guard(device);  // of no index: the current one
  const at::Device current = guard.current_device();
  meet_on(current);
  std::shared_ptr<void> data;
  queue_->run_sync(
      [&] { data = allocate_on_all(*transport_, getSize(), *device_, call, options_->timeout); });
  return tensor_in(std::move(data), shape, dtype, current);
}

void Backend::launch(const Job& job) { device_->runs_on_host() ? queue_->run_sync(job) : job(); }

Backend::WorkPtr Backend::run_on_stream(c10d::OpType type, at::Device device, Tensors outputs,
                                        const Job& job) {
  const c10::DeviceGuard guard(device);
  meet_on(device);
  launch(job);
  const auto self = c10::intrusive_ptr<Backend>::unsafe_reclaim_from_nonowning(this);
  auto work = c10::make_intrusive<StreamWork>(type, device, std::move(outputs),
                                              c10::weak_intrusive_ptr<Backend>(self));
  if (coalescing_) coalesced_.push_back(work);
  return work;
}

}  // namespace primitives
