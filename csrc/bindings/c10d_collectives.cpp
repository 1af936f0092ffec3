// Each c10d collective: check the tensors, find their memory, hand over to csrc/collectives.
#include <stdexcept>

#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_errors.hpp"

namespace primitives {
namespace {

using c10d::OpType;

void check_list(size_t got, int expected, const char* what) {
  if (got == static_cast<size_t>(expected)) return;
  throw std::invalid_argument(std::string(what) + ": expected one tensor per rank, " +
                              std::to_string(expected) + ", got " + std::to_string(got));
}

using StagedTensors = std::vector<StagedTensor>;

std::vector<Part> parts_of(const StagedTensors& buffers) {
  std::vector<Part> parts;
  for (const StagedTensor& buffer : buffers) parts.push_back(buffer.part());
  return parts;
}

void load_all(StagedTensors& buffers) {
  for (StagedTensor& buffer : buffers) buffer.load();
}

void store_all(StagedTensors& buffers) {
  for (StagedTensor& buffer : buffers) buffer.store();
}

// The inputs of a list, of the dtype of `like`.
StagedTensors inputs_of(const std::vector<at::Tensor>& tensors, const at::Tensor& like,
                        const char* what) {
  StagedTensors inputs;
  for (const at::Tensor& tensor : tensors) {
    check_same_dtype(tensor, like, what);
    inputs.emplace_back(tensor);
  }
  return inputs;
}

// The outputs of a list, kept apart from the inputs that are still read while they are written.
StagedTensors outputs_of(const std::vector<at::Tensor>& tensors, const at::Tensor& like,
                         const StagedTensors& inputs, const char* what) {
  StagedTensors outputs;
  for (const at::Tensor& tensor : tensors) {
    check_same_dtype(tensor, like, what);
    check_writable(tensor, what);
    outputs.emplace_back(tensor);
    for (const StagedTensor& input : inputs) outputs.back().keep_apart(input);
  }
  return outputs;
}

// A tensor that one rank reads and another writes.
void check_in_place(const at::Tensor& tensor, bool written, const char* what) {
  written ? check_writable(tensor, what) : check_tensor(tensor, what);
}

// One of them; undefined when there is none.
at::Tensor on_one_device(const std::vector<at::Tensor>& tensors, const char* what) {
  for (const at::Tensor& tensor : tensors) check_same_device(tensor, tensors[0], what);
  return tensors.empty() ? at::Tensor() : tensors[0];
}

int64_t total_numel(const std::vector<at::Tensor>& tensors) {
  int64_t numel = 0;
  for (const at::Tensor& tensor : tensors) numel += tensor.numel();
  return numel;
}

void check_root(int64_t root, int world_size, const char* op) {
  if (root >= 0 && root < world_size) return;
  throw std::invalid_argument(std::string(op) + ": expected a root in [0, " +
                              std::to_string(world_size) + "), got " + std::to_string(root));
}

}  // namespace

// ---- all_gather

Backend::Job Backend::all_gather_into(const at::Tensor& out, const at::Tensor& in,
                                      Milliseconds timeout) {
  check_tensor(in, "all_gather: input");
  check_same_dtype(out, in, "all_gather: output");
  check_writable(out, "all_gather: output");
  check_numel(out, in.numel() * getSize(), "all_gather: output");
  StagedTensor source(in), result(out);
  // FSDP gathers in place: the input may be this rank's part of the output.
  result.keep_apart(source, result.data() + getRank() * source.nbytes());
  const Call call = make_call(Op::kAllGather, in, in.numel());
  return [=, this]() mutable {
    const auto parts = cut(result.memory(), getSize(), {}, "all_gather");
    source.load();
    on(in).all_gather(call, source.data(), source.nbytes(), parts, timeout);
    result.store();
  };
}

Backend::Job Backend::all_gather_list(const Tensors& out, const at::Tensor& in,
                                      Milliseconds timeout) {
  check_tensor(in, "all_gather: input");
  check_list(out.size(), getSize(), "all_gather: outputs");
  StagedTensor source(in);
  StagedTensors results = outputs_of(out, in, {source}, "all_gather: output");
  check_numel(out[getRank()], in.numel(), "all_gather: this rank's output");
  Call call = make_call(Op::kAllGather, in, in.numel());
  call.has_counts = true;
  return [=, this]() mutable {
    source.load();
    on(in).all_gather(call, source.data(), source.nbytes(), parts_of(results), timeout);
    store_all(results);
  };
}

Backend::WorkPtr Backend::_allgather_base(at::Tensor& out, at::Tensor& in,
                                          const c10d::AllgatherOptions& options) {
  return translated([&] {
    return run(OpType::_ALLGATHER_BASE, options.asyncOp, in, {out},
               all_gather_into(out, in, resolve(options.timeout)));
  });
}

Backend::WorkPtr Backend::allgather(TensorLists& out, Tensors& in,
                                    const c10d::AllgatherOptions& options) {
  return translated([&] {
    check_list(out.size(), 1, "all_gather: output lists");
    return run(OpType::ALLGATHER, options.asyncOp, only(in, "all_gather"), out[0],
               all_gather_list(out[0], in[0], resolve(options.timeout)));
  });
}

Backend::WorkPtr Backend::allgather_coalesced(TensorLists& out, Tensors& in,
                                              const c10d::AllgatherOptions& options) {
  return translated([&] {
    std::vector<Job> jobs;
    Tensors all;
    for (const Tensors& list : out)
      check_list(list.size(), static_cast<int>(in.size()), "all_gather");
    check_list(out.size(), getSize(), "all_gather: output lists");
    const at::Tensor like = on_one_device(in, "all_gather: input");
    for (size_t i = 0; i < in.size(); i++) {
      Tensors of_one;  // c10d passes [rank][tensor]
      for (const Tensors& list : out) of_one.push_back(list[i]);
      jobs.push_back(all_gather_list(of_one, in[i], resolve(options.timeout)));
      all.insert(all.end(), of_one.begin(), of_one.end());
    }
    return run(OpType::ALLGATHER_COALESCED, options.asyncOp, like, all, [jobs] {
      for (const Job& job : jobs) job();
    });
  });
}

Backend::WorkPtr Backend::allgather_into_tensor_coalesced(Tensors& out, Tensors& in,
                                                          const c10d::AllgatherOptions& options) {
  return translated([&] {
    check_list(out.size(), static_cast<int>(in.size()), "all_gather: outputs");
    const at::Tensor like = on_one_device(in, "all_gather: input");
    std::vector<Job> jobs;
    for (size_t i = 0; i < in.size(); i++) {
      jobs.push_back(all_gather_into(out[i], in[i], resolve(options.timeout)));
    }
    return run(OpType::COALESCED, options.asyncOp, like, out, [jobs] {
      for (const Job& job : jobs) job();
    });
  });
}

// ---- reductions

Backend::Job Backend::all_reduce_one(const at::Tensor& tensor, const c10d::ReduceOp& op,
                                     Milliseconds timeout) {
  check_writable(tensor, "all_reduce");
  Call call = make_call(Op::kAllReduce, tensor, tensor.numel());
  const Reduction reduction = make_reduction(call, tensor, op, getSize());
  StagedTensor data(tensor);
  return [=, this]() mutable {
    data.load();
    on(tensor).all_reduce(call, data.data(), data.nbytes(), reduction, timeout);
    data.store();
  };
}

Backend::WorkPtr Backend::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  return translated([&] {
    const at::Tensor& tensor = only(tensors, "all_reduce");
    if (tensor.layout() == at::kSparse) return allreduce_sparse(tensors, options);
    return run(OpType::ALLREDUCE, options.asyncOp, tensor, tensors,
               all_reduce_one(tensor, options.reduceOp, resolve(options.timeout)));
  });
}

