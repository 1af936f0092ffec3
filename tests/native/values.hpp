// Inputs that every rank can compute for every other, the naive tree, and the comparison of bits.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#include "collectives/collectives.hpp"

namespace primitives::native_tests {

inline uint64_t mix(uint64_t x) {  // splitmix64
  x += 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Element `i` of stream `stream` of case `seed`. Magnitudes are spread, so that a sum in another
// order has other bits.
template <class T>
T value(uint64_t seed, uint64_t stream, uint64_t i) {
  const uint64_t bits = mix(seed ^ mix(stream * 0x10001 + i));
  if constexpr (std::is_floating_point_v<T>) {
    const int mantissa = static_cast<int>(bits & 0xfffff) - 0x80000;
    return static_cast<T>(std::ldexp(static_cast<double>(mantissa), (bits >> 32) % 24 - 20));
  } else {
    return static_cast<T>(bits);
  }
}

template <class T>
T two(ReduceOp op, T a, T b) {
  if constexpr (std::is_floating_point_v<T>) {
    switch (op) {
      case ReduceOp::kProduct:
        return a * b;
      case ReduceOp::kMin:
        return std::isnan(a) || a < b ? a : b;
      case ReduceOp::kMax:
        return std::isnan(a) || a > b ? a : b;
      default:  // sum, avg and premul_sum all add
        return a + b;
    }
  } else {
    using U = std::make_unsigned_t<T>;
    const U x = static_cast<U>(a), y = static_cast<U>(b);
    switch (op) {
      case ReduceOp::kProduct:
        return static_cast<T>(x * static_cast<uint64_t>(y));
      case ReduceOp::kMin:
        return a < b ? a : b;
      case ReduceOp::kMax:
        return a > b ? a : b;
      case ReduceOp::kBand:
        return static_cast<T>(x & y);
      case ReduceOp::kBor:
        return static_cast<T>(x | y);
      case ReduceOp::kBxor:
        return static_cast<T>(x ^ y);
      default:
        return static_cast<T>(x + y);
    }
  }
}

// Adjacent pairs, level by level, an odd last one carried up: the definition, without any
// cleverness.
template <class T>
T naive_tree(ReduceOp op, std::vector<T> level, double factor) {
  if (op == ReduceOp::kPremulSum) {
    for (T& x : level) x = static_cast<T>(x * static_cast<T>(factor));
  }
  const T num_ranks = static_cast<T>(level.size());
  while (level.size() > 1) {
    std::vector<T> next;
    for (size_t i = 0; i + 1 < level.size(); i += 2)
      next.push_back(two(op, level[i], level[i + 1]));
    if (level.size() % 2 == 1) next.push_back(level.back());
    level.swap(next);
  }
  return op == ReduceOp::kAvg ? static_cast<T>(level[0] / num_ranks) : level[0];
}

class WrongResult : public std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class T>
void expect_bits(const T* got, const std::vector<T>& want, const std::string& what) {
  for (size_t i = 0; i < want.size(); i++) {
    if (std::memcmp(got + i, &want[i], sizeof(T)) == 0) continue;
    throw WrongResult(what + ": element " + std::to_string(i) + " of " +
                      std::to_string(want.size()) + " is " + std::to_string(got[i]) + ", not " +
                      std::to_string(want[i]));
  }
}

}  // namespace primitives::native_tests
