// A device of the host: plays a kernel grid by grid, block by block, lane by lane.
//
// Each thread of a block is a fiber. It runs until it needs others: at a shuffle or vote its warp,
// at a barrier its block. When all of them have come, to the same one, the shuffle is a permutation
// of an array of 32 values, and they go on. The order of blocks, and of threads between two
// meetings, is drawn anew each time, so that a result must not depend on it; who waits for threads
// that are elsewhere or gone is an error, as is an access to memory that was not given.
#pragma once

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "canonical/packed.hpp"
#include "emulator/fiber.hpp"
#include "emulator/memory.hpp"

namespace emulator {

using primitives::canonical::Packed;

// What a thread waits for; value and arg are those of a shuffle or vote.
enum class Wait { kNothing, kShuffle, kVote, kWarp, kBlock, kEnd };

constexpr int kWarp = 32;

class Device;

// What kernels ask of a thread: see canonical/cuda_thread.cuh.
class Thread {
 public:
  Thread(Device* device, int index) : device_(device), index_(index) {}
  int block_x() const;
  int block_y() const;
  int index() const { return index_; }
  float* shared() const;

  template <class V>
  V load(const V* p) const {
    check(p, sizeof(V), alignof(V), false);
    return *p;
  }
  template <class V>
  void store(V* p, V x) const {
    check(p, sizeof(V), alignof(V), true);
    *p = x;
  }
  Packed stream(const Packed* p) const { return load(p); }
  void stream(Packed* p, const Packed& x) const { store(p, x); }

  template <class V>
  V shuffle_xor(V x, int mask) const {
    static_assert(sizeof(V) == 4);
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = meet(Wait::kShuffle, mask, bits);
    memcpy(&x, &bits, 4);
    return x;
  }
  bool all(bool x) const { return meet(Wait::kVote, 0, x ? 1 : 0) != 0; }
  void sync_warp() const { meet(Wait::kWarp, 0, 0); }
  void sync_block() const { meet(Wait::kBlock, 0, 0); }

 private:
  void check(const void* p, size_t nbytes, size_t alignment, bool write) const;
  uint32_t meet(Wait wait, int arg, uint32_t value) const;

  Device* device_;
  int index_;
};

class Device {
 public:
  Device(uint32_t seed, int64_t enough_blocks) : random_(seed), enough_blocks_(enough_blocks) {}

  // As launch.hpp asks for.
  int64_t enough_blocks() const { return enough_blocks_; }
  int fail(const char* text) {
    error_ = text;
    return 1;
  }
  template <class Kernel, class Grid>
  int run(const Kernel& kernel, const Grid& grid) {
    std::vector<int64_t> blocks(static_cast<size_t>(grid.x * grid.y));
    std::iota(blocks.begin(), blocks.end(), 0);
    std::shuffle(blocks.begin(), blocks.end(), random_);
    memory_ = std::make_unique<Memory>(given_);
    try {
      for (int64_t block : blocks) {
        block_ = block;
        block_x_ = static_cast<int>(block % grid.x);
        block_y_ = static_cast<int>(block / grid.x);
        run_block(kernel, grid.shared_nbytes);
      }
    } catch (const std::exception& error) {
      return fail(error.what());
    }
    return 0;
  }

  Places& given() { return given_; }
  const std::string& error() const { return error_; }

 private:
  friend class Thread;

  struct Lane {
    Wait wait;
    int arg;
    uint32_t value;
  };

