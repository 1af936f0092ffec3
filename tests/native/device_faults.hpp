// What goes wrong on a device: every rank must fail, soon, and in the same way.
#pragma once

#include "transport/group.hpp"

namespace primitives::native_tests {

// The last ones need ranks that are processes.
constexpr int kNumDeviceFaults = 9, kNumDeviceFaultsOfThreads = 7;

// `culprit` is the rank that misbehaves. Throws WrongResult.
void play_device_fault(int kind, int culprit, Meeting& meeting, const GroupOptions& options);

}  // namespace primitives::native_tests
