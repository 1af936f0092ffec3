// How a group fails: who is missing, why, and how every rank comes to know. See [Note: failure].
#include <unistd.h>

#include <cstdio>
#include <cstring>

#include "transport/futex.hpp"
#include "transport/group.hpp"

namespace primitives {

std::string Group::here() const {
  std::string text = "rank " + std::to_string(rank()) + " of group '" + name() + "'";
  if (attached_) {
    const RankLine& mine = line(rank());
    text += " in " + std::string(op_name(static_cast<Op>(mine.op.load()))) + ", collective " +
            std::to_string(mine.seq.load());
  }
  return text;
}

std::string Group::describe_rank(int rank) const {
  const RankLine& of = line(rank);
  const ProcessId process{of.pid, of.start_time};
  std::string text = "rank " + std::to_string(rank) + " (pid " + std::to_string(of.pid);
  if (process_state(process) == 'T') text += ", stopped";
  text += ")";
  const uint64_t seq = of.seq.load();
  if (seq == 0) return text + ", which made no collective call yet";
  return text +
         (of.inside.load() ? ", last seen inside collective " : ", last seen after collective ") +
         std::to_string(seq) + ", " + op_name(static_cast<Op>(of.op.load()));
}

bool Group::has_left(int rank) const {
  return line(rank).state.load(std::memory_order_acquire) ==
         static_cast<uint32_t>(RankState::kClosed);
}

bool Group::has_gone(int rank) const {
  if (rank == this->rank()) return false;
  const RankLine& of = line(rank);
  return has_left(rank) || (watched_[rank] && !is_alive({of.pid, of.start_time}));
}

void Group::check_missing(const std::vector<int>& missing, int gone, Clock::time_point deadline,
                          const std::string& waiting_for) {
  if (gone >= 0) {
    const std::string how = has_left(gone) ? ", has left; " : ", has died; ";
    fail(Failure::kPeerLost, describe_rank(gone) + how + waiting_for + " still needs it");
  }
  if (Clock::now() < deadline) return;
  std::string text = waiting_for + " reached the timeout of its call";
  for (int r : missing) text += "; missing: " + describe_rank(r);
  fail(Failure::kTimeout, text);
}

void Group::fail(Failure failure, const std::string& what) {
  Poison& poison = control().poison;
  uint32_t none = 0;
  if (poison.state.compare_exchange_strong(none, 1)) {
    poison.failure = static_cast<uint32_t>(failure);
    poison.rank = rank();
    std::snprintf(poison.text, sizeof poison.text, "%s", what.c_str());
    poison.state.store(2, std::memory_order_release);
    futex_wake_all(&control().generation);
    for (int r = 0; r < world_size(); r++) {
      line(r).bell.fetch_add(1);
      futex_wake_all(&line(r).bell);
    }
  }
  // Another rank may be writing; should it die right there, this rank's own words do.
  for (int i = 0; i < 1000 && poison.state.load(std::memory_order_acquire) != 2; i++) usleep(100);
  if (poison.state.load(std::memory_order_acquire) != 2) throw TransportError(failure, what);
  throw_poison();
}

void Group::throw_poison() {
  const Poison& poison = control().poison;
  std::string text = poison.text;
  if (poison.rank != rank()) text += " (found by rank " + std::to_string(poison.rank) + ")";
  throw TransportError(static_cast<Failure>(poison.failure), text);
}

void Group::check() {
  if (closed_.load(std::memory_order_relaxed)) {
    throw TransportError(Failure::kOther,
                         "group '" + name() + "' is closed on rank " + std::to_string(rank()));
  }
  if (control().poison.state.load(std::memory_order_acquire) == 2) throw_poison();
  if (forked()) {
    throw TransportError(Failure::kOther, "group '" + name() + "' belongs to process " +
                                              std::to_string(self_.pid) + "; a fork cannot use it");
  }
}

bool Group::forked() const { return getpid() != self_.pid; }

bool Group::failed() const { return control().poison.state.load(std::memory_order_acquire) == 2; }

Failure Group::failure() const {
  return failed() ? static_cast<Failure>(control().poison.failure) : Failure::kNone;
}

void Group::abort(const std::string& why) {
  if (forked()) return;
  try {
    fail(Failure::kPeerLost, describe_rank(rank()) + ", aborted the group: " + why);
  } catch (const TransportError&) {  // told to everybody, which is all that is wanted here
  }
}

void Group::close() {
  if (!attached_ || forked() || closed_.exchange(true)) return;
  line(rank()).state.store(static_cast<uint32_t>(RankState::kClosed), std::memory_order_release);
  if (world_size() == 1) return;
  futex_wake_all(&control().generation);
  for (int r = 0; r < world_size(); r++) {
    line(r).bell.fetch_add(1);
    futex_wake_all(&line(r).bell);
  }
}

}  // namespace primitives
