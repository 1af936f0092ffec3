// What a process group runs on: the shared memory of one host, or several hosts.
//
// The collectives are those of collectives.hpp; ranks are those of the whole group. `group()` is
// the part of it on this host: where failures are kept, and all there is on one host.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "collectives/collectives.hpp"
#include "collectives/fused.hpp"
#include "collectives/symmetric.hpp"
#include "transport/mailbox.hpp"

namespace primitives {

class Transport {
 public:
  virtual ~Transport() = default;

  virtual Group& group() = 0;
  virtual uint64_t seq() const = 0;
  // A rank that is known to have left or died.
  virtual bool has_gone(int rank) const = 0;
  virtual std::string describe_rank(int rank) const = 0;

  virtual void all_gather(const Call& call, const void* in, size_t in_nbytes,
                          const std::vector<Part>& out, Milliseconds timeout) = 0;
  virtual void reduce_scatter(const Call& call, const std::vector<Part>& in, void* out,
                              const Reduction& reduction, Milliseconds timeout) = 0;
  virtual void all_reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
                          Milliseconds timeout) = 0;
  virtual void all_to_all(const Call& call, const std::vector<Part>& in,
                          const std::vector<Part>& out, Milliseconds timeout) = 0;
  virtual void broadcast(const Call& call, void* data, size_t nbytes, Milliseconds timeout) = 0;
  virtual void reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
                      Milliseconds timeout) = 0;
  virtual void gather(const Call& call, const void* in, size_t in_nbytes,
                      const std::vector<Part>& out, Milliseconds timeout) = 0;
  virtual void scatter(const Call& call, const std::vector<Part>& in, void* out, size_t out_nbytes,
                       Milliseconds timeout) = 0;
  virtual void barrier(Milliseconds timeout) = 0;
  virtual void all_gather_many(const Call& call, const GatherMany& many, Milliseconds timeout) = 0;
  virtual void reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                                   Milliseconds timeout) = 0;
  // As symmetric::empty: peers on this host read and write it in place.
  virtual void* empty(const Call& call, size_t nbytes, Milliseconds timeout) = 0;

  // As Mailbox: the memory must live until `done`.
  virtual void send(const void* data, const Envelope& envelope, int dst, Milliseconds timeout,
                    Mailbox::Done done) = 0;
  virtual void recv(void* data, const Envelope& envelope, int src, Milliseconds timeout,
                    Mailbox::Done done) = 0;
  // All sends have left.
  virtual bool idle() = 0;
  // Ends messages that are under way with an error, then leaves the group. Idempotent.
  virtual void close() = 0;
};

// One whose collectives work on memory of a device, in the order of a stream.
class StreamTransport : public Transport {
 public:
  // Whether a call runs on the transport of the host, and so at a turn among that one's calls.
  virtual bool runs_on_host() const { return false; }
  // Throws when the group has failed, also by what ran on the stream.
  virtual void check() = 0;
  // Waits for all that was launched; then leaving is safe for the others.
  virtual void drain() = 0;
  // Memory of the device for work on the current stream, which peers read in place where they can.
  // It frees itself, and may outlive this. Throws TransportError when there is no room. No
  // collective; any thread.
  virtual std::shared_ptr<void> allocate(size_t nbytes) = 0;
  // Calls that went without staging.
  virtual uint64_t num_zero_copy() { return 0; }

  // Not for a device: std::invalid_argument.
  void* empty(const Call&, size_t, Milliseconds) final { refuse("empty"); }
  void send(const void*, const Envelope&, int, Milliseconds, Mailbox::Done) final {
    refuse("send");
  }
  void recv(void*, const Envelope&, int, Milliseconds, Mailbox::Done) final { refuse("recv"); }
  bool idle() final { return true; }

 private:
  [[noreturn]] static void refuse(const char* what) {
    throw std::invalid_argument(std::string(what) +
                                ": expected memory of the CPU, got of a device");
  }
};

class OneHost final : public Transport {
 public:
  OneHost(Meeting& meeting, GroupOptions options) : group_(meeting, std::move(options)) {}

  Group& group() override { return group_; }
  uint64_t seq() const override { return group_.seq(); }
  bool has_gone(int rank) const override { return group_.has_gone(rank); }
  std::string describe_rank(int rank) const override { return group_.describe_rank(rank); }

  void all_gather(const Call& call, const void* in, size_t in_nbytes, const std::vector<Part>& out,
                  Milliseconds timeout) override {
    primitives::all_gather(group_, call, in, in_nbytes, out, timeout);
  }
  void reduce_scatter(const Call& call, const std::vector<Part>& in, void* out,
                      const Reduction& reduction, Milliseconds timeout) override {
    primitives::reduce_scatter(group_, call, in, out, reduction, timeout);
  }
  void all_reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
                  Milliseconds timeout) override {
    primitives::all_reduce(group_, call, data, nbytes, reduction, timeout);
  }
  void all_to_all(const Call& call, const std::vector<Part>& in, const std::vector<Part>& out,
                  Milliseconds timeout) override {
    primitives::all_to_all(group_, call, in, out, timeout);
  }
  void broadcast(const Call& call, void* data, size_t nbytes, Milliseconds timeout) override {
    primitives::broadcast(group_, call, data, nbytes, timeout);
  }
  void reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
              Milliseconds timeout) override {
    primitives::reduce(group_, call, data, nbytes, reduction, timeout);
  }
  void gather(const Call& call, const void* in, size_t in_nbytes, const std::vector<Part>& out,
              Milliseconds timeout) override {
    primitives::gather(group_, call, in, in_nbytes, out, timeout);
  }
  void scatter(const Call& call, const std::vector<Part>& in, void* out, size_t out_nbytes,
               Milliseconds timeout) override {
    primitives::scatter(group_, call, in, out, out_nbytes, timeout);
  }
  void barrier(Milliseconds timeout) override { primitives::barrier(group_, timeout); }
  void all_gather_many(const Call& call, const GatherMany& many, Milliseconds timeout) override {
    primitives::all_gather_many(group_, call, many, timeout);
  }
  void reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                           Milliseconds timeout) override {
    primitives::reduce_scatter_many(group_, call, many, timeout);
  }
  void* empty(const Call& call, size_t nbytes, Milliseconds timeout) override {
    return symmetric::empty(group_, call, nbytes, timeout);
  }

  void send(const void* data, const Envelope& envelope, int dst, Milliseconds timeout,
            Mailbox::Done done) override {
    mailbox_.send(data, envelope, dst, timeout, std::move(done));
  }
  void recv(void* data, const Envelope& envelope, int src, Milliseconds timeout,
            Mailbox::Done done) override {
    mailbox_.recv(data, envelope, src, timeout, std::move(done));
  }
  bool idle() override { return mailbox_.idle(); }
  void close() override {
    mailbox_.stop();
    group_.close();
  }

 private:
  Group group_;
  Mailbox mailbox_{group_};
};

}  // namespace primitives
