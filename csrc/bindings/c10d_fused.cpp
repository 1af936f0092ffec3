// Fused collectives and symmetric memory of the backend: checks tensors, finds their memory.
#include <algorithm>
#include <stdexcept>

#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_errors.hpp"
#include "canonical/kernels.hpp"
#include "collectives/fused.hpp"
#include "collectives/symmetric.hpp"

namespace primitives {
namespace {

using c10d::OpType;

constexpr auto kDefaultTimeout = c10d::kUnsetTimeout;

std::optional<DType> float_dtype(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return DType::kFloat32;
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    default:
      return std::nullopt;
  }
}

std::string item(const std::string& what, size_t i) { return what + "[" + std::to_string(i) + "]"; }

// `like`: another tensor of the call.
void check_memory(const Backend::Tensors& tensors, const at::Tensor& like,
                  const std::string& what) {
  for (size_t i = 0; i < tensors.size(); i++) {
    check_same_dtype(tensors[i], tensors[0], item(what, i));
    check_same_device(tensors[i], like, item(what, i));
    const auto address = reinterpret_cast<uintptr_t>(tensors[i].data_ptr());
    if (!like.device().is_cpu() && address % tensors[i].element_size() != 0) {
      throw std::invalid_argument(item(what, i) + ": expected elements at multiples of their size");
    }
    if (tensors[i].is_contiguous() && !tensors[i].is_conj() && !tensors[i].is_neg()) continue;
    throw std::invalid_argument(item(what, i) + ": expected a contiguous tensor, got shape " +
                                c10::str(tensors[i].sizes()) + " with strides " +
                                c10::str(tensors[i].strides()));
  }
}

// Element counts [tensor * world_size + rank], checked against the full tensors.
std::vector<int64_t> checked_numels(const Backend::Tensors& fulls, std::vector<int64_t> numels,
                                    int n, const std::string& what) {
  if (numels.empty()) {
    for (const at::Tensor& full : fulls) {
      const int64_t rows = full.dim() == 0 ? 1 : full.size(0), chunk = (rows + n - 1) / n;
      const int64_t row = rows == 0 ? 0 : full.numel() / rows;
      for (int r = 0; r < n; r++) {
        numels.push_back(std::clamp<int64_t>(rows - r * chunk, 0, chunk) * row);
      }
    }
    return numels;
  }
  if (numels.size() != fulls.size() * n) {
    throw std::invalid_argument(what + ": expected numels for " + std::to_string(fulls.size()) +
                                " tensors on " + std::to_string(n) + " ranks, got " +
                                std::to_string(numels.size()) + " numbers");
  }
  for (size_t t = 0; t < fulls.size(); t++) {
    const at::IntArrayRef of_one(numels.data() + t * n, n);
    int64_t total = 0;
    for (int64_t numel : of_one) total += numel;
    if (total != fulls[t].numel() || *std::min_element(of_one.begin(), of_one.end()) < 0) {
      throw std::invalid_argument(item(what + ": numels", t) + ": expected counts that sum to " +
                                  std::to_string(fulls[t].numel()) + ", got " + c10::str(of_one));
    }
  }
  return numels;
}

void check_shards(const Backend::Tensors& shards, const Backend::Tensors& fulls, const Cuts& cuts,
                  int rank, const std::string& what) {
  for (size_t i = 0; i < shards.size(); i++) {
    check_numel(shards[i], static_cast<int64_t>(cuts.numel(rank, i)), item(what, i));
  }
}

// Memory that a collective reads or writes.
struct Range {
  const char *begin, *end;
  bool written;

