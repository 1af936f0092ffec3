// The c10d backend "primitives": turns c10d calls into the collectives of csrc/collectives.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <vector>

#include "bindings/c10d_errors.hpp"
#include "bindings/c10d_tensors.hpp"
#include "bindings/c10d_work.hpp"
#include "collectives/transport.hpp"

namespace primitives {

class Backend : public c10d::Backend {
 public:
  using Tensors = std::vector<at::Tensor>;
  using TensorLists = std::vector<std::vector<at::Tensor>>;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  struct Options : c10d::Backend::Options {
    explicit Options(Milliseconds timeout = kBackendDefaultTimeout)
        : c10d::Backend::Options("primitives", timeout) {}
    std::string shm_dir = "/dev/shm";
  };

  // Collective over the ranks of the group. `wire`: connects all of them when they run on several
  // hosts, those of `host_of_rank`; else null.
  Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
          c10::intrusive_ptr<Options> options, const std::vector<std::string>& host_of_rank,
          const c10::intrusive_ptr<c10d::Backend>& wire);
  ~Backend() override;

  WorkPtr broadcast(Tensors&, const c10d::BroadcastOptions&) override;
  WorkPtr allreduce(Tensors&, const c10d::AllreduceOptions&) override;
  WorkPtr allreduce_sparse(Tensors&, const c10d::AllreduceOptions&) override;
  WorkPtr allreduce_coalesced(Tensors&, const c10d::AllreduceCoalescedOptions&) override;
  WorkPtr reduce(Tensors&, const c10d::ReduceOptions&) override;
  WorkPtr allgather(TensorLists&, Tensors&, const c10d::AllgatherOptions&) override;
  WorkPtr _allgather_base(at::Tensor&, at::Tensor&, const c10d::AllgatherOptions&) override;
  WorkPtr allgather_coalesced(TensorLists&, Tensors&, const c10d::AllgatherOptions&) override;
  WorkPtr allgather_into_tensor_coalesced(Tensors&, Tensors&,
                                          const c10d::AllgatherOptions&) override;
  WorkPtr gather(TensorLists&, Tensors&, const c10d::GatherOptions&) override;
  WorkPtr scatter(Tensors&, TensorLists&, const c10d::ScatterOptions&) override;
  WorkPtr reduce_scatter(Tensors&, TensorLists&, const c10d::ReduceScatterOptions&) override;
  WorkPtr _reduce_scatter_base(at::Tensor&, at::Tensor&,
                               const c10d::ReduceScatterOptions&) override;
  WorkPtr reduce_scatter_tensor_coalesced(Tensors&, Tensors&,
                                          const c10d::ReduceScatterOptions&) override;
  WorkPtr alltoall_base(at::Tensor&, at::Tensor&, std::vector<int64_t>&, std::vector<int64_t>&,
                        const c10d::AllToAllOptions&) override;
  WorkPtr alltoall(Tensors&, Tensors&, const c10d::AllToAllOptions&) override;
  WorkPtr barrier(const c10d::BarrierOptions&) override;
  void monitoredBarrier(const c10d::BarrierOptions&, bool wait_all_ranks) override;

  // Fused, see collectives/fused.hpp. `numels` [tensors * world_size]: how each full tensor is cut
  // over the ranks; empty: along dimension 0, as torch.chunk does.
  WorkPtr all_gather_many(Tensors shards, Tensors fulls, std::vector<int64_t> numels, bool async);
  WorkPtr reduce_scatter_many(Tensors fulls, Tensors shards, std::vector<int64_t> numels,
                              double factor, bool accumulate,
                              const std::optional<at::Tensor>& squares, bool async);
  // A tensor in symmetric memory; a collective of the same size on all ranks.
  at::Tensor empty(at::IntArrayRef shape, at::ScalarType dtype, at::Device device);
  // ... of this rank alone: tensors of different ranks need not match. On a device, ordinary memory
  // until the group has met there.
  at::Tensor allocateTensor(long numel, at::TensorOptions options) override;
  std::shared_ptr<SymmetricHeap> heap() { return group_->heap(); }
  // Throws when the group has failed.
  void check() {
    translated([&] { device_ ? device_->check() : group_->check(); });
  }
  uint64_t num_zero_copy() const {
    return group_->num_zero_copy() + (device_ ? device_->num_zero_copy() : 0);
  }
  bool supportsTensorAlloc(c10::DeviceIndex) override { return true; }

  WorkPtr send(Tensors&, int dst, int tag) override;
  WorkPtr recv(Tensors&, int src, int tag) override;
  WorkPtr recvAnysource(Tensors&, int tag) override;

