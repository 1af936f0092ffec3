// The backend on CUDA tensors: its transport, and how a collective is launched on the caller's
// stream.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_stream_work.hpp"
#ifdef PRIMITIVES_CUDA
#include "collectives/cuda/device_transport.hpp"
#endif

namespace primitives {
namespace {

#ifdef PRIMITIVES_CUDA
std::unique_ptr<StreamTransport> make_device_transport(Transport& host, at::Device device,
                                                       Milliseconds timeout) {
  if (dynamic_cast<OneHost*>(&host) == nullptr) {
    throw std::invalid_argument(
        "collectives on cuda: expected all ranks on one host; use a group of another backend, as "
        "nccl, between hosts");
  }
  const auto current_stream = [device] {
    return c10::impl::VirtualGuardImpl(device.type()).getStream(device).native_handle();
  };
  const c10::DeviceGuard guard(device);
  return std::make_unique<DeviceTransport>(host, device.index(), current_stream, timeout);
}
#else
std::unique_ptr<StreamTransport> make_device_transport(Transport&, at::Device, Milliseconds) {
  throw std::invalid_argument(
      "collectives on cuda: this build of primitives has no CUDA kernels (there was no nvcc)");
}
#endif

}  // namespace

// The first call on a device is a meeting of all ranks, in the order of the group's calls.
Transport& Backend::on(const at::Tensor& tensor) {
  const at::Device device = tensor.device();
  if (device.is_cpu()) return *transport_;
  if (!device_) {
    queue_->run_sync(
        [&] { device_ = make_device_transport(*transport_, device, options_->timeout); });
    device_index_ = device.index();
  }
  if (device.index() != device_index_) {
    throw std::invalid_argument(
        "collectives on cuda: expected tensors on cuda:" + std::to_string(device_index_) +
        ", the device of this group's " + "first call, got one on " + device.str());
  }
  return *device_;
}

Backend::WorkPtr Backend::run_on_stream(c10d::OpType type, at::Device device, Tensors outputs,
                                        const Job& job) {
  const c10::DeviceGuard guard(device);
  job();
  const auto self = c10::intrusive_ptr<Backend>::unsafe_reclaim_from_nonowning(this);
  auto work = c10::make_intrusive<StreamWork>(type, device, std::move(outputs),
                                              c10::weak_intrusive_ptr<Backend>(self));
  if (coalescing_) coalesced_.push_back(work);
  return work;
}

}  // namespace primitives