  Range(const at::Tensor& tensor, bool written)
      : begin(static_cast<const char*>(tensor.data_ptr())),
        end(begin + tensor.nbytes()),
        written(written) {}
};

// No range that is written may overlap another one.
void check_apart(std::vector<Range> ranges, const std::string& what) {
  std::erase_if(ranges, [](const Range& range) { return range.begin == range.end; });
  std::sort(ranges.begin(), ranges.end(),
            [](const Range& a, const Range& b) { return a.begin < b.begin; });
  const char *written_to = nullptr, *used_to = nullptr;
  for (const Range& range : ranges) {
    if (range.begin < (range.written ? used_to : written_to)) {
      throw std::invalid_argument(what + ": expected outputs that overlap no other tensor");
    }
    used_to = std::max(used_to, range.end);
    if (range.written) written_to = std::max(written_to, range.end);
  }
}

void check_lengths(const Backend::Tensors& shards, const Backend::Tensors& fulls,
                   const std::string& what) {
  if (shards.size() == fulls.size()) return;
  throw std::invalid_argument(what + ": expected one shard for each full tensor, got " +
                              std::to_string(shards.size()) + " shards and " +
                              std::to_string(fulls.size()) + " full tensors");
}

Call fused_call(Op op, const at::Tensor& tensor, const Cuts& cuts) {
  Call call = make_call(op, tensor, static_cast<int64_t>(cuts.numel()));
  call.num_tensors = cuts.num_tensors();
  call.digest = cuts.digest();
  return call;
}

}  // namespace

Backend::WorkPtr Backend::all_gather_many(Tensors shards, Tensors fulls,
                                          std::vector<int64_t> numels, bool async) {
  const std::string what = "fused all_gather";
  return translated([&] {
    check_lengths(shards, fulls, what);
    if (shards.empty()) throw std::invalid_argument(what + ": expected a shard, got none");
    check_memory(shards, shards[0], what + ": shards");
    check_memory(fulls, shards[0], what + ": fulls");
    const auto cuts = std::make_shared<Cuts>(
        getSize(), checked_numels(fulls, std::move(numels), getSize(), what));
    check_shards(shards, fulls, *cuts, getRank(), what + ": shards");
    const auto from = float_dtype(shards[0]), to = float_dtype(fulls[0]);
    const bool same = shards[0].scalar_type() == fulls[0].scalar_type();
    const CastFn cast = !same && from && to ? find_cast(*from, *to) : nullptr;
    Call call = fused_call(Op::kAllGatherMany, shards[0], *cuts);
    if (!same) {
      const std::string name = call.dtype;
      const Call of_full = make_call(Op::kAllGatherMany, fulls[0], 0);
      if (cast == nullptr) {
        throw std::invalid_argument(what + ": expected equal dtypes, or float32, float16 and " +
                                    "bfloat16, got " + name + " and " + of_full.dtype);
      }
      (name + ">" + of_full.dtype).copy(call.dtype, sizeof call.dtype - 1);
    }
    std::vector<const void*> sources;
    std::vector<void*> results;
    std::vector<Range> ranges;
    for (size_t i = 0; i < fulls.size(); i++) {
      sources.push_back(shards[i].data_ptr());
      results.push_back(fulls[i].data_ptr());
      ranges.emplace_back(fulls[i], true);
      const char* own = ranges.back().begin + cuts->begin(getRank(), i) * fulls[i].element_size();
      // A shard may be this rank's part of its full tensor.
      if (!same || shards[i].data_ptr() != own) ranges.emplace_back(shards[i], false);
    }
    check_apart(std::move(ranges), what);
    const Milliseconds timeout = resolve(kDefaultTimeout);
    return run(OpType::ALLGATHER_COALESCED, async, fulls[0], fulls, [=, this] {
      const GatherMany many{*cuts,
                            sources,
                            results,
                            cast,
                            shards[0].dtype().itemsize(),
                            fulls[0].dtype().itemsize(),
                            from.value_or(DType::kFloat32),
                            to.value_or(DType::kFloat32)};
      on(fulls[0]).all_gather_many(call, many, timeout);
    });
  });
}

