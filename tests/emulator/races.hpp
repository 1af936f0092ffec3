// Memory that knows who may touch it: bounds, alignment, and races.
//
// [Note: happens before] Every lane of every block is a thread with a vector clock. Barriers of a
// block and flags (release, then acquire of what was released) order threads; nothing else does.
// Two accesses to a byte, one of them a write, that are not ordered this way are a race, whatever
// the interleaving of this run happened to be.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>
#include <vector>

namespace primitives::cuda::emulation {

// What the device code did wrong.
struct Violation : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Clock = std::vector<uint32_t>;  // by thread

inline void join(Clock& into, const Clock& from) {
  for (size_t i = 0; i < into.size(); i++) {
    if (from[i] > into[i]) into[i] = from[i];
  }
}

struct Region {
  const char* begin;
  uint64_t nbytes;
};

class Memory {
 public:
  // The group has failed: what its buffers hold is undefined from here on.
  void allow_races() { races_allowed_ = true; }

  void add(Region region) { regions_.push_back(region); }

  // Thread `thread`, at `now`, reads or writes. `clock` is what it knows of the others.
  void access(const void* at, size_t nbytes, bool is_write, uint32_t thread, const Clock& clock) {
    const char* begin = static_cast<const char*>(at);
    check_place(begin, nbytes);
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

  void check_place(const char* begin, size_t nbytes) const {
    if (reinterpret_cast<uintptr_t>(begin) % nbytes != 0) {
      throw Violation("misaligned access of " + std::to_string(nbytes) + " bytes");
    }
    for (const Region& region : regions_) {
      if (begin >= region.begin && begin + nbytes <= region.begin + region.nbytes) return;
    }
    throw Violation("access of " + std::to_string(nbytes) + " bytes outside of all buffers");
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
  std::vector<Region> regions_;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  uintptr_t last_number_ = 0;
  Page* last_page_ = nullptr;
};

}  // namespace primitives::cuda::emulation
