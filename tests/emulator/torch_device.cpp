// CUDA tensors, streams and events of a torch that has none, on the emulated runtime: what
// csrc/bindings/ needs of them. Linked into an extension module beside the bindings
// (tests/emulated_bindings.py). Memory of the device is memory of the process, so a tensor of the
// CPU can be seen as one of the device; no operator of torch works on it.
#include <ATen/ATen.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/extension.h>

#include "emulator/runtime.hpp"

namespace {

using emulator::Stream;

// The stream of a thread: ranks are threads or processes.
Stream& own_stream() {
  thread_local auto* stream = new Stream;  // works may outlive the thread
  return *stream;
}
thread_local Stream* current = nullptr;

c10::Stream as_torch(Stream* stream, c10::Device device) {
  return c10::Stream(c10::Stream::UNSAFE, device, reinterpret_cast<c10::StreamId>(stream));
}
Stream* of_torch(const c10::Stream& stream) { return reinterpret_cast<Stream*>(stream.id()); }

struct Event {
  Stream* stream;
  uint64_t number;
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static constexpr c10::DeviceType static_type = c10::DeviceType::CUDA;
  c10::DeviceType type() const override { return static_type; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Device getDevice() const override { return {static_type, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 2; }
  c10::Stream getStream(c10::Device device) const override {
    return as_torch(current != nullptr ? current : &own_stream(), device);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    const auto before = getStream(stream.device());
    current = of_torch(stream);
    return before;
  }
  void* getStreamNativeHandle(const c10::Stream stream) const override { return of_torch(stream); }
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex,
              const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    *static_cast<Event*>(*event) = {of_torch(stream), of_torch(stream)->num_launched()};
  }
  void block(void* event, const c10::Stream& stream) const override {
    of_torch(stream)->launch([before = *static_cast<Event*>(event), on = of_torch(stream)] {
      if (before.stream != on) before.stream->wait_for(before.number);
    });
  }
  bool queryEvent(void* event) const override {
    const Event& of = *static_cast<Event*>(event);
    return of.stream->num_ended() >= of.number;
  }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override {
    delete static_cast<Event*>(event);
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

}  // namespace

PYBIND11_MODULE(emulated_device, m) {
  m.def(
      "on_device",
      [](const at::Tensor& tensor, int index) {
        return at::for_blob(tensor.data_ptr(), tensor.sizes())
            .strides(tensor.strides())
            .deleter([tensor](void*) {})
            .target_device(c10::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(index)))
            .options(tensor.options().device(c10::DeviceType::CUDA, index))
            .make_tensor();
      },
      "The memory of a CPU tensor as a tensor of the device.");
  m.def(
      "on_host",
      [](const at::Tensor& tensor) {
        return at::for_blob(tensor.data_ptr(), tensor.sizes())
            .strides(tensor.strides())
            .deleter([tensor](void*) {})
            .target_device(at::kCPU)
            .options(at::TensorOptions().dtype(tensor.dtype()))
            .make_tensor();
      },
      "The memory of a tensor of the device as a tensor of the CPU.");
  m.def(
      "synchronize",
      [] {
        for (Stream* stream : {&own_stream(), &emulator::legacy_stream()}) {
          stream->wait_for(stream->num_launched());
        }
      },
      "Waits for this thread's stream and the legacy default stream.");
  m.def(
      "set_captured", [](bool captured) { own_stream().captured = captured; },
      "Whether this thread's stream is as if captured into a graph.");
  m.def(
      "stream", [] { return reinterpret_cast<uintptr_t>(&own_stream()); },
      "The handle of this thread's stream.");
  m.def(
      "fail_next", [](const std::string& call) { emulator::fail_next(call.c_str()); },
      "As emulator::fail_next.");
}
