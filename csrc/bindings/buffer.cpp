#include "bindings/buffer.hpp"

#include <stdexcept>
#include <string_view>

#include "bindings/c10d_tensors.hpp"
#include "bindings/device_buffer.hpp"

namespace primitives {
namespace {

// The dtype of a struct-module format, or Undefined. Letters of integers differ in size between
// platforms and prefixes: only their sign is taken from them.
at::ScalarType dtype_of(std::string_view format, size_t itemsize) {
  constexpr auto kNone = at::ScalarType::Undefined;
  constexpr at::ScalarType kSigned[] = {at::kChar, at::kShort, at::kInt, at::kLong};
  constexpr at::ScalarType kUnsigned[] = {at::kByte, at::kUInt16, at::kUInt32, at::kUInt64};
  if (!format.empty() && std::string_view("@=<|").find(format[0]) != std::string_view::npos) {
    format.remove_prefix(1);  // native, or little-endian as this machine
  }
  if (format == "Zf") return at::kComplexFloat;
  if (format == "Zd") return at::kComplexDouble;
  if (format.size() != 1) return kNone;
  const size_t log2 = itemsize == 1 ? 0 : itemsize == 2 ? 1 : itemsize == 4 ? 2 : 3;
  switch (format[0]) {
    case '?':
      return at::kBool;
    case 'e':
      return at::kHalf;
    case 'f':
      return at::kFloat;
    case 'd':
      return at::kDouble;
    case 'b':
    case 'h':
    case 'i':
    case 'l':
    case 'q':
    case 'n':
      return kSigned[log2];
    case 'c':
    case 'B':
    case 'H':
    case 'I':
    case 'L':
    case 'Q':
    case 'N':
      return kUnsigned[log2];
    default:
      return kNone;
  }
}

// The dtypes that the buffer protocol has no letter for, by the names NumPy extensions give them.
at::ScalarType dtype_named(const std::string& name) {
  if (name == "bfloat16") return at::kBFloat16;
  if (name == "float8_e4m3fn") return at::kFloat8_e4m3fn;
  if (name == "float8_e5m2") return at::kFloat8_e5m2;
  if (name == "float8_e4m3fnuz") return at::kFloat8_e4m3fnuz;
  if (name == "float8_e5m2fnuz") return at::kFloat8_e5m2fnuz;
  return at::ScalarType::Undefined;
}

std::string name_of(at::ScalarType dtype) { return make_call(Op::kNone, dtype, 0).dtype; }

}  // namespace

Buffer::Buffer(py::handle object, Access access, const char* what, uintptr_t stream) : what_(what) {
  // Whether it is a tensor is asked later: for another class that costs as much as all the rest.
  constexpr int kFlags = PyBUF_STRIDES | PyBUF_FORMAT;
  if (PyObject_CheckBuffer(object.ptr()) && PyObject_GetBuffer(object.ptr(), &view_, kFlags) == 0) {
    take_view(access);
    return;
  }
  PyErr_Clear();
  if (const auto buffer = device_buffer_of(object, stream, what)) {
    if (access == Access::kWrite && buffer->readonly) refuse("writable memory", "read-only memory");
    take_tensor(buffer->tensor);
    return;
  }
  if (THPVariable_Check(object.ptr())) {
    take_tensor(THPVariable_Unpack(object.ptr()));
    return;
  }
  // An array of an extension dtype, as of ml_dtypes, shows its memory as integers of that size.
  const at::ScalarType extended =
      py::hasattr(object, "dtype") && py::hasattr(object, "view")
          ? dtype_named(py::str(py::getattr(object.attr("dtype"), "name", py::str(""))))
          : at::ScalarType::Undefined;
  if (extended != at::ScalarType::Undefined) {
    holder_ = object.attr("view")(c10::elementSize(extended) == 1 ? "uint8" : "uint16");
    if (PyObject_GetBuffer(holder_.ptr(), &view_, kFlags) != 0) throw py::error_already_set();
    take_view(access);
    dtype_ = extended;
    return;
  }
  if (!py::hasattr(object, "__dlpack__")) {
    refuse("a tensor, an array, or an object with the buffer protocol or DLPack",
           py::str(py::type::of(object).attr("__name__")));
  }
  holder_ = py::module_::import("torch").attr("from_dlpack")(object);
  take_tensor(THPVariable_Unpack(holder_.ptr()));
}

void Buffer::take_tensor(const at::Tensor& tensor) {
  check_tensor(tensor, what_);
  if (!tensor.is_contiguous() || tensor.is_conj() || tensor.is_neg()) {
    refuse("contiguous memory",
           "a tensor of shape " + c10::str(tensor.sizes()) + " with strides " +
               c10::str(tensor.strides()) +
               (tensor.is_conj() || tensor.is_neg() ? ", lazily negated" : ""));
  }
  tensor_ = tensor;
  data_ = static_cast<char*>(tensor.data_ptr());
  numel_ = static_cast<size_t>(tensor.numel());
  itemsize_ = tensor.element_size();
  dtype_ = tensor.scalar_type();
  if (tensor.is_cuda()) device_ = tensor.get_device();
  if (device_ >= 0 && reinterpret_cast<uintptr_t>(data_) % itemsize_ != 0) {
    refuse("elements at multiples of their size", "memory that begins elsewhere");
  }
}

void Buffer::take_view(Access access) {
  const char* format = view_.format != nullptr ? view_.format : "B";
  dtype_ = dtype_of(format, static_cast<size_t>(view_.itemsize));
  if (dtype_ == at::ScalarType::Undefined ||
      c10::elementSize(dtype_) != static_cast<size_t>(view_.itemsize)) {
    refuse("numbers in this machine's byte order", "format '" + std::string(format) + "'");
  }
  if (!PyBuffer_IsContiguous(&view_, 'C')) {
    const std::vector<Py_ssize_t> strides(view_.strides, view_.strides + view_.ndim);
    refuse("contiguous memory", "strides of " + c10::str(strides) + " bytes");
  }
  if (access == Access::kWrite && view_.readonly) refuse("writable memory", "read-only memory");
  data_ = static_cast<char*>(view_.buf);
  itemsize_ = static_cast<size_t>(view_.itemsize);
  numel_ = static_cast<size_t>(view_.len) / itemsize_;
}

void Buffer::check_like(const Buffer& other) const {
  if (dtype_ != other.dtype_) refuse("dtype " + name_of(other.dtype_), name_of(dtype_));
  const auto place = [](int device) {
    return device < 0 ? std::string("cpu") : "cuda:" + std::to_string(device);
  };
  if (device_ != other.device_) refuse("memory on " + place(other.device_), place(device_));
}

void Buffer::check_numel(size_t expected) const {
  if (numel_ != expected) refuse(std::to_string(expected) + " elements", std::to_string(numel_));
}

void Buffer::check_apart(const Buffer& input, const void* allowed_at) const {
  const char *end = data_ + nbytes(), *input_end = input.data_ + input.nbytes();
  if (input_end <= data_ || end <= input.data_ || input.data_ == allowed_at) return;
  refuse("memory apart from the input", "memory that overlaps it");
}

void Buffer::refuse(const std::string& expected, const std::string& got) const {
  throw std::invalid_argument(std::string(what_) + ": expected " + expected + ", got " + got);
}

}  // namespace primitives