Backend::WorkPtr Backend::allreduce_sparse(Tensors& tensors,
                                           const c10d::AllreduceOptions& options) {
  return translated([&] {
    const at::Tensor& tensor = only(tensors, "all_reduce");
    return run(OpType::_ALLREDUCE_SPARSE, options.asyncOp, tensor, tensors,
               all_reduce_sparse(tensor, options.reduceOp, resolve(options.timeout)));
  });
}

Backend::WorkPtr Backend::allreduce_coalesced(Tensors& tensors,
                                              const c10d::AllreduceCoalescedOptions& options) {
  return translated([&] {
    const at::Tensor like = on_one_device(tensors, "all_reduce");
    std::vector<Job> jobs;
    for (const at::Tensor& tensor : tensors) {
      jobs.push_back(all_reduce_one(tensor, options.reduceOp, resolve(options.timeout)));
    }
    return run(OpType::ALLREDUCE_COALESCED, options.asyncOp, like, tensors, [jobs] {
      for (const Job& job : jobs) job();
    });
  });
}

Backend::WorkPtr Backend::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  return translated([&] {
    const at::Tensor& tensor = only(tensors, "reduce");
    check_root(options.rootRank, getSize(), "reduce");
    check_in_place(tensor, getRank() == options.rootRank, "reduce");
    Call call = make_call(Op::kReduce, tensor, tensor.numel(), static_cast<int>(options.rootRank));
    const Reduction reduction = make_reduction(call, tensor, options.reduceOp, getSize());
    StagedTensor data(tensor);
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::REDUCE, options.asyncOp, tensor, tensors, [=, this]() mutable {
      data.load();
      on(tensor).reduce(call, data.data(), data.nbytes(), reduction, timeout);
      if (getRank() == call.root) data.store();
    });
  });
}

