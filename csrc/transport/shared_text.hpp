// Text in shared memory that one rank rewrites while others read it. A reader may see a mixture of
// two texts, never more than that: for diagnostics.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

namespace primitives {

template <size_t kNbytes>
class SharedText {
  static_assert(kNbytes % sizeof(uint64_t) == 0);

 public:
  // Cut to kNbytes - 1 characters.
  void write(const char* text) {
    char padded[kNbytes] = {};
    std::memcpy(padded, text, strnlen(text, kNbytes - 1));
    for (size_t i = 0; i < kNumWords; i++) {
      uint64_t word;
      std::memcpy(&word, padded + i * sizeof word, sizeof word);
      words_[i].store(word, std::memory_order_relaxed);
      if (word == 0) return;  // what follows is behind the end
    }
  }
  void clear() { words_[0].store(0, std::memory_order_relaxed); }
  bool empty() const { return (words_[0].load(std::memory_order_relaxed) & 0xff) == 0; }

  std::string read() const {
    char text[kNbytes];
    for (size_t i = 0; i < kNumWords; i++) {
      const uint64_t word = words_[i].load(std::memory_order_relaxed);
      std::memcpy(text + i * sizeof word, &word, sizeof word);
    }
    return {text, strnlen(text, kNbytes - 1)};
  }

 private:
  static constexpr size_t kNumWords = kNbytes / sizeof(uint64_t);
  std::atomic<uint64_t> words_[kNumWords];
};

}  // namespace primitives
