// How a group fails: who is missing, why, and how every rank comes to know. See [Note: failure].
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

#include "transport/futex.hpp"
#include "transport/group.hpp"

namespace primitives {

std::string Group::here() const {
  std::string text = named(rank()) + " of group '" + name() + "'";
  if (attached_) {
    const RankLine& mine = line(rank());
    text += " in " + std::string(op_name(static_cast<Op>(mine.op.load()))) + ", collective " +
            std::to_string(mine.seq.load()) + at_site(mine.site.read());
  }
  return text;
}

Standing Group::standing(int rank) const {
  const RankLine& of = line(rank);
  Standing at{};
  at.pid = of.pid;
  const char state = watched_[rank] ? process_state({of.pid, of.start_time}) : '?';
  at.state = has_left(rank) ? "left" : state == 0 ? "dead" : state == 'T' ? "stopped" : "running";
  do {  // the rank may go on meanwhile
    at.seq = of.seq.load(std::memory_order_acquire);
    at.op = static_cast<Op>(of.op.load());
    at.inside = of.inside.load() != 0;
    at.site = of.site.read();
  } while (of.seq.load(std::memory_order_acquire) != at.seq);
  at.waiting = of.waiting.read();
  return at;
}

std::string Group::describe_rank(int rank) const {
  const Standing at = standing(rank);
  std::string text = named(rank) + " (pid " + std::to_string(at.pid);
  if (std::strcmp(at.state, "stopped") == 0) text += ", stopped";
  text += ")";
  if (at.seq == 0) {
    text += ", which made no collective call yet";
  } else {
    text += (at.inside ? ", last seen inside collective " : ", last seen after collective ") +
            std::to_string(at.seq) + ", " + op_name(at.op) + at_site(at.site);
  }
  return at.waiting.empty() ? text : text + ", and waiting as " + at.waiting;
}

// "; rank 1 ...; rank 3 ...": all but this rank and `told`.
std::string Group::describe_others(const std::vector<int>& told) const {
  std::string text;
  for (int r = 0; r < world_size(); r++) {
    if (r == rank() || std::find(told.begin(), told.end(), r) != told.end()) continue;
    text += "; " + describe_rank(r);
  }
  return text;
}

bool Group::has_left(int rank) const {
  return line(rank).state.load(std::memory_order_acquire) ==
         static_cast<uint32_t>(RankState::kClosed);
}

bool Group::has_died(int rank) const {
  const RankLine& of = line(rank);
  return rank != this->rank() && watched_[rank] && !is_alive({of.pid, of.start_time});
}

bool Group::has_gone(int rank) const {
  return rank != this->rank() && (has_left(rank) || has_died(rank));
}

void Group::check_missing(const std::vector<int>& missing, int gone, Clock::time_point deadline,
                          const std::string& waiting_for) {
  if (gone >= 0) {
    const std::string how = has_left(gone) ? ", has left; " : ", has died; ";
    fail(Failure::kPeerLost,
         describe_rank(gone) + how + waiting_for + " still needs it" + describe_others({gone}));
  }
  if (Clock::now() < deadline) return;
  std::string text = waiting_for + " reached the timeout of its call";
  for (int r : missing) text += "; missing: " + describe_rank(r);
  fail(Failure::kTimeout, text + describe_others(missing));
}

void Group::poison(Failure failure, const std::string& what) {
  Poison& poison = control().poison;
  uint32_t none = 0;
  if (!poison.state.compare_exchange_strong(none, 1)) return;
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

void Group::fail(Failure failure, const std::string& what) {
  poison(failure, what);
  // Another rank may be writing; should it die right there, this rank's own words do.
  for (int i = 0; i < 1000 && !failed(); i++) usleep(100);
  if (!failed()) throw TransportError(failure, what);
  throw_poison();
}

void Group::throw_poison() {
  const Poison& poison = control().poison;
  std::string text = poison.text;
  if (poison.rank != rank()) {
    text += " (found by " + named(poison.rank) + ")";
    const Site* site = this_site();
    if (site != nullptr) text += "; here: " + named(rank()) + at_site(site->text);
  }
  Flight::of_process().end(flight_.load(std::memory_order_relaxed), FlightState::kFailed);
  if (!has_told_.exchange(true)) dump_flight_on_error(text);
  throw TransportError(static_cast<Failure>(poison.failure), text);
}

void Group::end_on_signal() {
  try {
    check_signals();
  } catch (...) {
    abort("a signal ended its call");
    throw;
  }
}

void Group::check() {
  if (closed_.load(std::memory_order_relaxed)) {
    throw TransportError(Failure::kOther, "group '" + name() + "' is closed on " + named(rank()));
  }
  if (control().poison.state.load(std::memory_order_acquire) == 2) throw_poison();
  if (forked()) {
    throw TransportError(Failure::kOther, "group '" + name() + "' belongs to process " +
                                              std::to_string(self_.pid) + "; a fork cannot use it");
  }
}

bool Group::forked() const { return num_forks() != num_forks_; }

bool Group::failed() const { return control().poison.state.load(std::memory_order_acquire) == 2; }

std::string Group::failure_text() const { return failed() ? control().poison.text : ""; }

Failure Group::failure() const {
  return failed() ? static_cast<Failure>(control().poison.failure) : Failure::kNone;
}

void Group::abort(const std::string& why) {
  if (forked()) return;
  poison(Failure::kPeerLost, describe_rank(rank()) + ", aborted the group: " + why);
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
