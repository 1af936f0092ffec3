#include "bindings/device_buffer.hpp"

#include <ATen/DLConvertor.h>
#include <torch/csrc/autograd/python_variable.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "transport/device_memory.h"
#include "transport/errors.hpp"

namespace primitives {
namespace {

[[noreturn]] void refuse(const char* what, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string(what) + ": expected " + expected + ", got " + got);
}

// torch's own converter forgets the offset of some of its versions.
void apply_offset(DLTensor& tensor) {
  tensor.data = static_cast<char*>(tensor.data) + std::exchange(tensor.byte_offset, 0);
}

// Takes the memory over from a capsule. (Its destructor then leaves it alone.)
DeviceBuffer taken_from(py::handle capsule, const char* what) {
  try {
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor_versioned")) {
      auto* made = static_cast<DLManagedTensorVersioned*>(
          PyCapsule_GetPointer(capsule.ptr(), "dltensor_versioned"));
      apply_offset(made->dl_tensor);
      const bool readonly = made->flags & DLPACK_FLAG_BITMASK_READ_ONLY;
      DeviceBuffer buffer{at::fromDLPackVersioned(made), readonly};
      PyCapsule_SetName(capsule.ptr(), "used_dltensor_versioned");
      return buffer;
    }
    if (PyCapsule_IsValid(capsule.ptr(), "dltensor")) {
      auto* made = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
      apply_offset(made->dl_tensor);
      DeviceBuffer buffer{at::fromDLPack(made), false};
      PyCapsule_SetName(capsule.ptr(), "used_dltensor");
      return buffer;
    }
  } catch (const c10::Error& error) {
    refuse(what, "memory that torch can describe", error.what_without_backtrace());
  }
  refuse(what, "a DLPack capsule from __dlpack__", py::str(py::type::of(capsule)));
}

DeviceBuffer by_dlpack(py::handle object, uintptr_t stream, const char* what) {
  using namespace py::literals;
  const auto export_ = object.attr("__dlpack__");
  const auto number = static_cast<int64_t>(stream);
  try {
    return taken_from(export_("stream"_a = number, "max_version"_a = py::make_tuple(1, 0)), what);
  } catch (py::error_already_set& error) {
    if (!error.matches(PyExc_TypeError)) throw;  // an exporter from before DLPack 1.0
  }
  return taken_from(export_("stream"_a = number), what);
}

#ifdef PRIMITIVES_CUDA
// The dtype of a type string of the array interface ("<f4"), or Undefined.
at::ScalarType dtype_of(const std::string& type) {
  constexpr std::pair<const char*, at::ScalarType> kTypes[] = {
      {"f2", at::kHalf},         {"f4", at::kFloat},          {"f8", at::kDouble},
      {"c8", at::kComplexFloat}, {"c16", at::kComplexDouble}, {"b1", at::kBool},
      {"i1", at::kChar},         {"i2", at::kShort},          {"i4", at::kInt},
      {"i8", at::kLong},         {"u1", at::kByte},           {"u2", at::kUInt16},
      {"u4", at::kUInt32},       {"u8", at::kUInt64}};
  for (const auto& [name, dtype] : kTypes) {
    if (type == std::string("<") + name || type == std::string("|") + name) return dtype;
  }
  return at::ScalarType::Undefined;
}

DeviceBuffer by_array_interface(py::handle object, const char* what) {
  const py::dict shown = object.attr("__cuda_array_interface__");
  const std::string type = py::str(shown["typestr"]);
  const at::ScalarType dtype = dtype_of(type);
  if (dtype == at::ScalarType::Undefined) refuse(what, "a dtype that torch has", "'" + type + "'");
  const auto shape = shown["shape"].cast<std::vector<int64_t>>();
  const py::tuple data = shown["data"];
  void* memory = reinterpret_cast<void*>(data[0].cast<uintptr_t>());
  const auto itemsize = static_cast<int64_t>(c10::elementSize(dtype));
  std::vector<int64_t> strides(shape.size());
  int64_t step = 1;
  for (size_t d = shape.size(); d-- > 0; step *= shape[d]) strides[d] = step;
  if (shown.contains("strides") && !shown["strides"].is_none()) {
    strides = shown["strides"].cast<std::vector<int64_t>>();
    for (int64_t& stride : strides) stride /= itemsize;
  }
  primitives_cuda_error error;
  const int device = memory == nullptr ? 0 : primitives_cuda_device_of(memory, &error);
  if (device < 0) refuse(what, "memory of a CUDA device", error.text);
  if (shown.contains("stream") && !shown["stream"].is_none()) {
    void* stream = reinterpret_cast<void*>(shown["stream"].cast<uintptr_t>());
    if (primitives_cuda_synchronize_stream(device, stream, &error) != 0) {
      refuse(what, "a stream that can be waited for", error.text);
    }
  }
  const c10::Device on(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(device));
  auto tensor = at::for_blob(memory, shape)
                    .strides(strides)
                    .deleter([](void*) {})  // the caller holds the object
                    .target_device(on)
                    .options(at::TensorOptions().dtype(dtype).device(on))
                    .make_tensor();
  return {tensor, data[1].cast<bool>()};
}
#endif

}  // namespace

std::optional<DeviceBuffer> device_buffer_of(py::handle object, uintptr_t stream,
                                             const char* what) {
  if (THPVariable_Check(object.ptr())) {
    const at::Tensor tensor = THPVariable_Unpack(object.ptr()).detach();
    if (!tensor.is_cuda()) return std::nullopt;
    // A torch without CUDA has them of Communicator.empty, and no streams of its own.
    if (!at::hasCUDA()) return DeviceBuffer{tensor, false};
    return by_dlpack(object.attr("detach")(), stream, what);
  }
  if (py::hasattr(object, "__dlpack_device__") && py::hasattr(object, "__dlpack__")) {
    const py::tuple device = object.attr("__dlpack_device__")();
    const int kind = py::int_(device[0]);
    if (kind != kDLCUDA && kind != kDLCUDAManaged) return std::nullopt;
    return by_dlpack(object, stream, what);
  }
  if (!py::hasattr(object, "__cuda_array_interface__")) return std::nullopt;
#ifdef PRIMITIVES_CUDA
  return by_array_interface(object, what);
#else
  refuse(what, "memory of the CPU, since this build of primitives has no CUDA kernels",
         "memory of a device");
#endif
}

#ifdef PRIMITIVES_CUDA
void copy_on_stream(int device, void* to, const void* from, size_t nbytes, uintptr_t stream) {
  const KeepCurrentDevice current;
  void* on = reinterpret_cast<void*>(stream);
  primitives_cuda_error error;
  if (nbytes == 0) return;
  if (primitives_cuda_copy(device, to, from, nbytes, on, &error) != 0 ||
      primitives_cuda_synchronize_stream(device, on, &error) != 0) {
    throw TransportError(Failure::kOther, "copy between the host and cuda:" +
                                              std::to_string(device) + ": " + error.text);
  }
}

KeepCurrentDevice::KeepCurrentDevice() : before_(primitives_cuda_exchange_device(-1)) {}
KeepCurrentDevice::~KeepCurrentDevice() { primitives_cuda_exchange_device(before_); }
#else
void copy_on_stream(int, void*, const void*, size_t, uintptr_t) {
  throw TransportError(Failure::kOther, "this build of primitives has no CUDA kernels");
}

KeepCurrentDevice::KeepCurrentDevice() = default;
KeepCurrentDevice::~KeepCurrentDevice() = default;
#endif

}  // namespace primitives
