// A group of ranks that share one segment: who they are, one barrier, deadlines, and failure.
//
// [Note: staging] Each rank owns two staging slots and two call records, used by turns of the
// barrier epoch: what is written before barrier e goes to slot e & 1. It is read by the peers after
// barrier e and overwritten only after barrier e + 1, where every reader has arrived; so one
// barrier per chunk is enough and none trails.
//
// [Note: symmetric] A rank whose buffers lie in its symmetric heap says so in its call record. When
// the buffers of all ranks do, each reads or writes the peers' memory between the first barrier and
// a last one. When only some do, the call falls back to staging: the ranks that staged nothing
// before the first barrier (e) do it now, as if for barrier e + 2, which publishes the same slots.
//
// [Note: failure] The first rank that sees a failure writes it into the segment ("poison"); every
// other rank that waits finds it there and throws the same error. A failed group stays failed.
#pragma once

#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "transport/call.hpp"
#include "transport/caller.hpp"
#include "transport/control.hpp"
#include "transport/errors.hpp"
#include "transport/flight.hpp"
#include "transport/process.hpp"
#include "transport/segment.hpp"
#include "transport/staging_pace.hpp"
#include "transport/symmetric.hpp"

namespace primitives {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

// Where the ranks meet before they share memory: a c10d Store in practice.
class Meeting {
 public:
  virtual ~Meeting() = default;
  virtual void set(const std::string& key, const std::string& value) = 0;
  virtual std::string get(const std::string& key) = 0;
  virtual bool has(const std::string& key) = 0;
  virtual int64_t add(const std::string& key, int64_t value) = 0;
};

struct GroupOptions {
  int rank;
  int world_size;
  std::string name;    // for messages
  std::string folder;  // of the shared memory
  Milliseconds timeout;
  std::vector<int> members = {};  // global ranks by rank of this group; empty: 0, 1, ...
  bool zero_copy = true;          // false: symmetric memory is staged like any other
  std::vector<int> numbers = {};  // of the ranks, in errors; empty: 0, 1, ...
};

// Where a rank stands, as far as the others can see.
struct Standing {
  int32_t pid;
  const char* state;  // running, stopped, left, dead
  uint64_t seq;       // its last call; 0: none yet
  Op op;
  bool inside;  // that has not returned
  std::string site;
  std::string waiting;  // what blocks it elsewhere, or ""
};

class Group {
 public:
  // Collective over all ranks of the group. Throws TransportError.
  Group(Meeting& meeting, GroupOptions options);
  ~Group();
  Group(const Group&) = delete;
  Group& operator=(const Group&) = delete;

  int rank() const { return options_.rank; }
  int world_size() const { return options_.world_size; }
  const std::string& name() const { return options_.name; }
  const std::vector<int>& members() const { return options_.members; }
  // "rank 3": one rank as errors name it.
  std::string named(int r) const {
    return "rank " + std::to_string(options_.numbers.empty() ? r : options_.numbers[r]);
  }
  uint64_t seq() const { return line(rank()).seq.load(std::memory_order_relaxed); }

  // --- one collective: start, write the first chunk to slot(rank, epoch() + 1), meet, then
  // barriers. The counts are bytes to each rank and from each rank, or null when all parts are
  // equal.
  void start(const Call& call, const uint64_t* send_nbytes, const uint64_t* recv_nbytes,
             Milliseconds timeout);
  // The first barrier: afterwards every rank is known to have made the same call.
  void meet();
  void barrier();
  void finish();

  // A message, for the flight recorder: its number there.
  uint64_t record_message(Op op, int peer, int tag, const char* dtype, uint64_t numel,
                          const Site* site) const;
  // --- the same for buffers in symmetric memory, see [Note: symmetric]: start and first barrier.
  // Afterwards offer(rank) is what each rank offered; either all go on without staging, or all
  // ranks that offered decline, and make the call again by start and meet.
  void start_symmetric(const Call& call, const Offer& mine, const uint64_t* send_nbytes,
                       const uint64_t* recv_nbytes, Milliseconds timeout);
  const Offer& offer(int rank) const { return record(rank, call_epoch_).offer; }
  void decline();
  // The last barrier: every rank has read and written what it must, buffers may change again.
  void finish_symmetric();
  // Calls that went without staging.
  uint64_t num_zero_copy() const { return num_zero_copy_.load(std::memory_order_relaxed); }
  // This rank's heap and its peers', made on first use. Any thread.
  std::shared_ptr<SymmetricHeap> heap();
  // ... or null while this rank has none, or may not go without staging.
  SymmetricHeap* zero_copy_heap() const {
    return zero_copy() ? heap_made_.load(std::memory_order_acquire) : nullptr;
  }
  bool zero_copy() const { return options_.zero_copy && !checked_; }
  DeviceBoard& board(int rank) const {
    return *reinterpret_cast<DeviceBoard*>(segment_->data() + layout_.board(rank));
  }