Backend::Job Backend::reduce_scatter_from(const at::Tensor& out, const at::Tensor& in,
                                          const c10d::ReduceOp& op, Milliseconds timeout) {
  check_tensor(in, "reduce_scatter: input");
  check_same_dtype(out, in, "reduce_scatter: output");
  check_writable(out, "reduce_scatter: output");
  check_numel(in, out.numel() * getSize(), "reduce_scatter: input");
  Call call = make_call(Op::kReduceScatter, in, in.numel());
  const Reduction reduction = make_reduction(call, in, op, getSize());
  StagedTensor source(in), result(out);
  const auto parts = cut(source.memory(), getSize(), {}, "reduce_scatter: input");
  if (result.data() != parts[getRank()].data) result.keep_apart(source);
  return [=, this]() mutable {
    source.load();
    on(in).reduce_scatter(call, parts, result.data(), reduction, timeout);
    result.store();
  };
}

Backend::WorkPtr Backend::_reduce_scatter_base(at::Tensor& out, at::Tensor& in,
                                               const c10d::ReduceScatterOptions& options) {
  return translated([&] {
    return run(OpType::_REDUCE_SCATTER_BASE, options.asyncOp, in, {out},
               reduce_scatter_from(out, in, options.reduceOp, resolve(options.timeout)));
  });
}

Backend::WorkPtr Backend::reduce_scatter_tensor_coalesced(
    Tensors& out, Tensors& in, const c10d::ReduceScatterOptions& options) {
  return translated([&] {
    check_list(out.size(), static_cast<int>(in.size()), "reduce_scatter: outputs");
    const at::Tensor like = on_one_device(in, "reduce_scatter: input");
    std::vector<Job> jobs;
    for (size_t i = 0; i < in.size(); i++) {
      jobs.push_back(
          reduce_scatter_from(out[i], in[i], options.reduceOp, resolve(options.timeout)));
    }
    return run(OpType::COALESCED, options.asyncOp, like, out, [jobs] {
      for (const Job& job : jobs) job();
    });
  });
}

Backend::WorkPtr Backend::reduce_scatter(Tensors& out, TensorLists& in,
                                         const c10d::ReduceScatterOptions& options) {
  return translated([&] {
    const at::Tensor& target = only(out, "reduce_scatter");
    check_writable(target, "reduce_scatter: output");
    check_list(in.size(), 1, "reduce_scatter: input lists");
    check_list(in[0].size(), getSize(), "reduce_scatter: inputs");
    check_numel(in[0][getRank()], target.numel(), "reduce_scatter: this rank's input");
    StagedTensors sources = inputs_of(in[0], target, "reduce_scatter: input");
    Call call = make_call(Op::kReduceScatter, target, total_numel(in[0]));
    call.has_counts = true;
    const Reduction reduction = make_reduction(call, target, options.reduceOp, getSize());
    StagedTensor result(target);
    for (int r = 0; r < getSize(); r++) {
      result.keep_apart(sources[r], r == getRank() ? result.data() : nullptr);
    }
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::REDUCE_SCATTER, options.asyncOp, target, out, [=, this]() mutable {
      load_all(sources);
      on(target).reduce_scatter(call, parts_of(sources), result.data(), reduction, timeout);
      result.store();
    });
  });
}

// ---- broadcast, gather, scatter, all_to_all, barrier

Backend::WorkPtr Backend::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  return translated([&] {
    const at::Tensor& tensor = only(tensors, "broadcast");
    check_root(options.rootRank, getSize(), "broadcast");
    check_in_place(tensor, getRank() != options.rootRank, "broadcast");
    const int root = static_cast<int>(options.rootRank);
    const Call call = make_call(Op::kBroadcast, tensor, tensor.numel(), root);
    StagedTensor data(tensor);
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::BROADCAST, options.asyncOp, tensor, tensors, [=, this]() mutable {
      if (getRank() == root) data.load();
      on(tensor).broadcast(call, data.data(), data.nbytes(), timeout);
      if (getRank() != root) data.store();
    });
  });
}

