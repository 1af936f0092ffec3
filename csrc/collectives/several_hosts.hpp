// One process group over several hosts: shared memory inside each, a Wire between them.
//
// [Note: two levels] Every collective begins with an agreement: all ranks learn the calls of all,
// so a difference is CollectiveMismatch everywhere before any data moves. Then bytes go through
// shared memory inside a host and once over the wire to each other host: between the leaders (the
// first rank of each host) where all ranks get the same bytes, straight from rank to rank where
// not.
//
// Reductions keep the tree over all ranks (reduce.hpp). A host sums the largest subtrees that lie
// in it whole; these partial sums cross the wire, and the owner of a slice goes on with the upper
// tree. Where a partial sum has no bits of its own (float16 and bfloat16 are summed in float32 and
// rounded once) the inputs themselves cross. So the bits are those of one host, however the ranks
// are spread.
//
// [Note: failure over hosts] A failed group fails on this host as it always does. The rank that
// found the reason writes it into the store, as does the watch thread of each rank, which then
// hangs up. A rank of another host whose wait on the wire so ends finds the reason in the store;
// without one, as when a process died, the peer is lost. A host that is merely silent is noticed by
// the deadline.
#pragma once

#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "collectives/transport.hpp"
#include "collectives/wire.hpp"
#include "transport/callbacks.hpp"

namespace primitives {

// Which rank is where.
struct Hosts {
  Hosts(int rank, const std::vector<std::string>& host_of_rank);

  bool is_local(int r) const { return of[r] == mine; }
  bool is_leader() const { return rank == members[mine][0]; }
  const std::vector<int>& local() const { return members[mine]; }
  int world_size() const { return static_cast<int>(of.size()); }
  // Position of a rank within its host.
  int position(int r) const;
  // The rank of `host` that speaks for it to rank `r`: r itself, or one in turn.
  int counterpart(int host, int r) const;
  // The largest subtrees of the tree over all ranks that lie in `host` whole, or with `leaves` its
  // ranks one by one, as ranges of ranks.
  std::vector<std::pair<int, int>> subtrees(int host, bool leaves) const;

  int rank;
  int mine = 0;                           // host of this rank
  std::vector<int> of;                    // host of each rank
  std::vector<std::string> names;         // of hosts
  std::vector<std::vector<int>> members;  // ranks of each host, ascending
};

class SeveralHosts final : public Transport {
 public:
  // `host_of_rank`: equal names for ranks that share memory. Collective over all ranks.
  SeveralHosts(std::unique_ptr<Meeting> meeting, GroupOptions options,
               const std::vector<std::string>& host_of_rank, std::unique_ptr<Wire> wire);
  ~SeveralHosts() override;

  Group& group() override { return *local_; }
  uint64_t seq() const override { return seq_; }
  bool has_gone(int rank) const override;
  std::string describe_rank(int rank) const override;

  void all_gather(const Call&, const void* in, size_t in_nbytes, const std::vector<Part>& out,
                  Milliseconds timeout) override;
  void reduce_scatter(const Call&, const std::vector<Part>& in, void* out, const Reduction&,
                      Milliseconds timeout) override;
  void all_reduce(const Call&, void* data, size_t nbytes, const Reduction&,
                  Milliseconds timeout) override;
  void all_to_all(const Call&, const std::vector<Part>& in, const std::vector<Part>& out,
                  Milliseconds timeout) override;
  void broadcast(const Call&, void* data, size_t nbytes, Milliseconds timeout) override;
  void reduce(const Call&, void* data, size_t nbytes, const Reduction&,
              Milliseconds timeout) override;
  void gather(const Call&, const void* in, size_t in_nbytes, const std::vector<Part>& out,
              Milliseconds timeout) override;
  void scatter(const Call&, const std::vector<Part>& in, void* out, size_t out_nbytes,
               Milliseconds timeout) override;
  void barrier(Milliseconds timeout) override;
  void all_gather_many(const Call&, const GatherMany&, Milliseconds timeout) override;
  void reduce_scatter_many(const Call&, const ReduceScatterMany&, Milliseconds timeout) override;
  void* empty(const Call&, size_t nbytes, Milliseconds timeout) override;

  void send(const void* data, const Envelope&, int dst, Milliseconds timeout,
            Mailbox::Done done) override;
  void recv(void* data, const Envelope&, int src, Milliseconds timeout,
            Mailbox::Done done) override;
  bool idle() override { return num_sending_ == 0; }
  void close() override;

 private:
  struct Announcement;  // what goes before every message
  struct Item {         // bytes of one host that all ranks get
    int host;
    Part part;
  };
  // Messages of one step; wait() ends them all.
  class Messages {
   public:
    explicit Messages(SeveralHosts& of) : of_(of) {}
    void send(const Part& part, int dst);
    void recv(const Part& part, int src);
    void wait();

   private:
    SeveralHosts& of_;
    std::vector<std::pair<int, Wire::PendingPtr>> pending_;  // with the peer
  };

  // Runs a collective; what it throws becomes known to all hosts.
  void run(const Call& call, const uint64_t* send_nbytes, const uint64_t* recv_nbytes,
           Milliseconds timeout, const std::function<void()>& body);
  void agree(const Call& call, const uint64_t* send_nbytes, const uint64_t* recv_nbytes,
             Milliseconds timeout);
  void compare(const char* records, size_t record_nbytes);
  // Items of this host are there on all its ranks; afterwards all items are.
  void spread(const std::vector<Item>& items);
  void gather_all(const void* in, size_t in_nbytes, const std::vector<Part>& out);
  // out = the tree over all ranks of their in[this rank].
  void reduce_parts(const std::vector<Part>& in, void* out, const Reduction& reduction);
  // Collective on this host: in[r] of every local rank, one after the other, for the rank `r` that
  // each local rank serves; empty for -1.
  std::vector<char> collect(const std::vector<Part>& in, const std::vector<int>& served);

  std::vector<Part> local_parts(const std::vector<Part>& parts) const;
  Call local_call(Op op, size_t nbytes) const;
  Milliseconds time_left() const;
  // The peer's message did not come: why, as an error of the group.
  [[noreturn]] void lost(int peer, Clock::time_point deadline, const std::string& what,
                         const std::string& why);
  // Fails the group on all hosts: the reason is in the store before anybody here can hang up.
  [[noreturn]] void fail(Failure failure, const std::string& what);
  void adopt(Failure failure, const std::string& what);
  void publish(Failure failure, const std::string& what);
  bool adopt_published();
  void watch();
  // Posts a message; an error is that of the group.
  template <class Post>
  std::shared_ptr<Wire::Pending> posted(int peer, const std::string& what, Post&& post) {
    try {
      return post();
    } catch (const WireError& error) {
      lost(peer, Clock::time_point::max(), what, error.what());
    }
  }

  const Hosts hosts_;
  const GroupOptions options_;
  std::unique_ptr<Meeting> meeting_;
  std::string round_;
  std::unique_ptr<Wire> wire_;
  std::unique_ptr<Group> local_;
  uint64_t seq_ = 0;
  Clock::time_point deadline_;
  std::atomic<uint32_t> num_messages_{0};
  std::atomic<int> num_sending_{0};
  std::shared_ptr<Callbacks> waiters_ = std::make_shared<Callbacks>();  // for messages
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopping_ = false;
  std::thread watch_;
};

}  // namespace primitives
