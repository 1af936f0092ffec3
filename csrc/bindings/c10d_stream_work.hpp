// Works whose results are valid on a stream of a device.
#pragma once

#include <c10/core/Event.h>

#include <mutex>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "bindings/c10d_backend.hpp"

namespace primitives {

// A collective that was launched on a stream: done when an event behind it is.
class StreamWork : public c10d::Work {
 public:
  // Records the event on the current stream of the device.
  StreamWork(c10d::OpType type, at::Device device, std::vector<at::Tensor> outputs,
             c10::weak_intrusive_ptr<Backend> backend);

  bool isCompleted() override { return event_.query(); }
  bool isSuccess() const override { return event_.query(); }
  // Lets the current stream wait; with a timeout the host, too. Throws when the group has failed.
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override;
  void abort() override;
  std::vector<at::Tensor> result() override { return outputs_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFutureResult() override;

 private:
  void check();

  const at::Device device_;
  const c10::Stream stream_;
  c10::Event event_;
  std::vector<at::Tensor> outputs_;
  c10::weak_intrusive_ptr<Backend> backend_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // made when somebody asks
};

// A message for a device that arrives on the host: whoever waits first copies it, on the current
// stream of the device.
class HostToDeviceWork : public Work {
 public:
  HostToDeviceWork(c10d::OpType type, at::Tensor tensor, at::Tensor on_host,
                   std::shared_ptr<Callbacks> callbacks)
      : Work(type, {tensor}, std::move(callbacks)), tensor_(tensor), on_host_(std::move(on_host)) {}

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override { wait(); }
  // Waits.
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFutureResult() override;

 private:
  at::Tensor tensor_, on_host_;
  std::once_flag copied_;
};

}  // namespace primitives
