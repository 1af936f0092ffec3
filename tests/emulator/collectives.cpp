// Plays collectives of the CUDA device code on all ranks of an emulated group, for Python (ctypes).
#include <cstdio>

#include "emulator/collective_kernel.hpp"
#include "emulator/fiber.hpp"
#include "emulator/machine.hpp"

namespace emulator {
namespace {

using namespace primitives::cuda;

constexpr uint64_t kMaxSwitches = 20'000'000;

extern "C" struct Region {
  const char* begin;
  uint64_t nbytes;
};

extern "C" struct EmulatedRun {
  int32_t num_lanes;
  int32_t num_calls;  // of each rank
  int32_t room;       // blocks that run at a time, on all ranks together
  int32_t dead_rank;  // makes its calls from dead_from on never; -1: none
  int32_t dead_from;
  int32_t mistake;  // Mistake
  uint64_t mistake_at;
  uint64_t seed;
};

// One block of a running kernel.
struct RunningBlock {
  RunningBlock(World& world, int num_lanes, int rank, uint32_t first_thread, const Clock& clock)
      : machine(world, num_lanes, first_thread, clock), rank(rank) {
    machine.yield = [this] { fiber.suspend(); };
  }

  Machine machine;
  Fiber fiber;
  int rank;
  bool ended = false;
  std::string violation;
};

// A rank: its calls one after the other, as kernels on a stream.
struct Rank {
  Ranks ranks;
  std::vector<Call> calls;
  size_t num_started = 0;  // calls
  int num_blocks_started = 0, num_blocks_ended = 0;
  Clock clock;  // at the end of the last kernel

  bool has_block_to_start() const {
    return num_started > 0 && num_blocks_started < calls[num_started - 1].num_blocks;
  }
};

class Group {
 public:
  Group(const EmulatedRun& run, World& world) : run_(run), world_(world) {}

  void add(const Ranks& ranks, std::vector<Call> calls) {
    const Clock none(ranks.world_size * ranks.max_blocks * run_.num_lanes, 0);
    ranks_.push_back({.ranks = ranks, .calls = std::move(calls), .clock = none});
  }

  void play() {
    while (true) {
      start_calls();
      const size_t num_startable = std::count_if(
          ranks_.begin(), ranks_.end(), [](const Rank& r) { return r.has_block_to_start(); });
      const bool has_room = blocks_.size() < static_cast<size_t>(run_.room);
      if (blocks_.empty() && num_startable == 0) return;
      // Mostly the running one goes on for a while, so that ranks drift apart.
      if (num_startable > 0 && has_room && (blocks_.empty() || world_.chance(3))) {
        start_block(world_.random() % num_startable);
      }
      if (current_ >= blocks_.size() || world_.chance(4)) {
        current_ = world_.random() % blocks_.size();
      }
      go_on(current_);
      if (++world_.num_switches > kMaxSwitches) throw Violation("no end");
    }
  }

 private:
  // The next call of every rank whose last one has ended.
  void start_calls() {
    for (Rank& rank : ranks_) {
      const size_t end = rank.ranks.rank == run_.dead_rank
                             ? std::min<size_t>(rank.calls.size(), run_.dead_from)
                             : rank.calls.size();
      const bool idle = rank.num_started == 0 ||
                        rank.num_blocks_ended == rank.calls[rank.num_started - 1].num_blocks;
      if (!idle || rank.num_started >= end) continue;
      rank.num_started++;
      rank.num_blocks_started = rank.num_blocks_ended = 0;
    }
  }

  void start_block(size_t skip) {
    for (Rank& rank : ranks_) {
      if (!rank.has_block_to_start() || skip-- > 0) continue;
      const int block = rank.num_blocks_started++;
      const uint32_t first_thread =
          (rank.ranks.rank * rank.ranks.max_blocks + block) * run_.num_lanes;
      auto running = std::make_unique<RunningBlock>(world_, run_.num_lanes, rank.ranks.rank,
                                                    first_thread, rank.clock);
      const Call& call = rank.calls[rank.num_started - 1];
      running->fiber.begin([r = running.get(), &rank, block, call] {
        try {
          run_block(r->machine, block, rank.ranks, call);
        } catch (const Violation& violation) {
          r->violation = violation.what();
        }
        r->ended = true;
      });
      blocks_.push_back(std::move(running));
      return;
    }
  }

