// Random collectives and messages, each checked against its definition.
#pragma once

#include <cstdint>
#include <random>

#include "collectives/collectives.hpp"
#include "transport/group.hpp"
#include "transport/mailbox.hpp"

namespace primitives::native_tests {

// What one rank works with. All ranks draw the same numbers in the same order, so each knows every
// other's part of a case.
struct Player {
  Group& group;
  Mailbox& mailbox;
  std::mt19937_64 random;

  uint64_t draw(uint64_t below) { return random() % below; }
};

// One random collective, or a round of messages. Throws WrongResult.
void play_case(Player& player);

}  // namespace primitives::native_tests
