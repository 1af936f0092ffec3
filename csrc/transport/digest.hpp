// Digest of a run of bytes: any single changed word changes it.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace primitives {

// Four lanes, each a chain of bijections, so a change in one word cannot be lost. Never 0.
inline uint64_t digest_of(const void* data, size_t nbytes) {
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15ull;
  uint64_t lanes[4] = {1, 2, 3, nbytes};
  const char* at = static_cast<const char*>(data);
  auto mix = [](uint64_t state, uint64_t word) { return std::rotl((state ^ word) * kOdd, 29); };
  for (; nbytes >= 32; nbytes -= 32, at += 32) {
    uint64_t words[4];
    std::memcpy(words, at, 32);
    for (int i = 0; i < 4; i++) lanes[i] = mix(lanes[i], words[i]);
  }
  uint64_t rest[4] = {};
  if (nbytes > 0) std::memcpy(rest, at, nbytes);
  uint64_t digest = 0;
  for (int i = 0; i < 4; i++) digest = mix(digest, mix(lanes[i], rest[i]));
  return digest == 0 ? 1 : digest;
}

}  // namespace primitives
