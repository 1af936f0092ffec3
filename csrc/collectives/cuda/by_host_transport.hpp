// The collectives on memory of CUDA devices whose ranks cannot map each other's: by way of the host
// and the transport that the group has there, over as many hosts as it spans.
//
// [Note: by way of the host] A call waits for the caller's stream, with the inputs copied to pinned
// memory; runs on the host; and copies the outputs back on that stream, for which it waits, too. So
// bits and failures are those of the CPU, and nothing runs on when a call has returned. What waits
// for the host cannot be captured into a graph: std::invalid_argument.
#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "collectives/cuda/stream_transport.hpp"

namespace primitives {

class ByHostTransport final : public StreamTransport {
 public:
  // `host` outlives this; `rank` and `world_size` are of its whole group.
  ByHostTransport(Transport& host, int rank, int world_size, int device, CurrentStream stream)
      : host_(host),
        rank_(rank),
        world_size_(world_size),
        device_(device),
        stream_(std::move(stream)) {}
  ~ByHostTransport() override { release(); }
  ByHostTransport(const ByHostTransport&) = delete;
  ByHostTransport& operator=(const ByHostTransport&) = delete;

  bool runs_on_host() const override { return true; }
  void check() override { host_.group().check(); }
  void drain() override {}
  // Nobody reads it in place.
  std::shared_ptr<void> allocate(size_t nbytes) override;

  Group& group() override { return host_.group(); }
  uint64_t seq() const override { return host_.seq(); }
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
  void barrier(Milliseconds timeout) override;
  void all_gather_many(const Call& call, const GatherMany& many, Milliseconds timeout) override;
  void reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                           Milliseconds timeout) override;

  void close() override {}  // a thread may still be in a call that ends with the group's failure

 private:
  using Parts = std::vector<Part>;

  // Runs body(ins, outs) on the host with copies of the device's `in`; then its outs are copied to
  // `out`. A part that is among both has one place on the host.
  void run(Op op, const Parts& in, const Parts& out,
           const std::function<void(const Parts&, const Parts&)>& body);
  // The current stream. Throws std::invalid_argument when it is captured.
  void* begin(Op op);
  void reserve(Op op, size_t nbytes);
  void release();
  // ... and waits for it.
  void copy(Op op, const Parts& to, const Parts& from, void* stream);
  void wait(Op op, void* stream);
  // The failure of the group: the others must not wait for this rank.
  [[noreturn]] void fail(Op op, const char* why);

  // Of a full tensor of a fused call.
  size_t full_nbytes(const Cuts& cuts, size_t tensor, size_t itemsize) const;

  Transport& host_;
  const int rank_, world_size_;
  const int device_;
  const CurrentStream stream_;
  void* pinned_ = nullptr;  // as large as the largest call so far
  size_t pinned_nbytes_ = 0;
};

}  // namespace primitives
