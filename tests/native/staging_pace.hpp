// When staging goes around the caches, by its own clock: [Note: staging pace].
#pragma once

#include <chrono>
#include <string>

#include "transport/staging_pace.hpp"
#include "values.hpp"

namespace primitives::native_tests {

// Throws WrongResult.
inline void check_staging_pace() {
  constexpr size_t kNbytes = 64 << 10, kNumLines = kNbytes / 64;
  constexpr std::chrono::nanoseconds kFast{8 * kNumLines}, kSlow{40 * kNumLines};
  auto expect = [](bool right, const std::string& what) {
    if (!right) throw WrongResult("staging pace: " + what);
  };
  auto num_streamed = [](StagingPace& pace) {
    int num = 0;
    while (num < 10000 && pace.streams()) num++;
    return num;
  };

  StagingPace pace;
  for (int i = 0; i < 10; i++) {
    expect(pace.watches() && !pace.streams(), "one slow copy at a time is none");
    pace.took(kNbytes, i % 2 == 0 ? kSlow : kFast);
  }
  for (int i = 0; i < 3; i++) {
    pace.took(kNbytes, kSlow);
    pace.took(kNbytes, kSlow);
    const int num = num_streamed(pace);
    expect(num > 0 && num < 10000, "two slow copies make it stream for a while");
  }
  expect(!pace.streams_results(99, 100) && pace.streams_results(100, 100), "results go by size");

  StagingPace streams, caches, wrong;
  expect(streams.set("stream") && num_streamed(streams) == 10000, "stream is for ever");
  expect(!streams.watches() && streams.streams_results(1, 100), "stream is for all");
  expect(caches.set("cache") && !caches.watches() && !caches.streams(), "cache is for ever");
  expect(!caches.streams_results(100, 100), "cache is for all");
  expect(!wrong.set("fast"), "fast is unknown");
}

}  // namespace primitives::native_tests
