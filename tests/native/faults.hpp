// What must be an error on every rank: each kind, on a fresh group.
#pragma once

#include "transport/group.hpp"

namespace primitives::native_tests {

constexpr int kNumFaults = 7;

// Plays fault `kind` with `culprit` as the rank that does wrong. Throws WrongResult when this rank
// got another outcome than it must.
void play_fault(int kind, int culprit, Meeting& meeting, const GroupOptions& options);

}  // namespace primitives::native_tests