  template <class Kernel>
  void run_block(const Kernel& kernel, int64_t shared_nbytes) {
    constexpr int kThreads = Kernel::kThreads;
    static_assert(kThreads % kWarp == 0);
    constexpr float kCanary = -1234.5f;
    const auto shared_numel = static_cast<size_t>(shared_nbytes / 4);
    shared_.assign(shared_numel + 16, __builtin_nanf(""));
    std::fill(shared_.end() - 16, shared_.end(), kCanary);
    lanes_.assign(kThreads, Lane{Wait::kNothing, 0, 0});
    while (fibers_.size() < kThreads) fibers_.push_back(std::make_unique<Fiber>());
    std::string thrown;
    for (int i = 0; i < kThreads; i++) {
      fibers_[static_cast<size_t>(i)]->begin([this, &kernel, &thrown, i] {
        try {
          kernel(Thread(this, i));
        } catch (const std::exception& error) {
          thrown = name(i) + ": " + error.what();
        }
        lanes_[static_cast<size_t>(i)].wait = Wait::kEnd;
      });
    }
    std::vector<int> order(kThreads);
    std::iota(order.begin(), order.end(), 0);
    while (true) {
      std::shuffle(order.begin(), order.end(), random_);
      bool ran = false;
      for (int i : order) {
        if (lanes_[static_cast<size_t>(i)].wait != Wait::kNothing) continue;
        fibers_[static_cast<size_t>(i)]->resume();
        ran = true;
        if (!thrown.empty()) throw std::runtime_error(thrown);
      }
      if (!ran) break;
      release();
    }
    for (int i = 0; i < kThreads; i++) {
      if (lanes_[static_cast<size_t>(i)].wait != Wait::kEnd) {
        throw std::runtime_error(name(i) + " waits for threads that are elsewhere");
      }
    }
    if (std::any_of(shared_.end() - 16, shared_.end(), [](float x) { return x != kCanary; })) {
      throw std::runtime_error("shared memory is written behind its end");
    }
  }

  // Lets those go on who have all come to one meeting.
  void release() {
    const auto at = [this](size_t i, Wait wait) { return lanes_[i].wait == wait; };
    bool all_at_barrier = true;
    for (size_t i = 0; i < lanes_.size(); i++) all_at_barrier &= at(i, Wait::kBlock);
    for (size_t warp = 0; warp < lanes_.size(); warp += kWarp) {
      Lane* lanes = &lanes_[warp];
      const Lane first = lanes[0];
      if (first.wait == Wait::kEnd || (first.wait == Wait::kBlock && !all_at_barrier)) continue;
      bool together = true, all = true;
      uint32_t values[kWarp];
      for (int i = 0; i < kWarp; i++) {
        together &= lanes[i].wait == first.wait && lanes[i].arg == first.arg;
        all &= lanes[i].value != 0;
        values[i] = lanes[i].value;
      }
      if (!together) continue;
      for (int i = 0; i < kWarp; i++) {
        if (first.wait == Wait::kShuffle) lanes[i].value = values[i ^ first.arg];
        if (first.wait == Wait::kVote) lanes[i].value = all;
        lanes[i].wait = Wait::kNothing;
      }
    }
  }

  std::string name(int thread) const {
    return "block " + std::to_string(block_x_) + ", " + std::to_string(block_y_) + ", thread " +
           std::to_string(thread);
  }

  std::mt19937 random_;
  int64_t enough_blocks_;
  Places given_;
  std::unique_ptr<Memory> memory_;  // of one launch
  std::string error_;
  int64_t block_ = 0;
  int block_x_ = 0, block_y_ = 0;
  std::vector<float> shared_;
  std::vector<Lane> lanes_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
};

inline int Thread::block_x() const { return device_->block_x_; }
inline int Thread::block_y() const { return device_->block_y_; }
inline float* Thread::shared() const { return device_->shared_.data(); }

inline void Thread::check(const void* p, size_t nbytes, size_t alignment, bool write) const {
  const auto id = device_->block_ * static_cast<int64_t>(device_->lanes_.size()) + index_;
  if (write) {
    device_->memory_->store(p, nbytes, alignment, id);
  } else {
    device_->memory_->load(p, nbytes, alignment, id);
  }
}

inline uint32_t Thread::meet(Wait wait, int arg, uint32_t value) const {
  Device::Lane& lane = device_->lanes_[static_cast<size_t>(index_)];
  lane = {wait, arg, value};
  device_->fibers_[static_cast<size_t>(index_)]->suspend();
  return lane.value;
}

}  // namespace emulator