Backend::WorkPtr Backend::gather(TensorLists& out, Tensors& in,
                                 const c10d::GatherOptions& options) {
  return translated([&] {
    const at::Tensor& tensor = only(in, "gather");
    check_tensor(tensor, "gather: input");
    check_root(options.rootRank, getSize(), "gather");
    const int root = static_cast<int>(options.rootRank);
    StagedTensor source(tensor);
    StagedTensors results;
    Tensors targets;
    if (getRank() == root) {
      check_list(out.size(), 1, "gather: output lists");
      check_list(out[0].size(), getSize(), "gather: outputs");
      for (const at::Tensor& target : out[0]) check_numel(target, tensor.numel(), "gather: output");
      results = outputs_of(out[0], tensor, {source}, "gather: output");
      targets = out[0];
    }
    const Call call = make_call(Op::kGather, tensor, tensor.numel(), root);
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::GATHER, options.asyncOp, tensor, targets, [=, this]() mutable {
      source.load();
      on(tensor).gather(call, source.data(), source.nbytes(), parts_of(results), timeout);
      store_all(results);
    });
  });
}

Backend::WorkPtr Backend::scatter(Tensors& out, TensorLists& in,
                                  const c10d::ScatterOptions& options) {
  return translated([&] {
    const at::Tensor& target = only(out, "scatter");
    check_writable(target, "scatter: output");
    check_root(options.rootRank, getSize(), "scatter");
    const int root = static_cast<int>(options.rootRank);
    StagedTensor result(target);
    StagedTensors sources;
    if (getRank() == root) {
      check_list(in.size(), 1, "scatter: input lists");
      check_list(in[0].size(), getSize(), "scatter: inputs");
      for (const at::Tensor& tensor : in[0]) check_numel(tensor, target.numel(), "scatter: input");
      sources = inputs_of(in[0], target, "scatter: input");
      for (const StagedTensor& source : sources) result.keep_apart(source);
    }
    const Call call = make_call(Op::kScatter, target, target.numel(), root);
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::SCATTER, options.asyncOp, target, out, [=, this]() mutable {
      load_all(sources);
      on(target).scatter(call, parts_of(sources), result.data(), result.nbytes(), timeout);
      result.store();
    });
  });
}

Backend::WorkPtr Backend::alltoall_base(at::Tensor& out, at::Tensor& in,
                                        std::vector<int64_t>& out_splits,
                                        std::vector<int64_t>& in_splits,
                                        const c10d::AllToAllOptions& options) {
  return translated([&] {
    check_tensor(in, "all_to_all: input");
    check_same_dtype(out, in, "all_to_all: output");
    check_writable(out, "all_to_all: output");
    StagedTensor source(in), result(out);
    result.keep_apart(source);
    const auto from = cut(source.memory(), getSize(), in_splits, "all_to_all: input");
    const auto to = cut(result.memory(), getSize(), out_splits, "all_to_all: output");
    Call call = make_call(Op::kAllToAll, in, in.numel());
    call.has_counts = true;  // one rank's splits may be even where another's are not
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::ALLTOALL_BASE, options.asyncOp, in, {out}, [=, this]() mutable {
      source.load();
      on(in).all_to_all(call, from, to, timeout);
      result.store();
    });
  });
}

Backend::WorkPtr Backend::alltoall(Tensors& out, Tensors& in,
                                   const c10d::AllToAllOptions& options) {
  return translated([&] {
    check_list(in.size(), getSize(), "all_to_all: inputs");
    check_list(out.size(), getSize(), "all_to_all: outputs");
    const at::Tensor& like = in[0];
    StagedTensors sources = inputs_of(in, like, "all_to_all: input");
    StagedTensors results = outputs_of(out, like, sources, "all_to_all: output");
    Call call = make_call(Op::kAllToAll, like, total_numel(in));
    call.has_counts = true;
    const Milliseconds timeout = resolve(options.timeout);
    return run(OpType::ALLTOALL, options.asyncOp, like, out, [=, this]() mutable {
      load_all(sources);
      on(like).all_to_all(call, parts_of(sources), parts_of(results), timeout);
      store_all(results);
    });
  });
}

// A device's part is launched here, where the order of the group's calls is; then the host waits.
Backend::WorkPtr Backend::barrier(const c10d::BarrierOptions& options) {
  const Milliseconds timeout = resolve(options.timeout);
  if (device_) translated([&] { launch([&] { device_->barrier(timeout); }); });
  return run(OpType::BARRIER, options.asyncOp, {}, {}, [=, this] {
    if (device_) device_->drain();
    transport_->barrier(timeout);
  });
}

}  // namespace primitives
