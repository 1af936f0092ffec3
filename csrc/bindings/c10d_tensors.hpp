// Tensors as the memory the collectives work on: checked once, made contiguous where they are not.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

#include "collectives/collectives.hpp"
#include "transport/symmetric.hpp"

namespace primitives {

// Throws std::invalid_argument unless its memory can be read as it is: on the CPU or a CUDA device,
// dense, with a value per element. `what`: "all_gather: input".
void check_tensor(const at::Tensor& tensor, const std::string& what);
// ... for what only the CPU has.
void check_on_cpu(const at::Tensor& tensor, const std::string& what);
void check_same_device(const at::Tensor& tensor, const at::Tensor& other, const std::string& what);
// ... and unless each of its elements has a place of its own.
void check_writable(const at::Tensor& tensor, const std::string& what);
// ... and of the same dtype and device as the others of its call.
void check_same_dtype(const at::Tensor& tensor, const at::Tensor& other, const std::string& what);
void check_numel(const at::Tensor& tensor, int64_t expected, const std::string& what);
// The only tensor of a list, as c10d passes it.
at::Tensor& only(std::vector<at::Tensor>& tensors, const char* op);

// A tensor as memory that the collectives can work on: its own when it is contiguous, aligned and
// without conjugate or negative bits, else a temporary.
//
// [Note: staged tensors] A temporary is filled by load() and copied back by store(), both when the
// collective runs, not when it is called: the collectives queued before it may write the tensor.
class StagedTensor {
 public:
  explicit StagedTensor(const at::Tensor& tensor);
  // `input` is still read while this one is written: a temporary is used when they overlap, unless
  // the input starts at `allowed_at`.
  void keep_apart(const StagedTensor& input, const void* allowed_at = nullptr);
  void load();
  void store();
  char* data() const { return static_cast<char*>(memory_.data_ptr()); }
  size_t nbytes() const { return memory_.nbytes(); }
  Part part() const { return {memory_.data_ptr(), memory_.nbytes()}; }
  const at::Tensor& memory() const { return memory_; }

 private:
  at::Tensor tensor_, memory_;
};

// `tensor` (contiguous) cut into n runs; of equal size when `counts` (of rows of dimension 0) is
// empty.
std::vector<Part> cut(const at::Tensor& tensor, int n, const std::vector<int64_t>& counts,
                      const std::string& what);

Call make_call(Op op, at::ScalarType dtype, uint64_t numel, int root = -1);
Call make_call(Op op, const at::Tensor& tensor, int64_t numel, int root = -1);
// Throws std::invalid_argument when the reduction does not exist for the dtype; completes the call.
// `factor`: of premul_sum.
Reduction make_reduction(Call& call, at::ScalarType dtype, ReduceOp op, double factor,
                         int world_size);
Reduction make_reduction(Call& call, const at::Tensor& tensor, const c10d::ReduceOp& op,
                         int world_size);

// Throws std::invalid_argument when a size is negative.
int64_t numel_of(at::IntArrayRef shape);
// A tensor that keeps its memory.
at::Tensor tensor_in(std::shared_ptr<void> memory, at::IntArrayRef shape, at::ScalarType dtype,
                     at::Device device);
// ... of the heap, and gives it back.
at::Tensor in_heap(std::shared_ptr<SymmetricHeap> heap, void* data, at::IntArrayRef shape,
                   at::ScalarType dtype);

}  // namespace primitives
