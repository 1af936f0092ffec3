// Tensors as the memory the collectives work on: checked once, made contiguous where they are not.
#pragma once

#include <ATen/ATen.h>

#include <string>
#include <torch/csrc/distributed/c10d/Types.hpp>
#include <vector>

#include "collectives/collectives.hpp"

namespace primitives {

// Throws std::invalid_argument unless it is a dense CPU tensor. `what`: "all_gather: input".
void check_tensor(const at::Tensor& tensor, const std::string& what);
// ... and of the same dtype as the others of its call.
void check_same_dtype(const at::Tensor& tensor, const at::Tensor& other, const std::string& what);
void check_numel(const at::Tensor& tensor, int64_t expected, const std::string& what);
// The only tensor of a list, as c10d passes it.
at::Tensor& only(std::vector<at::Tensor>& tensors, const char* op);

// Tensors whose contents go in: contiguous, without conjugate or negative bits.
at::Tensor readable(const at::Tensor& tensor);

// A tensor that receives a result: itself when contiguous, else a temporary that store() copies
// back.
class Output {
 public:
  // `load`: the temporary starts as the tensor's contents (in-place collectives).
  explicit Output(const at::Tensor& tensor, bool load = false);
  // `input` is still read while the result is written: a temporary is used when they overlap,
  // unless the input starts at `allowed_at`.
  void keep_apart(const at::Tensor& input, const void* allowed_at = nullptr);
  void store();
  void* data() const { return memory_.data_ptr(); }
  Part part() const { return {memory_.data_ptr(), memory_.nbytes()}; }
  const at::Tensor& memory() const { return memory_; }

 private:
  at::Tensor tensor_, memory_;
};

Part part_of(const at::Tensor& tensor);
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

}  // namespace primitives