Backend::WorkPtr Backend::reduce_scatter_many(Tensors fulls, Tensors shards,
                                              std::vector<int64_t> numels, double factor,
                                              bool accumulate,
                                              const std::optional<at::Tensor>& squares,
                                              bool async) {
  const std::string what = "fused reduce_scatter";
  return translated([&] {
    check_lengths(shards, fulls, what);
    if (shards.empty()) throw std::invalid_argument(what + ": expected a full tensor, got none");
    check_memory(fulls, fulls[0], what + ": fulls");
    check_memory(shards, fulls[0], what + ": shards");
    const auto cuts = std::make_shared<Cuts>(
        getSize(), checked_numels(fulls, std::move(numels), getSize(), what));
    check_shards(shards, fulls, *cuts, getRank(), what + ": shards");
    Call call = fused_call(Op::kReduceScatterMany, fulls[0], *cuts);
    call.reduce_op = ReduceOp::kSum;
    call.factor = factor;
    if (accumulate) call.digest = ~call.digest;
    const auto dtype = float_dtype(fulls[0]);
    if (!dtype) {
      throw std::invalid_argument(what + ": expected fulls of float32, float16 or bfloat16, got " +
                                  call.dtype);
    }
    std::vector<const void*> sources;
    std::vector<float*> results;
    std::vector<Range> ranges;
    for (size_t i = 0; i < fulls.size(); i++) {
      if (shards[i].scalar_type() != at::kFloat) {
        throw std::invalid_argument(item(what + ": shards", i) + ": expected float32, got " +
                                    make_call(call.op, shards[i], 0).dtype);
      }
      sources.push_back(fulls[i].data_ptr());
      results.push_back(static_cast<float*>(shards[i].data_ptr()));
      ranges.emplace_back(fulls[i], false);
      ranges.emplace_back(shards[i], true);
    }
    float* sums = nullptr;
    if (squares) {
      check_memory({*squares}, fulls[0], what + ": squares");
      if (squares->scalar_type() != at::kFloat) {
        throw std::invalid_argument(what + ": squares: expected float32, got " +
                                    make_call(call.op, *squares, 0).dtype);
      }
      check_numel(*squares, static_cast<int64_t>(fulls.size()), what + ": squares");
      ranges.emplace_back(*squares, true);
      sums = static_cast<float*>(squares->data_ptr());
    }
    check_apart(std::move(ranges), what);
    const Milliseconds timeout = resolve(kDefaultTimeout);
    return run(OpType::COALESCED, async, fulls[0], shards, [=, this] {
      const ReduceScatterMany many{*cuts,
                                   sources,
                                   results,
                                   *dtype,
                                   fulls[0].dtype().itemsize(),
                                   static_cast<float>(factor),
                                   accumulate,
                                   sums,
                                   canonical::kernels().sum_of_squares};
      on(fulls[0]).reduce_scatter_many(call, many, timeout);
      static_cast<void>(squares);  // kept alive: the sums go into it
    });
  });
}

at::Tensor Backend::empty(at::IntArrayRef shape, at::ScalarType dtype, at::Device device) {
  return translated([&] {
    const Call call = make_call(Op::kEmpty, dtype, numel_of(shape));
    group_->check();
    if (!device.is_cpu()) return empty_on(device, call, shape, dtype);
    void* data = nullptr;
    queue_->run_sync([&] {
      data = transport_->empty(call, call.numel * call.itemsize, resolve(kDefaultTimeout));
    });
    return in_heap(group_->heap(), data, shape, dtype);
  });
}

at::Tensor Backend::allocateTensor(long numel, at::TensorOptions options) {
  return translated([&] {
    const auto dtype = c10::typeMetaToScalarType(options.dtype());
    const at::Device device = options.device();
    if (numel < 0 || (!device.is_cpu() && !device.is_cuda())) {
      throw std::invalid_argument("allocate_tensor: expected a size and the cpu or cuda, got " +
                                  std::to_string(numel) + " on " + device.str());
    }
    const size_t nbytes = numel * c10::elementSize(dtype);
    if (device.is_cpu()) {
      const auto heap = group_->heap();
      return in_heap(heap, heap->allocate(nbytes), {numel}, dtype);
    }
    if (!device_ || (device.has_index() && device.index() != device_index_)) {
      return at::empty({numel}, options);
    }
    return tensor_in(device_->allocate(nbytes), {numel}, dtype, {at::kCUDA, device_index_});
  });
}

}  // namespace primitives
