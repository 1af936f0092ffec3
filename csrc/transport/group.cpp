#include "transport/group.hpp"

#include <sched.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <optional>
#include <utility>

#include "transport/futex.hpp"
#include "transport/registry.hpp"

namespace primitives {
namespace {

constexpr uint32_t kSpreadEvery = 32;  // barriers between looks at where the ranks run
constexpr Milliseconds kMaxSpreadPause{1000};

}  // namespace

void Group::start(const Call& call, const uint64_t* send_nbytes, const uint64_t* recv_nbytes,
                  Milliseconds timeout) {
  check();
  if (declined_) return;
  const auto now = Clock::now();
  deadline_ = now + (timeout.count() > 0 ? timeout : options_.timeout);
  RankLine& mine = line(rank());
  const uint64_t seq = mine.seq.load(std::memory_order_relaxed) + 1;
  mine.op.store(static_cast<uint32_t>(call.op), std::memory_order_relaxed);
  mine.inside.store(1, std::memory_order_relaxed);
  const Site* site = this_site();
  if (site != record_.site) site != nullptr ? mine.site.write(site->text) : mine.site.clear();
  record_.site = site;
  mine.seq.store(seq, std::memory_order_release);
  CallRecord& record = this->record(rank(), epoch_ + 1);
  record.seq = seq;
  record.call = call;
  record.call.has_counts = send_nbytes != nullptr;
  record.offer = Offer{};
  if (send_nbytes != nullptr) {
    std::copy_n(send_nbytes, world_size(), record.counts());
    std::copy_n(recv_nbytes, world_size(), record.counts() + world_size());
  }
  record_.seq = seq;
  record_.call = call;
  record_.start_ns = now.time_since_epoch().count();
  flight_.store(Flight::of_process().begin(record_), std::memory_order_relaxed);
}

void Group::meet() {
  if (declined_) {  // it has met
    declined_ = false;
    return barrier();
  }
  meet_first();
  bool offered = false;
  for (int r = 0; r < world_size(); r++) offered |= offer(r).any();
  if (!offered) return;
  barrier();  // see [Note: symmetric]
  barrier();
}

void Group::meet_first() {
  barrier();
  call_epoch_ = epoch_;
  compare_calls();
}

void Group::finish() {
  line(rank()).inside.store(0, std::memory_order_relaxed);
  Flight::of_process().end(flight_.load(std::memory_order_relaxed), FlightState::kDone);
}

uint64_t Group::record_message(Op op, int peer, int tag, const char* dtype, uint64_t numel,
                               const Site* site) const {
  FlightRecord record;
  std::memcpy(record.group, record_.group, sizeof record.group);
  record.rank = rank();
  record.peer = peer;
  record.tag = tag;
  record.state = FlightState::kQueued;
  record.call.op = op;
  std::snprintf(record.call.dtype, sizeof record.call.dtype, "%s", dtype);
  record.call.numel = numel;
  record.site = site;
  record.start_ns = Clock::now().time_since_epoch().count();
  return Flight::of_process().begin(record);
}

uint64_t Group::sent_nbytes(int rank, int to) const {
  return record(rank, call_epoch_).counts()[to];
}

// Every rank compares everything, so every rank throws the same error.
void Group::compare_calls() {
  const int n = world_size();
  const auto side = [this](int r) {
    CallRecord& of = record(r, epoch_);
    return Side{&of.call, of.counts()};
  };
  if (sides_agree(n, side)) return;
  std::vector<Side> sides;
  std::vector<std::string> sites;
  for (int r = 0; r < n; r++) {
    sides.push_back(side(r));
    sites.push_back(line(r).site.read());
  }
  fail(Failure::kMismatch, describe_sides(record(0, epoch_).seq, name(), sides, sites));
}

void Group::barrier() {
  const uint32_t epoch = ++epoch_;
  if (world_size() == 1) return;
  Control& c = control();
  if (oversubscribed_) {
    line(rank()).cpu.store(sched_getcpu(), std::memory_order_relaxed);
    if (epoch % kSpreadEvery == 0) spread_over_cores();
  }
  line(rank()).epoch.store(epoch, std::memory_order_release);
  const uint32_t num_arrived = c.num_arrived.fetch_add(1, std::memory_order_acq_rel) + 1;
  if (num_arrived == epoch * static_cast<uint32_t>(world_size())) {
    c.generation.store(epoch, std::memory_order_seq_cst);
    if (c.num_sleepers.load(std::memory_order_seq_cst) != 0) futex_wake_all(&c.generation);
    return;
  }
  wait_generation(epoch);
}

// Ranks that share cores: three on one core and one on the other take twice the time of two and
// two, and the scheduler, which sees cores that are all busy, leaves them so for long. The last
// rank of a crowded core goes to the emptiest one. It is not pinned there, and each time it is
// moved back soon it waits longer before it tries again. Only when no others want the cores: one
// that they keep busy is empty of ranks for a reason, and who moves there may wait for seconds.
void Group::spread_over_cores() {
  const auto now = Clock::now();
  if (now < next_spread_) return;
  std::array<int, CPU_SETSIZE> num_ranks{};
  const int here = line(rank()).cpu.load(std::memory_order_relaxed);
  for (int r = 0; r < world_size(); r++) {
    const int cpu = line(r).cpu.load(std::memory_order_relaxed);
    if (cpu < 0 || cpu >= CPU_SETSIZE || (cpu == here && r > rank())) return;
    num_ranks[cpu]++;
  }
  cpu_set_t allowed, target;
  if (num_ranks[here] < 2 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  int emptiest = here;
  for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
    if (CPU_ISSET(cpu, &allowed) && num_ranks[cpu] < num_ranks[emptiest]) emptiest = cpu;
  }
  if (num_ranks[here] - num_ranks[emptiest] < 2) return;
  const bool soon = now < next_spread_ + 4 * spread_pause_;
  spread_pause_ = soon ? std::min(2 * spread_pause_, kMaxSpreadPause) : kMinSpreadPause;
  next_spread_ = now + spread_pause_;
  if (num_runnable() > world_size()) return;
  CPU_ZERO(&target);
  CPU_SET(emptiest, &target);
  if (sched_setaffinity(0, sizeof target, &target) != 0) return;
  sched_setaffinity(0, sizeof allowed, &allowed);
  line(rank()).cpu.store(emptiest, std::memory_order_relaxed);
}

// Group-aware waiting: hand the core over only to a rank that has not arrived and was last seen on
// this very core; otherwise keep the core awake for a while, because waking it costs more than the
// wait. A yield that meets nobody is repeated: the scheduler lets the other rank run as soon as
// this one has had as much of the core. To sleep instead would keep what this rank is owed, and
// with it every later yield would meet nobody, too (ranks of one session forgo that by a yield;
// torchrun's, each in a session and so in a scheduling group of its own, do not: 8 us a barrier,
// not 4).
void Group::wait_generation(uint32_t epoch) {
  Control& c = control();
  auto arrived = [&] {
    return static_cast<int32_t>(c.generation.load(std::memory_order_acquire) - epoch) >= 0;
  };
  auto missing = [&](int r) {
    return static_cast<int32_t>(line(r).epoch.load(std::memory_order_acquire) - epoch) < 0;
  };
  const auto start = Clock::now();
  auto now = start;
  int cpu = oversubscribed_ ? sched_getcpu() : -1;
  while (now - start < std::chrono::milliseconds(1)) {
    bool shares_core = false;
    for (int r = 0; oversubscribed_ && r < world_size() && !shares_core; r++) {
      shares_core = missing(r) && line(r).cpu.load(std::memory_order_relaxed) == cpu;
    }
    if (shares_core) {
      sched_yield();
      if (arrived()) return;
      now = Clock::now();
      cpu = sched_getcpu();
    } else {
      for (int i = 0; i < 16; i++) {
        if (arrived()) return;
        __builtin_ia32_pause();
      }
      now = Clock::now();
      if (now - start > std::chrono::microseconds(200)) break;
      if (now - start > std::chrono::microseconds(6)) {
        sched_yield();  // a rank that waits here, too, should have had as much of the core
        if (oversubscribed_) cpu = sched_getcpu();
      }
    }
  }
  c.num_sleepers.fetch_add(1, std::memory_order_seq_cst);
  struct Leave {
    std::atomic<uint32_t>& count;
    ~Leave() { count.fetch_sub(1, std::memory_order_relaxed); }
  } leave{c.num_sleepers};
  std::optional<Waiting> waiting;
  bool interrupted = false;
  for (auto next_check = Clock::now();;) {
    const uint32_t generation = c.generation.load(std::memory_order_seq_cst);
    if (static_cast<int32_t>(generation - epoch) >= 0) return;
    check();
    const bool due = Clock::now() >= next_check;
    // A signal may also arrive between this and the next wait, or at another thread.
    if (interrupted || due) end_on_signal();
    if (due) {
      std::vector<int> missing_ranks;
      int gone = -1;
      for (int r = 0; r < world_size(); r++) {
        if (!missing(r)) continue;
        missing_ranks.push_back(r);
        // It may have arrived and left since: what it did before it went is visible now.
        if (gone < 0 && has_gone(r) && missing(r)) gone = r;
      }
      check_missing(missing_ranks, gone, deadline_, here());
      now = Clock::now();
      if (now - start > Milliseconds(90)) waiting.emplace(*this, here(), false);
      next_check = now + Milliseconds(100);
    }
    const auto left = std::chrono::duration_cast<Milliseconds>(deadline_ - Clock::now());
    interrupted =
        futex_wait(&c.generation, generation, std::clamp(left, Milliseconds(1), Milliseconds(50)));
  }
}

}  // namespace primitives
