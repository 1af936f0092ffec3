// Four vectors that go through every step together: a formula for one number, written for Group,
// becomes four independent chains, interleaved, which hides the latency of each.
#pragma once

#include "canonical/simd.hpp"

namespace primitives::canonical {
namespace {

constexpr int kGroup = 4;

struct IntGroup {
  IVec v[kGroup];
};

struct Group {
  Vec v[kGroup];
};

// step(j) for each vector.
template <class Step>
CANONICAL_FN Group each(Step step) {
  Group result;
#pragma GCC unroll 4
  for (int j = 0; j < kGroup; j++) result.v[j] = step(j);
  return result;
}

CANONICAL_FN Group operator+(const Group& a, const Group& b) {
  return each([&](int j) { return a.v[j] + b.v[j]; });
}
CANONICAL_FN Group operator-(const Group& a, float b) {
  return each([&](int j) { return a.v[j] - b; });
}
CANONICAL_FN Group operator*(const Group& a, float b) {
  return each([&](int j) { return a.v[j] * b; });
}
CANONICAL_FN Group operator*(const Group& a, const Group& b) {
  return each([&](int j) { return a.v[j] * b.v[j]; });
}
CANONICAL_FN Group fma(const Group& a, const Group& b, const Group& c) {
  return each([&](int j) { return fma(a.v[j], b.v[j], c.v[j]); });
}
CANONICAL_FN Group larger_or_second(const Group& a, const Group& b) {
  return each([&](int j) { return larger_or_second(a.v[j], b.v[j]); });
}
CANONICAL_FN Group as_float(const IntGroup& a) {
  return each([&](int j) { return as_float(a.v[j]); });
}
CANONICAL_FN IntGroup as_int(const Group& a) {
  IntGroup result;
#pragma GCC unroll 4
  for (int j = 0; j < kGroup; j++) result.v[j] = as_int(a.v[j]);
  return result;
}
CANONICAL_FN IntGroup operator<<(const IntGroup& a, int bits) {
  IntGroup result;
#pragma GCC unroll 4
  for (int j = 0; j < kGroup; j++) result.v[j] = a.v[j] << bits;
  return result;
}

template <>
CANONICAL_FN Group set<Group>(float x) {
  return each([&](int) { return set<Vec>(x); });
}

// kGroup vectors that follow each other.
template <class T>
CANONICAL_FN Group load_group(const typename T::Storage* p) {
  return each([&](int j) { return load<T>(p + j * kWidth); });
}

}  // namespace
}  // namespace primitives::canonical
