// How a group comes to be: the ranks meet, share memory, and compare who they think they are.
#include <sched.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>
#include <thread>

#include "transport/group.hpp"
#include "transport/registry.hpp"

namespace primitives {
namespace {

constexpr auto kWatchPeriod = Milliseconds(200);

std::string joined(const std::vector<int>& members) {
  std::string text;
  for (int member : members) text += (text.empty() ? "" : ", ") + std::to_string(member);
  return text;
}

// The values that ranks leave at the meeting: lines of text.
std::string lines(std::initializer_list<std::string> values) {
  std::string text;
  for (const std::string& value : values) text += value + "\n";
  return text;
}

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> values;
  for (size_t at = 0, end; (end = text.find('\n', at)) != std::string::npos; at = end + 1) {
    values.push_back(text.substr(at, end - at));
  }
  values.resize(std::max<size_t>(values.size(), 4));
  return values;
}

// Equal for processes that can share memory.
std::string host_id() {
  const char* given = std::getenv("PRIMITIVES_HOST_ID");
  return given != nullptr && *given != '\0' ? given : boot_id();
}

}  // namespace

Group::Group(Meeting& meeting, GroupOptions options)
    : options_(std::move(options)), layout_(options_.world_size), self_(this_process()) {
  if (options_.members.empty()) {
    for (int r = 0; r < world_size(); r++) options_.members.push_back(r);
  }
  std::snprintf(record_.group, sizeof record_.group, "%s", name().c_str());
  record_.rank = rank();
  deadline_ = Clock::now() + options_.timeout;
  watch_flight();
  if (world_size() == 1) {
    segment_ = std::make_shared<Segment>(Segment::anonymous(layout_.num_mapped()));
    line(0).pid = self_.pid;
    line(0).start_time = self_.start_time;
    watched_ = {true};
  } else {
    try {
      attach(meeting);
    } catch (const TransportError& error) {
      if (error.failure != Failure::kOtherHost) dump_flight_on_error(error.what());
      throw;
    }
  }
  attached_ = true;
  register_group(*this);
}

Group::~Group() {
  if (attached_) unregister_group(*this);
  close();
}

