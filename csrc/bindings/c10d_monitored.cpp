// monitored_barrier: a barrier over the Store that says which ranks did not come, and after which
// the group still works.
#include <thread>

#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_errors.hpp"

namespace primitives {
namespace {

constexpr Milliseconds kPoll(2);
// Rank 0 decides at its own deadline; the others give it this much more to tell them.
constexpr Milliseconds kVerdictGrace(1000);

std::string join(const std::vector<int>& ranks) {
  std::string text;
  for (int r : ranks) text += (text.empty() ? "" : ", ") + std::to_string(r);
  return text;
}

}  // namespace

// Rank 0 waits for a key of every rank and writes its verdict, empty when all came. The words are
// those of torch's gloo backend, which programs look for.
void Backend::monitoredBarrier(const c10d::BarrierOptions& options, bool wait_all_ranks) {
  const Milliseconds timeout =
      options.timeout == c10d::kUnsetTimeout ? options_->timeout : options.timeout;
  const std::string round = "monitored_barrier/" + std::to_string(num_monitored_++) + "/";
  const std::string verdict = round + "verdict";
  const auto deadline = Clock::now() + timeout;
  translated([&] {
    group_->check();
    if (getRank() == 0) {
      const std::string failed = find_missing(round, timeout, deadline, wait_all_ranks);
      store_->set(verdict, failed);
      if (!failed.empty()) throw TransportError(Failure::kTimeout, "[Rank 0]: " + failed);
      return;
    }
    store_->set(round + std::to_string(getRank()), std::string("here"));
    std::string failed = "no word from it";
    while (!store_->check({verdict})) {
      group_->check();
      if (Clock::now() >= deadline + kVerdictGrace || transport_->has_gone(0)) break;
      std::this_thread::sleep_for(kPoll);
    }
    if (store_->check({verdict})) failed = store_->get_to_str(verdict);
    if (failed.empty()) return;
    throw TransportError(Failure::kTimeout,
                         "Rank " + std::to_string(getRank()) +
                             " successfully reached monitoredBarrier, but received errors while "
                             "waiting for send/recv from rank 0: " +
                             failed);
  });
}

// What is wrong at the deadline, or as soon as a missing rank is dead; empty when all have come.
std::string Backend::find_missing(const std::string& round, Milliseconds timeout,
                                  Clock::time_point deadline, bool wait_all_ranks) {
  std::vector<int> missing;
  std::string who;
  for (int r = 1; r < getSize(); r++) {
    const std::string key = round + std::to_string(r);
    bool here = store_->check({key});
    while (!here && Clock::now() < deadline && !transport_->has_gone(r)) {
      group_->check();
      std::this_thread::sleep_for(kPoll);
      here = store_->check({key});
    }
    if (here) continue;
    missing.push_back(r);
    who += "; " + transport_->describe_rank(r);
    if (!wait_all_ranks) break;
  }
  const std::string within = " in " + std::to_string(timeout.count()) + " ms";
  if (timeout <= Milliseconds(0)) return "Rank 0 timed out in monitoredBarrier" + within;
  if (missing.empty()) return "";
  return (missing.size() == 1 ? "Rank " : "Ranks ") + join(missing) +
         " failed to pass monitoredBarrier" + within + who;
}

}  // namespace primitives