  void go_on(size_t index) {
    RunningBlock& running = *blocks_[index];
    running.fiber.resume();
    if (!running.ended) return;
    if (!running.violation.empty()) throw Violation(running.violation);
    Rank& rank = ranks_[running.rank];
    rank.num_blocks_ended++;
    ended_clocks_.resize(ranks_.size());
    Clock& ended = ended_clocks_[running.rank];
    ended.resize(rank.clock.size());
    join(ended, running.machine.last_clock());
    if (rank.num_blocks_ended == rank.calls[rank.num_started - 1].num_blocks) rank.clock = ended;
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(index));
  }

  const EmulatedRun& run_;
  World& world_;
  std::vector<Rank> ranks_;
  std::vector<std::unique_ptr<RunningBlock>> blocks_;
  std::vector<Clock> ended_clocks_;
  size_t current_ = 0;
};

}  // namespace

// Plays run->num_calls calls of every rank. ranks[r] is the group as rank r sees it (segments may
// be null: they are made here); calls[rank * num_calls + i]. Returns 0, or 1 with `report` set.
extern "C" int emulate(const EmulatedRun* run, const Ranks* ranks, const Call* calls,
                       const Region* regions, int num_regions, char* report, int capacity) {
  World world;
  world.random.seed(run->seed);
  world.mistake = static_cast<Mistake>(run->mistake);
  world.mistake_at = run->mistake_at;
  for (int i = 0; i < num_regions; i++) world.memory.allow(regions[i].begin, regions[i].nbytes);
  const int n = ranks[0].world_size;
  const size_t nbytes = segment_nbytes(ranks[0].slot_nbytes);
  std::vector<std::unique_ptr<char[]>> segments;
  for (int r = 0; r < n; r++) {
    segments.emplace_back(new (std::align_val_t(128)) char[nbytes]());
    world.memory.allow(segments[r].get(), nbytes);
    world.memory.allow(ranks[r].status, sizeof(Status));
  }
  try {
    Group group(*run, world);
    for (int r = 0; r < n; r++) {
      Ranks seen = ranks[r];
      for (int s = 0; s < n; s++) seen.segments[s] = segments[s].get();
      std::vector<Call> own(calls + r * run->num_calls, calls + (r + 1) * run->num_calls);
      for (Call& call : own) {
        const char* error = prepare(seen, &call);
        if (*error != 0) throw Violation(error);
      }
      group.add(seen, std::move(own));
    }
    group.play();
  } catch (const Violation& violation) {
    std::snprintf(report, capacity, "%s", violation.what());
    return 1;
  }
  return 0;
}

extern "C" int emulated_max_blocks(int num_multiprocessors, int ranks_on_device, int num_groups) {
  return max_blocks(num_multiprocessors, ranks_on_device, num_groups);
}

extern "C" uint64_t emulated_table_words(int world_size, uint32_t num_tensors) {
  return TableLayout{static_cast<size_t>(world_size), num_tensors}.num_words();
}

// numels[tensor * world_size + rank]; addresses and places[num_tensors] each. Returns the floats of
// partials.
extern "C" uint64_t emulated_write_table(uint64_t* words, int world_size, uint32_t num_tensors,
                                         int rank, const uint64_t* numels, const uint64_t* ins,
                                         const uint64_t* outs, const uint64_t* places,
                                         uint64_t* stream_numels) {
  const TableLayout of{static_cast<size_t>(world_size), num_tensors};
  write_cuts(words, of, rank, [&](int r, size_t t) { return numels[t * world_size + r]; });
  std::copy_n(ins, num_tensors, words + of.ins());
  std::copy_n(outs, num_tensors, words + of.outs());
  std::copy_n(places, num_tensors, words + of.places());
  for (int r = 0; r < world_size; r++) stream_numels[r] = words[of.starts(r) + num_tensors];
  return words[of.groups() + num_tensors] * kLeavesPerGroup;
}

}  // namespace emulator
