// Which runs of a range of bytes are free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <iterator>
#include <map>

namespace primitives {

class FreeList {
 public:
  static constexpr size_t kNone = SIZE_MAX;

  explicit FreeList(size_t nbytes) { free_[0] = nbytes; }

  // Where `nbytes` > 0 were free and no longer are, or kNone. The first that fits, so that as
  // little of the range as possible is ever used.
  size_t take(size_t nbytes) {
    auto block = free_.begin();
    while (block != free_.end() && block->second < nbytes) ++block;
    if (block == free_.end()) return kNone;
    const auto [offset, num_free] = *block;
    free_.erase(block);
    if (num_free > nbytes) free_[offset + nbytes] = num_free - nbytes;
    used_[offset] = nbytes;
    return offset;
  }

  // What take() gave.
  void give_back(size_t offset) {
    const auto block = used_.find(offset);
    size_t nbytes = block->second;
    used_.erase(block);
    auto next = free_.lower_bound(offset);
    if (next != free_.end() && offset + nbytes == next->first) {
      nbytes += next->second;
      next = free_.erase(next);
    }
    if (next != free_.begin()) {
      const auto before = std::prev(next);
      if (before->first + before->second == offset) {
        before->second += nbytes;
        return;
      }
    }
    free_[offset] = nbytes;
  }

 private:
  std::map<size_t, size_t> free_, used_;  // offset -> nbytes; free neighbours are merged
};

}  // namespace primitives
