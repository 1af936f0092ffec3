// How a rank writes to its staging slots and its results: through the caches, or around them.
//
// [Note: staging pace] Before a line that a peer has read can be written again, it must be taken
// back from the peer's cache. That costs 8 ns a line between cores that share a last-level cache,
// and 30 to 50 ns between cores that do not (other sockets, other core complexes). Stores around
// the caches cost 2.5 ns either way, but then the peer reads memory, 5 ns a line instead of 2. So
// every rank watches what its copies cost: after two slow ones it streams some, then tries again.
// That changes no bit, and every rank decides for itself.
#pragma once

#include <chrono>
#include <cstddef>
#include <string_view>

namespace primitives {

class StagingPace {
 public:
  // "auto", "cache" or "stream"; false for anything else.
  bool set(std::string_view how) {
    fixed_ = how != "auto";
    num_to_stream_ = how == "stream" ? 1 : 0;
    return how == "auto" || how == "cache" || how == "stream";
  }

  // How the next copy goes.
  bool streams() {
    if (num_to_stream_ == 0) return false;
    if (!fixed_) num_to_stream_--;
    return true;
  }

  // How results go that have `nbytes` on all ranks together, where `limit` fill the caches.
  bool streams_results(size_t nbytes, size_t limit) const {
    return fixed_ ? num_to_stream_ > 0 : nbytes >= limit;
  }

  // Whether a copy through the caches is to be timed ...
  bool watches() const { return !fixed_; }
  // ... and how long it took.
  void took(size_t nbytes, std::chrono::nanoseconds time) {
    const bool slow =
        static_cast<double>(time.count()) > kSlowNsPerByte * static_cast<double>(nbytes);
    num_slow_ = slow ? num_slow_ + 1 : 0;
    if (num_slow_ < kNumSlow) return;
    num_slow_ = 0;
    num_to_stream_ = kNumStreamed;
  }

 private:
  static constexpr double kSlowNsPerByte = 24.0 / 64;
  static constexpr int kNumSlow = 2;
  static constexpr int kNumStreamed = 256;

  bool fixed_ = false;
  int num_slow_ = 0;
  int num_to_stream_ = 0;
};

}  // namespace primitives
