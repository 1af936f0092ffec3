// Global memory of blocks and ranks that wait for each other: who may touch it, and races.
//
// [Note: happens before] Every lane of every block is a thread with a vector clock. Barriers of a
// block and flags (release, then acquire of what was released) order threads; nothing else does.
// Two accesses to a byte, one of them a write, that are not ordered this way are a race, whatever
// the interleaving of this run happened to be.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator/places.hpp"

namespace emulator {

using Clock = std::vector<uint32_t>;  // by thread

inline void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); i++) {
    if (from[i] > into[i]) into[i] = from[i];
  }
}

class SharedMemory {
 public:
  // The group has failed: what its buffers hold is undefined from here on.
  void allow_races() { races_allowed_ = true; }

  void allow(const void* begin, size_t nbytes) {
    places_.allow(begin, 1, 0, static_cast<int64_t>(nbytes), true);
  }

  // Thread `thread`, at `now`, reads or writes. `clock` is what it knows of the others.
  void access(const void* at, size_t nbytes, bool is_write, uint32_t thread, const Clock& clock) {
    const char* begin = static_cast<const char*>(at);
    places_.check(begin, nbytes, nbytes, is_write);
    if (races_allowed_) return;
    for (size_t i = 0; i < nbytes; i++) {
      Cell& cell = cell_at(reinterpret_cast<uintptr_t>(begin) + i);
      check(cell.write, is_write ? "writes after a write" : "reads after a write", thread, clock);
      if (!is_write) {
        std::erase_if(cell.reads, [&](const Access& read) { return known(read, clock); });
        cell.reads.push_back({thread + 1, clock[thread]});
        continue;
      }
      for (const Access& read : cell.reads) check(read, "writes after a read", thread, clock);
      cell.reads.clear();
      cell.write = {thread + 1, clock[thread]};
    }
  }

 private:
  struct Access {
    uint32_t thread_plus_1 = 0, time = 0;
  };
  struct Cell {
    Access write;
    std::vector<Access> reads;
  };
  static constexpr size_t kPageNbytes = 256;
  using Page = std::array<Cell, kPageNbytes>;

  static bool known(const Access& access, const Clock& clock) {
    return access.thread_plus_1 == 0 || access.time <= clock[access.thread_plus_1 - 1];
  }

  static void check(const Access& earlier, const char* what, uint32_t thread, const Clock& clock) {
    if (known(earlier, clock)) return;
    throw Violation("race: thread " + std::to_string(thread) + " " + what + " of thread " +
                    std::to_string(earlier.thread_plus_1 - 1) + " that it does not know of");
  }

  Cell& cell_at(uintptr_t address) {
    const uintptr_t number = address / kPageNbytes;
    if (number != last_number_) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      last_number_ = number;
      last_page_ = page.get();
    }
    return (*last_page_)[address % kPageNbytes];
  }

  bool races_allowed_ = false;
  Places places_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;
};

}  // namespace emulator