// Rank 0 creates the segment and tells its name; everybody maps it; rank 0 unlinks it.
void Group::attach(Meeting& meeting) {
  // A store may outlive a group of the same name, so each meeting has its own number.
  const std::string round =
      "round" + std::to_string(meeting.add("count/" + std::to_string(rank()), 1)) + "/";
  const Site* mine_at = this_site();
  const std::string site = mine_at == nullptr ? "" : mine_at->text;
  const std::string host = host_id();
  const std::string space = boot_id() + " " + std::to_string(pid_space());
  const std::string members = joined(options_.members);
  const std::string differs = "group '" + name() + "' differs between ranks";
  const std::string creating = here() + at_site(site) + ", while the group was being created";
  meeting.set(round + "process/" + std::to_string(rank()),
              lines({space, std::to_string(self_.pid), std::to_string(self_.start_time)}));

  auto absent = [&](int r) {
    return r != rank() &&
           (!segment_ || line(r).state.load() == static_cast<uint32_t>(RankState::kAbsent));
  };
  // Groups that failed before this one was made are no news.
  std::set<const Group*> failed_before;
  for_each_group([&](Group& other) {
    if (other.failed()) failed_before.insert(&other);
  });
  // A rank that never comes need not be waited for: it came to the meeting and died, or it is known
  // from another group.
  auto watch = [&] {
    std::string dead, failure;
    for (int r = 0; r < world_size() && dead.empty(); r++) {
      const std::string key = round + "process/" + std::to_string(r);
      if (!absent(r) || !meeting.has(key)) continue;
      const auto process = split(meeting.get(key));
      const ProcessId id{std::atoi(process[1].c_str()),
                         std::strtoull(process[2].c_str(), nullptr, 10)};
      if (process[0] == space && !is_alive(id) && absent(r)) {
        dead = named(r) + " (pid " + process[1] + ")";
      }
    }
    for (int r = 0; segment_ && r < world_size() && dead.empty(); r++) {
      const RankLine& of = line(r);
      if (!absent(r) && r != rank() && of.pid_space == pid_space() &&
          (has_left(r) || !is_alive({of.pid, of.start_time}))) {
        dead = named(r) + " (pid " + std::to_string(of.pid) + ")";
      }
    }
    Failure kind = Failure::kOther;
    for_each_group([&](Group& other) {
      for (int r = 0; r < world_size(); r++) {
        const auto& known = other.members();
        const auto found = std::find(known.begin(), known.end(), options_.members[r]);
        if (!absent(r) || found == known.end()) continue;
        const int there = static_cast<int>(found - known.begin());
        if (other.has_died(there)) dead = other.describe_rank(there);
        const bool about_this = other.failure_text().starts_with(differs);
        if (other.failed() && (about_this || !failed_before.contains(&other))) {
          kind = other.failure();
          failure = other.failure_text();
        }
      }
    });
    if (!failure.empty()) throw TransportError(kind, failure);
    if (meeting.has(round + "failed")) return;  // what that rank died of says more
    if (!dead.empty()) {
      throw TransportError(Failure::kPeerLost,
                           dead + ", has died; " + creating + ", still needs it");
    }
  };
  auto wait = [&](auto done, auto waiting_for) {
    auto next_watch = Clock::now() + kWatchPeriod;
    for (auto pause = std::chrono::microseconds(100); !done();
         pause = std::min(pause * 2, std::chrono::microseconds(20000))) {
      if (meeting.has(round + "failed")) {
        const auto failed = split(meeting.get(round + "failed"));
        throw TransportError(static_cast<Failure>(std::atoi(failed[0].c_str())), failed[1]);
      }
      const auto now = Clock::now();
      if (now >= next_watch) {
        check_signals();
        watch();
        next_watch = now + kWatchPeriod;
      }
      if (now > deadline_) {
        std::string text = creating + ": " + waiting_for() + " within " +
                           std::to_string(options_.timeout.count()) + " ms";
        const std::string met = meeting.has("met") ? meeting.get("met") : members;
        if (met != members) {
          text += "; the last group of this name had ranks [" + met + "], this one has [" +
                  members + "]: are groups created in the same order everywhere?";
        }
        throw TransportError(Failure::kTimeout, text);
      }
      std::this_thread::sleep_for(pause);
    }
  };

  try {
    if (rank() == 0) {
      sweep_segments(options_.folder);
      segment_ = std::make_shared<Segment>(Segment::create(
          options_.folder, layout_.nbytes(), layout_.num_mapped(), layout_.num_committed()));
      meeting.set(round + "segment", lines({host, segment_->name(), members, site}));
    } else {
      wait([&] { return meeting.has(round + "segment"); },
           [this] { return named(0) + " did not come"; });
      const auto told = split(meeting.get(round + "segment"));
      if (told[0] != host) {
        throw TransportError(Failure::kOtherHost, here() + " runs on another host than rank 0");
      }
      if (told[2] != members) {
        throw TransportError(Failure::kMismatch,
                             differs + "; " + named(0) + ": ranks [" + told[2] + "]" +
                                 at_site(told[3]) + "; " + named(rank()) + ": ranks [" + members +
                                 "]" + at_site(site) +
                                 ": every rank must create the same groups in the same order");
      }
      segment_ =
          std::make_shared<Segment>(Segment::open(options_.folder, told[1], layout_.num_mapped()));
      if (segment_->nbytes() != layout_.nbytes()) {
        throw TransportError(Failure::kMismatch, here() + ": ranks run different versions");
      }
    }
    enter();
    auto all_attached = [&] {
      return control().num_attached.load(std::memory_order_acquire) ==
             static_cast<uint32_t>(world_size());
    };
    wait(all_attached, [&] {
      std::string missing;
      for (int r = 0; r < world_size(); r++) {
        if (absent(r)) missing += (missing.empty() ? "" : ", ") + named(r);
      }
      return missing + " did not come";
    });
  } catch (const TransportError& error) {
    if (error.failure != Failure::kOtherHost && meeting.has(round + "failed")) {
      // What failed first may be why this rank could not open what rank 0 has taken away.
      const auto failed = split(meeting.get(round + "failed"));
      const auto failure = static_cast<Failure>(std::atoi(failed[0].c_str()));
      if (failure == Failure::kOtherHost || error.failure == Failure::kOther) {
        throw TransportError(failure, failed[1]);
      }
    }
    if (!meeting.has(round + "failed")) {
      meeting.set(round + "failed",
                  lines({std::to_string(static_cast<uint32_t>(error.failure)), error.what()}));
    }
    if (error.failure == Failure::kMismatch) {
      // The ranks of this name that wait for others must learn it, too: through any group that
      // has them all.
      for_each_group([&](Group& other) {
        const auto& known = other.members();
        const bool has_all =
            std::all_of(options_.members.begin(), options_.members.end(), [&](int member) {
              return std::find(known.begin(), known.end(), member) != known.end();
            });
        if (has_all && other.world_size() > world_size()) other.poison(error.failure, error.what());
      });
    }
    throw;
  }
  segment_->unlink();
  if (rank() == 0) meeting.set("met", members);

  uint64_t cores[16] = {};
  int num_cores = 0;
  watched_.resize(world_size());
  for (int r = 0; r < world_size(); r++) {
    for (int i = 0; i < 16; i++) cores[i] |= line(r).affinity[i];
    watched_[r] = line(r).pid_space == pid_space();
    checked_ = checked_ || line(r).checks.load() != 0;
  }
  for (uint64_t word : cores) num_cores += std::popcount(word);
  oversubscribed_ = world_size() > num_cores;
}

// This rank's line, for all to see.
void Group::enter() {
  RankLine& mine = line(rank());
  mine.pid = self_.pid;
  mine.start_time = self_.start_time;
  mine.pid_space = pid_space();
  const char* check = std::getenv("PRIMITIVES_CHECK");
  mine.checks.store(check != nullptr && *check != '\0' && std::strcmp(check, "0") != 0);
  const char* staging = std::getenv("PRIMITIVES_STAGING");
  if (staging != nullptr && *staging != '\0' && !staging_pace_.set(staging)) {
    throw TransportError(
        Failure::kOther,
        here() + ": PRIMITIVES_STAGING: expected auto, cache or stream, got '" + staging + "'");
  }
  cpu_set_t cpus;
  CPU_ZERO(&cpus);
  sched_getaffinity(0, sizeof cpus, &cpus);
  std::memcpy(mine.affinity, &cpus, sizeof mine.affinity);
  mine.state.store(static_cast<uint32_t>(RankState::kAttached), std::memory_order_release);
  control().num_attached.fetch_add(1, std::memory_order_acq_rel);
}

}  // namespace primitives