  uint32_t epoch() const { return epoch_; }
  char* slot(int rank, uint32_t epoch) const {
    return segment_->data() + layout_.stage(rank) + (epoch & 1) * kSlotNbytes;
  }
  StagingPace& staging_pace() { return staging_pace_; }
  // Payload digests are exchanged: some rank runs with PRIMITIVES_CHECK=1.
  bool checked() const { return checked_; }
  Digest& digest(int rank, uint32_t epoch, int reader) const {
    return *reinterpret_cast<Digest*>(segment_->data() + layout_.digest(rank, epoch & 1, reader));
  }
  // Bytes that `rank` sends to `to` in the call that has just met (has_counts only).
  uint64_t sent_nbytes(int rank, int to) const;

  // --- failure
  // Makes `what` the failure of the whole group unless it has one, and throws the one it has.
  [[noreturn]] void fail(Failure failure, const std::string& what);
  // Throws when the group has failed, was aborted, or belongs to another process (a fork).
  void check();
  // Another rank that left or died.
  bool has_gone(int rank) const;
  bool has_died(int rank) const;
  // Makes `what` the failure of the whole group unless it has one; wakes everybody.
  void poison(Failure failure, const std::string& what);
  // Throws when `gone`, the first of `missing` that can never arrive (-1: none), is a rank, or the
  // deadline has passed.
  void check_missing(const std::vector<int>& missing, int gone, Clock::time_point deadline,
                     const std::string& waiting_for);
  // In a child of the process that made the group, which cannot use it.
  bool forked() const;
  // Any thread: blocked waits of this and all other ranks end with an error.
  void abort(const std::string& why);
  // This rank leaves; peers that wait for it get PeerLost at once. Idempotent.
  void close();
  bool failed() const;
  Failure failure() const;
  std::string failure_text() const;

  RankLine& line(int rank) const { return control().line(rank); }
  Control& control() const { return *reinterpret_cast<Control*>(segment_->data()); }
  Segment& segment() { return *segment_; }
  const Layout& layout() const { return layout_; }
  bool shares_memory_with(const Group& other) const {
    return segment_->name() == other.segment_->name();
  }
  Standing standing(int rank) const;
  // "rank 2 (pid 71), last seen inside collective 17, all_reduce at train.py:12 in step"
  std::string describe_rank(int rank) const;
  // "rank 0 of group 'world' in all_reduce, collective 17 at train.py:12 in step"
  std::string here() const;

 private:
  void attach(Meeting& meeting);
  void enter();
  void wait_generation(uint32_t epoch);
  void spread_over_cores();
  static constexpr Milliseconds kMinSpreadPause{1};
  void end_on_signal();
  // The first barrier of any call, and what is known afterwards.
  void meet_first();
  void compare_calls();
  CallRecord& record(int rank, uint32_t epoch) const {
    return *reinterpret_cast<CallRecord*>(segment_->data() + layout_.record(rank, epoch & 1));
  }
  bool has_left(int rank) const;
  [[noreturn]] void throw_poison();
  std::string describe_others(const std::vector<int>& told) const;

  GroupOptions options_;
  Layout layout_;
  std::shared_ptr<Segment> segment_;
  std::mutex heap_mutex_;
  std::shared_ptr<SymmetricHeap> heap_;
  std::atomic<SymmetricHeap*> heap_made_{nullptr};
  std::vector<bool> watched_;  // whose process this process can see
  ProcessId self_;
  uint32_t num_forks_ = num_forks();
  uint32_t epoch_ = 0;
  uint32_t call_epoch_ = 0;
  std::atomic<uint64_t> num_zero_copy_{0};
  StagingPace staging_pace_;
  bool declined_ = false;  // the call has met, and is being made again by staging
  bool oversubscribed_ = false;
  Clock::time_point next_spread_{};
  Milliseconds spread_pause_ = kMinSpreadPause;
  bool attached_ = false;
  bool checked_ = false;
  FlightRecord record_;                // of the running call
  std::atomic<uint64_t> flight_{0};    // its number in the flight recorder
  std::atomic<bool> has_told_{false};  // of the failure, in a dump
  Clock::time_point deadline_;
  std::atomic<bool> closed_{false};
};

}  // namespace primitives
