// Random collectives and messages, each checked against its definition.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <random>

#include "collectives/transport.hpp"

namespace primitives::native_tests {

// What one rank works with. All ranks draw the same numbers in the same order, so each knows every
// other's part of a case.
struct Player {
  Transport& transport;
  // Waits until the results of the last collective are there.
  std::function<void()> settle;
  bool sends_messages;
  // Symmetric memory; empty: there is none.
  std::function<std::shared_ptr<void>(size_t nbytes)> allocate;
  std::mt19937_64 random;

  uint64_t draw(uint64_t below) { return random() % below; }
};

// One random collective, or a round of messages. Throws WrongResult.
void play_case(Player& player);
// Some random collectives on lists of tensors; on a device one is called before another has run.
void play_fused_cases(Player& player);

}  // namespace primitives::native_tests
