// The collectives on memory of CUDA devices, for the ranks of one host: launched on a stream, with
// nothing that waits for the device. What the kernels need lies in a segment of each rank.
//
// [Note: device segments] The first collective on a device is a meeting: every rank allocates a
// segment, tells the others its handle ([Note: two ways to share]) through the group of the host,
// and maps theirs. It ends alike on all ranks; where one of them cannot map another's segment, with
// Unreachable. A rank that leaves waits for its own kernels first, and frees its segment only when
// all others have left, too.
//
// [Note: device watch] A thread looks now and then. What a kernel of this rank reports becomes the
// failure of the whole group, also of its ranks that wait on the host; and when the group has
// failed, or a rank is gone, waiting kernels of this rank are told to give up.
#pragma once

#include <array>
#include <condition_variable>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "collectives/cuda/by_host_transport.hpp"
#include "collectives/cuda/device_heap.hpp"
#include "collectives/cuda/launch.h"
#include "collectives/cuda/tables.hpp"
#include "collectives/transport.hpp"

namespace primitives {

// The number, in a call of the device, of a dtype that is only moved: others have other ones,
// mostly.
uint8_t moved_dtype(const char* name);
// What a call of the device has from a call of the host.
primitives_cuda_call begin_call(const Call& call);

// The devices of a group do not reach each other's memory: why, the same on all its ranks. The
// group is as it was before.
class Unreachable : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

class DeviceTransport final : public StreamTransport {
 public:
  // Collective over the ranks of `host`, which outlives this. Throws TransportError, Unreachable.
  DeviceTransport(Transport& host, int device, CurrentStream stream, Milliseconds timeout);
  ~DeviceTransport() override { close(); }
  DeviceTransport(const DeviceTransport&) = delete;
  DeviceTransport& operator=(const DeviceTransport&) = delete;

  void check() override;
  // (Not for what a replayed graph launches: barrier() first, on the same stream.)
  void drain() override;
  // See [Note: device heap].
  std::shared_ptr<void> allocate(size_t nbytes) override {
    return heap_->allocate(nbytes, stream_());
  }
  uint64_t num_zero_copy() override;

  Group& group() override { return host_.group(); }
  uint64_t seq() const override { return seq_; }
  bool has_gone(int rank) const override { return host_.has_gone(rank); }
  std::string describe_rank(int rank) const override { return host_.describe_rank(rank); }

  void all_gather(const Call& call, const void* in, size_t in_nbytes, const std::vector<Part>& out,
                  Milliseconds timeout) override;
  void reduce_scatter(const Call& call, const std::vector<Part>& in, void* out,
                      const Reduction& reduction, Milliseconds timeout) override;
  void all_reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
                  Milliseconds timeout) override;
  void all_to_all(const Call& call, const std::vector<Part>& in, const std::vector<Part>& out,
                  Milliseconds timeout) override;
  void broadcast(const Call& call, void* data, size_t nbytes, Milliseconds timeout) override;
  void reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
              Milliseconds timeout) override;
  void gather(const Call& call, const void* in, size_t in_nbytes, const std::vector<Part>& out,
              Milliseconds timeout) override;
  void scatter(const Call& call, const std::vector<Part>& in, void* out, size_t out_nbytes,
               Milliseconds timeout) override;
  // On the stream, like all others: the host does not wait.
  void barrier(Milliseconds timeout) override;

  void all_gather_many(const Call& call, const GatherMany& many, Milliseconds timeout) override;
  void reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                           Milliseconds timeout) override;

  // After drain(), and when `host` has left. Idempotent.
  void close() override;

 private:
  using DeviceCall = primitives_cuda_call;
  struct Launched {
    Call call;
    const Site* site = nullptr;
  };

  void meet(Milliseconds timeout);
  void unmap();
  void launch(const Call& call, DeviceCall& device_call, Milliseconds timeout);
  // The place of its input in symmetric memory, if peers may read it there.
  uint64_t offer(const DeviceCall& call);
  void launch_many(const Call& call, DeviceCall& device_call, const Cuts& cuts,
                   const std::vector<const void*>& ins, const std::vector<void*>& outs,
                   Milliseconds timeout);
  // The place of a fused call, whose next seq it will be: 0, with the place of each tensor written,
  // when peers may read all of them.
  uint64_t write_places(const Call& call, const DeviceCall& made, const Cuts& cuts,
                        const std::vector<const void*>& ins, uint64_t* places);
  [[noreturn]] void cannot_launch(const Call& call, const char* why);
  void watch();
  [[noreturn]] void report();
  std::string describe_failure(Failure* failure) const;
  std::string describe_missing(uint32_t missing) const;
  // "all_reduce(sum, float32, numel 8) at train.py:12": one of the last calls.
  std::string describe_call(uint32_t seq) const;

  Transport& host_;
  const int device_;
  const CurrentStream stream_;
  uint64_t seq_ = 0;
  void* last_ = nullptr;  // an event behind the last call
  mutable std::mutex launched_mutex_;
  std::array<Launched, 64> launched_;  // the last calls
  primitives_cuda_ranks ranks_{};
  Tables tables_;             // of fused calls
  std::vector<bool> mapped_;  // segments of other processes
  std::shared_ptr<DeviceHeap> heap_;
  bool has_met_ = false;  // peers may use this rank's segment
  std::mutex mutex_;
  std::condition_variable changed_;
  bool closing_ = false;
  std::thread watch_;
};

}  // namespace primitives
