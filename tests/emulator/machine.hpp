// The machine of [Note: device code], emulated: each block is a fiber, its lanes are a loop.
//
// A fiber goes on until it waits for a flag, meets a barrier, or chance stops it at an access to
// memory; then chance chooses the next one. So a seed fixes the interleaving, time is counted in
// switches, and a wait that nobody can end takes no longer than any other.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <map>
#include <numeric>
#include <random>

#include "emulator/races.hpp"

namespace emulator {

enum class Mistake : int {
  kNone,
  kRelaxedFlag,  // a flag that orders nothing
  kMissingSync,  // a barrier of a block that orders nothing
  kLostFlags,    // flags that are never written from then on
  kWrongIndex,   // a load from one element further on
};

class Machine;

// What all blocks share.
struct World {
  SharedMemory memory;
  std::map<const void*, Clock> released;
  std::mt19937_64 random;
  uint64_t num_switches = 0;
  Mistake mistake = Mistake::kNone;
  uint64_t mistake_at = 0;  // it happens to the so-manieth occasion, from 0
  uint64_t num_occasions = 0;

  // Whether this occasion for `which` is the one that goes wrong.
  bool goes_wrong(Mistake which) { return mistake == which && num_occasions++ == mistake_at; }
  // ... or one before.
  bool has_gone_wrong(Mistake which) { return mistake == which && num_occasions++ >= mistake_at; }
  bool chance(uint32_t one_in) { return random() % one_in == 0; }
};

class Machine {
 public:
  Machine(World& world, int num_lanes, uint32_t first_thread, const Clock& clock)
      : world_(world),
        num_lanes_(num_lanes),
        first_thread_(first_thread),
        clocks_(num_lanes, clock),
        order_(num_lanes) {
    std::iota(order_.begin(), order_.end(), 0);
    for (int i = 0; i < num_lanes; i++) clocks_[i][first_thread + i]++;
  }

  // --- what the device code asks for
  int num_lanes() const { return num_lanes_; }

  template <class F>
  void each_lane(F f) {
    std::shuffle(order_.begin(), order_.end(), world_.random);
    for (int lane : order_) {
      lane_ = lane;
      f(lane);
    }
    lane_ = 0;
  }

  template <class F>
  bool all(F f) {
    bool result = true;
    each_lane([&](int lane) {
      if (!f(lane)) result = false;
    });
    sync();
    return result;
  }

  void sync() {
    if (world_.goes_wrong(Mistake::kMissingSync)) return;
    Clock known = clocks_[0];
    for (const Clock& clock : clocks_) join(known, clock);
    for (int i = 0; i < num_lanes_; i++) {
      clocks_[i] = known;
      clocks_[i][first_thread_ + i]++;
    }
    yield();
  }

  template <class T>
  T load(const T* at) {
    if (sizeof(T) > 1 && sizeof(T) < 16 && world_.goes_wrong(Mistake::kWrongIndex)) at++;
    if (world_.chance(200)) yield();
    touch(at, sizeof(T), false);
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
  }

  template <class T>
  void store(T* at, T value) {
    if (world_.chance(200)) yield();
    touch(at, sizeof(T), true);
    std::memcpy(at, &value, sizeof(T));
  }

  template <class T>
  T acquire(const T* at) {
    yield();
    const auto found = world_.released.find(at);
    if (found != world_.released.end()) join(clock(), found->second);
    return *static_cast<const volatile T*>(at);
  }

  template <class T>
  void release(T* at, T value) {
    if (sizeof(T) == 8 && world_.has_gone_wrong(Mistake::kLostFlags)) return;
    if (!world_.goes_wrong(Mistake::kRelaxedFlag)) {
      Clock& known = world_.released.try_emplace(at, clock().size(), 0).first->second;
      join(known, clock());
    }
    *static_cast<volatile T*>(at) = value;
    clock()[first_thread_ + lane_]++;
    yield();
  }

  bool claim(uint32_t* at) {
    if (*at != 0) return false;
    *at = 1;
    world_.memory.allow_races();  // only a failure is claimed
    return true;
  }

  uint32_t count(uint32_t* at) {
    yield();
    Clock& known = world_.released.try_emplace(at, clock().size(), 0).first->second;
    if (!world_.goes_wrong(Mistake::kRelaxedFlag)) {
      join(clock(), known);
      join(known, clock());
    }
    clock()[first_thread_ + lane_]++;
    return (*at)++;
  }

  uint64_t now_ns() const { return 1 + world_.num_switches * 1000; }
  void pause() { yield(); }

  // --- what the scheduler asks for
  std::function<void()> yield;
  // What is known when the block has ended.
  Clock last_clock() const {
    Clock known = clocks_[0];
    for (const Clock& clock : clocks_) join(known, clock);
    return known;
  }

 private:
  Clock& clock() { return clocks_[lane_]; }
  void touch(const void* at, size_t nbytes, bool is_write) {
    world_.memory.access(at, nbytes, is_write, first_thread_ + lane_, clock());
  }

  World& world_;
  const int num_lanes_;
  const uint32_t first_thread_;
  std::vector<Clock> clocks_;  // by lane
  std::vector<int> order_;
  int lane_ = 0;
};

}  // namespace emulator