  const std::string getBackendName() const override { return "primitives"; }
  c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override { return options_; }
  bool supportsSplitting() const override { return true; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;
  c10::intrusive_ptr<c10d::Backend> split(
      const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
      const c10::intrusive_ptr<c10d::Backend::Options>& options) override;
  c10::intrusive_ptr<c10d::Backend> merge(const c10::intrusive_ptr<c10d::Store>& store,
                                          const c10::intrusive_ptr<c10d::Backend::Options>& options,
                                          const int& rank, const int& world_size) override;
  void setTimeout(Milliseconds timeout) override { options_->timeout = timeout; }
  void setSequenceNumberForGroup() override {}  // the transport counts for itself
  uint64_t getSequenceNumberForGroup() override { return transport_->seq(); }
  c10d::ErrorType getError() override;
  void abort() override;
  void shutdown() override { close(Milliseconds(30000)); }

  // Ends this rank's part in the group: waits up to `limit` for what is queued. Peers that still
  // wait for this rank then get PeerLost. Idempotent.
  void close(Milliseconds limit);

 private:
  // What a collective does with its tensors, ready to run on any thread.
  using Job = WorkQueue::Job;

  // Runs it where the memory of `like` is; undefined: on the CPU.
  WorkPtr run(c10d::OpType type, bool async, const at::Tensor& like, Tensors outputs, Job job);
  WorkPtr run_on_stream(c10d::OpType type, at::Device device, Tensors outputs, const Job& job);
  // Makes the transport for a device when its first tensor comes.
  void meet_on(at::Device device);
  at::Tensor empty_on(at::Device device, const Call& call, at::IntArrayRef shape,
                      at::ScalarType dtype);
  // Runs what is for the device, from the thread of the call.
  void launch(const Job& job);
  // The transport for the memory of a tensor.
  Transport& on(const at::Tensor& tensor);
  WorkPtr receive(Tensors& tensors, int src, int tag);
  Milliseconds resolve(Milliseconds timeout) const;
  Job all_gather_into(const at::Tensor& out, const at::Tensor& in, Milliseconds timeout);
  Job all_gather_list(const Tensors& out, const at::Tensor& in, Milliseconds timeout);
  Job reduce_scatter_from(const at::Tensor& out, const at::Tensor& in, const c10d::ReduceOp& op,
                          Milliseconds timeout);
  Job all_reduce_sparse(const at::Tensor& tensor, const c10d::ReduceOp& op, Milliseconds timeout);
  std::string find_missing(const std::string& round, Milliseconds timeout,
                           Clock::time_point deadline, bool wait_all_ranks);
  Job all_reduce_one(const at::Tensor& tensor, const c10d::ReduceOp& op, Milliseconds timeout);

  static c10::intrusive_ptr<c10d::Backend> create(const c10::intrusive_ptr<c10d::Store>& store,
                                                  int rank, int world_size,
                                                  const c10::intrusive_ptr<Options>& options);
  c10::intrusive_ptr<c10d::Backend> made_for(
      const c10::intrusive_ptr<c10d::Store>& store,
      const std::function<c10::intrusive_ptr<c10d::Backend>()>& make);
  // The options of a group made from this one.
  c10::intrusive_ptr<Options> options_of(const c10d::Backend::Options& options) const;

  c10::intrusive_ptr<c10d::Store> store_;
  c10::intrusive_ptr<Options> options_;
  uint64_t num_monitored_ = 0;  // monitored barriers so far
  std::unique_ptr<Transport> transport_;
  std::unique_ptr<StreamTransport> device_;  // after the first call on a CUDA tensor
  at::DeviceIndex device_index_ = -1;
  Group* group_ = nullptr;  // the part of the transport on this host
  std::shared_ptr<Callbacks> callbacks_ = std::make_shared<Callbacks>();
  std::unique_ptr<WorkQueue> queue_ = std::make_unique<WorkQueue>();
  std::mutex close_mutex_;
  // By split() or merge().
  std::optional<std::pair<c10::intrusive_ptr<c10d::Store>, c10::weak_intrusive_ptr<c10d::Backend>>>
      last_made_;
  bool coalescing_ = false;
  std::vector<WorkPtr> coalesced_;
};

// The heap of the oldest group of this process, as a rule the world. Throws when there is no group.
std::shared_ptr<SymmetricHeap> heap_of_world();

// Closes every backend of this process (at interpreter exit).
void close_all_backends(Milliseconds limit);

}  // namespace primitives
