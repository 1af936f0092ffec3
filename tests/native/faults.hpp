// What must be an error on every rank: each kind, on a fresh group.
#pragma once

#include <string>

#include "transport/group.hpp"
#include "values.hpp"

namespace primitives::native_tests {

constexpr int kNumFaults = 7;

// Plays fault `kind` with `culprit` as the rank that does wrong. Throws WrongResult when this rank
// got another outcome than it must.
void play_fault(int kind, int culprit, Meeting& meeting, const GroupOptions& options);

// Throws WrongResult unless body() fails in the way that is expected.
template <class F>
void expect_failure(Failure expected, const std::string& fault, F body) {
  try {
    body();
  } catch (const TransportError& error) {
    if (error.failure == expected) return;
    throw WrongResult(fault + ": got another failure: " + error.what());
  }
  throw WrongResult(fault + ": no error");
}

}  // namespace primitives::native_tests
