// all_reduce of sparse (COO) tensors: what DDP does with the gradients of sparse embeddings.
#include <stdexcept>
#include <string>
#include <tuple>

#include "bindings/c10d_backend.hpp"

namespace primitives {
namespace {

// Collectives of this file gather one tensor from each rank.
using Gathered = std::vector<at::Tensor>;

void check_sparse(const at::Tensor& tensor) {
  if (tensor.device().is_cpu() && tensor.sparse_dim() > 0) return;
  throw std::invalid_argument(
      "all_reduce: expected a sparse tensor on cpu with sparse dimensions, got one on " +
      tensor.device().str() + " with " + std::to_string(tensor.sparse_dim()));
}

// {number of indices, sparse dimensions, sizes...}
at::Tensor header_of(const at::Tensor& coalesced) {
  std::vector<int64_t> header{coalesced._nnz(), coalesced.sparse_dim()};
  header.insert(header.end(), coalesced.sizes().begin(), coalesced.sizes().end());
  return at::tensor(header, at::kLong);
}

// "[5, 5] of which 2 are sparse"
std::string describe(const at::Tensor& header) {
  const at::IntArrayRef all(header.const_data_ptr<int64_t>(), header.numel());
  return c10::str(all.slice(2), " of which ", all[1], " are sparse");
}

// Every rank sees the same headers, so all of them throw or none.
void check_same_shape(const Gathered& headers) {
  for (size_t r = 1; r < headers.size(); r++) {
    if (at::equal(headers[r].slice(0, 1), headers[0].slice(0, 1))) continue;
    throw std::invalid_argument("all_reduce: expected the same dimensions on every rank, got " +
                                describe(headers[0]) + " on rank 0, " + describe(headers[r]) +
                                " on rank " + std::to_string(r));
  }
}

void gather_all(Transport& transport, const at::Tensor& mine, Gathered& all, bool same_sizes,
                Milliseconds timeout) {
  Call call = make_call(Op::kAllGather, mine, mine.numel());
  call.has_counts = !same_sizes;
  std::vector<Part> parts;
  for (const at::Tensor& tensor : all) parts.push_back({tensor.data_ptr(), tensor.nbytes()});
  transport.all_gather(call, mine.data_ptr(), mine.nbytes(), parts, timeout);
}

}  // namespace

// [Note: sparse sums] The values at the union of all ranks' indices are summed as one dense block,
// where a rank that lacks an index counts as zero: the bits of the dense all_reduce.
Backend::Job Backend::all_reduce_sparse(const at::Tensor& tensor, const c10d::ReduceOp& op,
                                        Milliseconds timeout) {
  check_sparse(tensor);
  check_on_cpu(tensor, "all_reduce of sparse tensors");
  Call call = make_call(Op::kAllReduce, tensor, 0);
  const Reduction reduction = make_reduction(call, tensor, op, getSize());
  if (call.reduce_op != ReduceOp::kSum && call.reduce_op != ReduceOp::kAvg &&
      call.reduce_op != ReduceOp::kPremulSum) {
    throw std::invalid_argument(std::string("all_reduce: ") + reduce_op_name(call.reduce_op) +
                                " is not defined for sparse tensors, only sums are");
  }
  return [=, this]() mutable {
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const at::Tensor mine = tensor.coalesce();
    const at::Tensor header = header_of(mine);
    Gathered headers, indices;
    for (int r = 0; r < getSize(); r++) headers.push_back(at::empty_like(header));
    gather_all(*transport_, header, headers, /*same_sizes=*/true, timeout);
    check_same_shape(headers);

    std::vector<int64_t> counts;
    for (const at::Tensor& of : headers) {
      counts.push_back(of[0].item<int64_t>());
      indices.push_back(at::empty({counts.back(), mine.sparse_dim()}, header.options()));
    }
    gather_all(*transport_, mine._indices().t().contiguous(), indices, /*same_sizes=*/false,
               timeout);
    at::Tensor united = at::cat(indices);  // [indices of all ranks, sparse dimensions]
    at::Tensor position = at::empty({0}, header.options());
    if (united.size(0) > 0) {
      std::tie(united, position, std::ignore) = at::unique_dim(united, 0, /*sorted=*/true,
                                                               /*return_inverse=*/true);
    }
    std::vector<int64_t> block_sizes = mine._values().sizes().vec();
    block_sizes[0] = united.size(0);
    at::Tensor block = at::zeros(block_sizes, mine._values().options());
    block.index_copy_(0, position.split_with_sizes(counts)[getRank()], mine._values());

    call.numel = static_cast<uint64_t>(block.numel());
    transport_->all_reduce(call, block.data_ptr(), block.nbytes(), reduction, timeout);
    const at::Tensor sum = at::_sparse_coo_tensor_unsafe(united.t().contiguous(), block,
                                                         tensor.sizes(), tensor.options());
    tensor.copy_(sum._coalesced_(true));
  };
}

}  // namespace primitives
