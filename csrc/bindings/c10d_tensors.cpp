#include "bindings/c10d_tensors.hpp"

#include <cstdio>
#include <stdexcept>

namespace primitives {
namespace {

std::string dtype_name(at::ScalarType type) {
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
  return tensor.is_contiguous() && !tensor.is_conj() && !tensor.is_neg();
}

}  // namespace

void check_tensor(const at::Tensor& tensor, const std::string& what) {
  if (!tensor.defined()) throw std::invalid_argument(what + ": expected a tensor, got none");
  if (!tensor.device().is_cpu()) {
    throw std::invalid_argument(what + ": expected a tensor on cpu, got one on " +
                                tensor.device().str());
  }
  if (tensor.layout() != at::kStrided) {
    throw std::invalid_argument(what + ": expected a dense tensor, got a " +
                                c10::str(tensor.layout()) + " one");
  }
}

void check_same_dtype(const at::Tensor& tensor, const at::Tensor& other, const std::string& what) {
  check_tensor(tensor, what);
  if (tensor.scalar_type() == other.scalar_type()) return;
  throw std::invalid_argument(what + ": expected dtype " + dtype_name(other.scalar_type()) +
                              ", got " + dtype_name(tensor.scalar_type()));
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

at::Tensor readable(const at::Tensor& tensor) {
  if (is_plain(tensor)) return tensor;
  const at::NoGradGuard no_grad;
  return tensor.detach().resolve_conj().resolve_neg().contiguous();
}

Output::Output(const at::Tensor& tensor, bool load) : tensor_(tensor), memory_(tensor) {
  if (is_plain(tensor)) return;
  const at::NoGradGuard no_grad;
  memory_ = at::empty(tensor.sizes(), tensor.options().requires_grad(false));
  if (load) memory_.copy_(tensor.detach());
}

void Output::keep_apart(const at::Tensor& input, const void* allowed_at) {
  const char *begin = static_cast<const char*>(memory_.data_ptr()), *end = begin + memory_.nbytes();
  const char *from = static_cast<const char*>(input.data_ptr()), *to = from + input.nbytes();
  if (to <= begin || end <= from || from == allowed_at) return;
  const at::NoGradGuard no_grad;
  memory_ = at::empty(tensor_.sizes(), tensor_.options().requires_grad(false));
}

void Output::store() {
  if (memory_.is_same(tensor_)) return;
  // As the collectives write: without autograd, and whatever mode made the tensor.
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  tensor_.copy_(memory_);
}

Part part_of(const at::Tensor& tensor) { return {tensor.data_ptr(), tensor.nbytes()}; }

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
  std::snprintf(call.dtype, sizeof call.dtype, "%s", dtype_name(dtype).c_str());
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

}  // namespace primitives
