#include "bindings/c10d_tensors.hpp"

#include <ATen/EmptyTensor.h>

#include <algorithm>
#include <stdexcept>
#include <string_view>
#include <utility>

namespace primitives {
namespace {

std::string_view dtype_name(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return "float32";
    case at::kDouble:
      return "float64";
    case at::kHalf:
      return "float16";
    case at::kBFloat16:
      return "bfloat16";
    case at::kByte:
      return "uint8";
    case at::kChar:
      return "int8";
    case at::kShort:
      return "int16";
    case at::kInt:
      return "int32";
    case at::kLong:
      return "int64";
    case at::kBool:
      return "bool";
    case at::kUInt16:
      return "uint16";
    case at::kUInt32:
      return "uint32";
    case at::kUInt64:
      return "uint64";
    case at::kComplexHalf:
      return "complex32";
    case at::kComplexFloat:
      return "complex64";
    case at::kComplexDouble:
      return "complex128";
    default:  // names of the rest, as torch spells them
      return c10::toString(type);
  }
}

std::string shape_of(const at::Tensor& tensor) { return c10::str(tensor.sizes()); }

// The type a reduction works in, or -1. A complex number is two floats.
int reducible(at::ScalarType type) {
  switch (type) {
    case at::kFloat:
    case at::kComplexFloat:
      return static_cast<int>(DType::kFloat32);
    case at::kDouble:
    case at::kComplexDouble:
      return static_cast<int>(DType::kFloat64);
    case at::kHalf:
    case at::kComplexHalf:
      return static_cast<int>(DType::kFloat16);
    case at::kBFloat16:
      return static_cast<int>(DType::kBFloat16);
    case at::kByte:
      return static_cast<int>(DType::kUInt8);
    case at::kChar:
      return static_cast<int>(DType::kInt8);
    case at::kShort:
      return static_cast<int>(DType::kInt16);
    case at::kInt:
      return static_cast<int>(DType::kInt32);
    case at::kLong:
      return static_cast<int>(DType::kInt64);
    case at::kUInt16:
      return static_cast<int>(DType::kUInt16);
    case at::kUInt32:
      return static_cast<int>(DType::kUInt32);
    case at::kUInt64:
      return static_cast<int>(DType::kUInt64);
    case at::kBool:
      return static_cast<int>(DType::kBool);
    default:
      return -1;
  }
}

ReduceOp reduce_op_of(const c10d::ReduceOp& op) {
  switch (op.op_) {
    case c10d::ReduceOp::SUM:
      return ReduceOp::kSum;
    case c10d::ReduceOp::AVG:
      return ReduceOp::kAvg;
    case c10d::ReduceOp::PRODUCT:
      return ReduceOp::kProduct;
    case c10d::ReduceOp::MIN:
      return ReduceOp::kMin;
    case c10d::ReduceOp::MAX:
      return ReduceOp::kMax;
    case c10d::ReduceOp::BAND:
      return ReduceOp::kBand;
    case c10d::ReduceOp::BOR:
      return ReduceOp::kBor;
    case c10d::ReduceOp::BXOR:
      return ReduceOp::kBxor;
    case c10d::ReduceOp::PREMUL_SUM:
      return ReduceOp::kPremulSum;
    case c10d::ReduceOp::UNUSED:
      return ReduceOp::kNone;
  }
  return ReduceOp::kNone;
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg() &&
         reinterpret_cast<uintptr_t>(tensor.data_ptr()) % tensor.element_size() == 0;
}

at::Tensor temporary_like(const at::Tensor& tensor) {
  const at::NoGradGuard no_grad;
  return at::empty(tensor.sizes(), tensor.options().requires_grad(false));
}

// The same memory as numbers that torch can copy: it has types that it only holds.
at::Tensor copyable(const at::Tensor& tensor) {
  switch (tensor.element_size()) {
    case 1:
      return tensor.view(at::kByte);
    case 2:
      return tensor.view(at::kShort);
    case 4:
      return tensor.view(at::kInt);
    case 8:
      return tensor.view(at::kLong);
    default:
      return tensor;
  }
}

void copy_values(const at::Tensor& to, const at::Tensor& from) {
  // As the collectives write: without autograd, and whatever mode made the tensor.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const bool lazy = to.is_conj() || to.is_neg() || from.is_conj() || from.is_neg();
  lazy ? to.copy_(from) : copyable(to).copy_(copyable(from));
}

// Dimensions from the innermost on: each must step over all that the ones within it cover.
bool elements_lie_apart(const at::Tensor& tensor) {
  if (tensor.is_contiguous()) return true;
  std::vector<std::pair<int64_t, int64_t>> dims;  // stride, size
  for (int64_t d = 0; d < tensor.dim(); d++) {
    if (tensor.size(d) == 0) return true;
    if (tensor.size(d) > 1) dims.emplace_back(tensor.stride(d), tensor.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t covered = 0;
  for (const auto& [stride, size] : dims) {
    if (stride <= covered) return false;
    covered += stride * (size - 1);
  }
  return true;
}

// Of what `tensor` needs, as far as its storage goes.
bool has_storage(const at::Tensor& tensor) {
  const size_t needed =
      at::detail::computeStorageNbytes(tensor.sizes(), tensor.strides(), tensor.element_size(),
                                       static_cast<size_t>(tensor.storage_offset()));
  return tensor.numel() == 0 || (tensor.has_storage() && tensor.storage().nbytes() >= needed &&
                                 tensor.data_ptr() != nullptr);
}

}  // namespace

void check_tensor(const at::Tensor& tensor, const std::string& what) {
  if (!tensor.defined()) throw std::invalid_argument(what + ": expected a tensor, got none");
  if (!tensor.device().is_cpu() && !tensor.device().is_cuda()) {
    throw std::invalid_argument(what + ": expected a tensor on cpu or cuda, got one on " +
                                tensor.device().str());
  }
  if (tensor.layout() != at::kStrided) {
    throw std::invalid_argument(what + ": expected a dense tensor, got a " +
                                c10::str(tensor.layout()) + " one");
  }
  if (tensor.is_quantized() || tensor.is_nested() || tensor._is_zerotensor()) {
    throw std::invalid_argument(what + ": expected plain elements, got a " + tensor.toString() +
                                " (quantized, nested or without values)");
  }
  if (!has_storage(tensor)) {
    throw std::invalid_argument(what + ": expected memory for shape " + shape_of(tensor) +
                                ", got a tensor whose storage was freed");
  }
}

void check_on_cpu(const at::Tensor& tensor, const std::string& what) {
  if (tensor.device().is_cpu()) return;
  throw std::invalid_argument(what + ": expected a tensor on cpu, got one on " +
                              tensor.device().str());
}

void check_same_device(const at::Tensor& tensor, const at::Tensor& other, const std::string& what) {
  if (tensor.device() == other.device()) return;
  throw std::invalid_argument(what + ": expected a tensor on " + other.device().str() +
                              ", got one on " + tensor.device().str());
}

void check_writable(const at::Tensor& tensor, const std::string& what) {
  check_tensor(tensor, what);
  if (elements_lie_apart(tensor)) return;
  throw std::invalid_argument(what + ": expected a place for each element, got shape " +
                              shape_of(tensor) + " with strides " + c10::str(tensor.strides()) +
                              ", where elements share memory");
}

void check_same_dtype(const at::Tensor& tensor, const at::Tensor& other, const std::string& what) {
  check_tensor(tensor, what);
  check_same_device(tensor, other, what);
  if (tensor.scalar_type() == other.scalar_type()) return;
  throw std::invalid_argument(what + ": expected dtype " +
                              std::string(dtype_name(other.scalar_type())) + ", got " +
                              std::string(dtype_name(tensor.scalar_type())));
}

void check_numel(const at::Tensor& tensor, int64_t expected, const std::string& what) {
  if (tensor.numel() == expected) return;
  throw std::invalid_argument(what + ": expected " + std::to_string(expected) + " elements, got " +
                              std::to_string(tensor.numel()) + " (shape " + shape_of(tensor) + ")");
}

at::Tensor& only(std::vector<at::Tensor>& tensors, const char* op) {
  if (tensors.size() == 1) return tensors[0];
  throw std::invalid_argument(std::string(op) + ": expected one tensor per rank, got " +
                              std::to_string(tensors.size()));
}

StagedTensor::StagedTensor(const at::Tensor& tensor)
    : tensor_(tensor), memory_(is_plain(tensor) ? tensor : temporary_like(tensor)) {}

void StagedTensor::keep_apart(const StagedTensor& input, const void* allowed_at) {
  const char *begin = data(), *end = begin + nbytes();
  const char *from = input.data(), *to = from + input.nbytes();
  if (to <= begin || end <= from || from == allowed_at) return;
  memory_ = temporary_like(tensor_);
}

void StagedTensor::load() {
  if (!memory_.is_same(tensor_)) copy_values(memory_, tensor_);
}

void StagedTensor::store() {
  if (!memory_.is_same(tensor_)) copy_values(tensor_, memory_);
}

std::vector<Part> cut(const at::Tensor& tensor, int n, const std::vector<int64_t>& counts,
                      const std::string& what) {
  std::vector<Part> parts(n);
  char* at = static_cast<char*>(tensor.data_ptr());
  if (counts.empty()) {
    if (tensor.numel() % n != 0) {
      throw std::invalid_argument(what + ": expected a multiple of " + std::to_string(n) +
                                  " elements, got shape " + shape_of(tensor));
    }
    for (Part& part : parts) {
      part = {at, tensor.nbytes() / n};
      at += part.nbytes;
    }
    return parts;
  }
  const int64_t num_rows = tensor.dim() == 0 ? 1 : tensor.size(0);
  int64_t total = 0;
  bool negative = false;
  for (int64_t count : counts) {
    total += count;
    negative = negative || count < 0;
  }
  if (static_cast<int>(counts.size()) != n || total != num_rows || negative) {
    throw std::invalid_argument(what + ": expected " + std::to_string(n) +
                                " split sizes that sum to " + std::to_string(num_rows) + ", got " +
                                c10::str(at::IntArrayRef(counts)));
  }
  const size_t row_nbytes = num_rows == 0 ? 0 : tensor.nbytes() / num_rows;
  for (int r = 0; r < n; r++) {
    parts[r] = {at, counts[r] * row_nbytes};
    at += parts[r].nbytes;
  }
  return parts;
}

Call make_call(Op op, at::ScalarType dtype, uint64_t numel, int root) {
  Call call;
  call.op = op;
  dtype_name(dtype).copy(call.dtype, sizeof call.dtype - 1);
  call.itemsize = static_cast<uint32_t>(c10::elementSize(dtype));
  call.numel = numel;
  call.root = root;
  return call;
}

Call make_call(Op op, const at::Tensor& tensor, int64_t numel, int root) {
  return make_call(op, tensor.scalar_type(), static_cast<uint64_t>(numel), root);
}

Reduction make_reduction(Call& call, at::ScalarType dtype, ReduceOp op, double factor,
                         int world_size) {
  call.reduce_op = op;
  const int plain = reducible(dtype);
  const bool complex = c10::isComplexType(dtype);
  const bool linear = op == ReduceOp::kSum || op == ReduceOp::kAvg || op == ReduceOp::kPremulSum;
  Reduction reduction;
  if (plain >= 0 && (linear || !complex)) {
    reduction.dtype = static_cast<DType>(plain);
    reduction.op = op;
    reduction.kernel = find_reduce(reduction.dtype, op);
  }
  if (reduction.kernel == nullptr) {
    throw std::invalid_argument(std::string(op_name(call.op)) + ": " + reduce_op_name(op) +
                                " is not defined for " + call.dtype);
  }
  reduction.itemsize = call.itemsize / (complex ? 2 : 1);
  reduction.factor = world_size;
  if (op == ReduceOp::kPremulSum) reduction.factor = call.factor = factor;
  return reduction;
}

Reduction make_reduction(Call& call, const at::Tensor& tensor, const c10d::ReduceOp& op,
                         int world_size) {
  double factor = 0;
  if (op.op_ == c10d::ReduceOp::PREMUL_SUM) {
    const auto& by = dynamic_cast<const c10d::NCCLPreMulSumSupplement&>(*op.supplement_);
    factor = by.tensor_factor.defined() ? by.tensor_factor.item<double>() : by.double_factor;
  }
  return make_reduction(call, tensor.scalar_type(), reduce_op_of(op), factor, world_size);
}

int64_t numel_of(at::IntArrayRef shape) {
  if (std::ranges::all_of(shape, [](int64_t size) { return size >= 0; })) {
    return c10::multiply_integers(shape);
  }
  throw std::invalid_argument("empty: expected sizes >= 0, got " + c10::str(shape));
}

at::Tensor tensor_in(std::shared_ptr<void> memory, at::IntArrayRef shape, at::ScalarType dtype,
                     at::Device device) {
  void* const data = memory.get();
  return at::for_blob(data, shape)
      .deleter([memory = std::move(memory)](void*) {})
      .target_device(device)
      .options(at::TensorOptions().dtype(dtype).device(device))
      .make_tensor();
}

at::Tensor in_heap(std::shared_ptr<SymmetricHeap> heap, void* data, at::IntArrayRef shape,
                   at::ScalarType dtype) {
  const auto free = [heap = std::move(heap)](void* memory) { heap->free(memory); };
  return tensor_in({data, free}, shape, dtype, at::kCPU);
}

}  // namespace primitives
