// Errors of the transport. Wrong arguments are std::invalid_argument.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace primitives {

// Why a group cannot be used any more. The values live in shared memory: every rank reports the
// same.
enum class Failure : uint32_t {
  kNone = 0,
  kOther = 1,
  kTimeout = 2,
  kPeerLost = 3,
  kMismatch = 4,
  kOtherHost = 5,  // the ranks do not share memory
};

class TransportError : public std::runtime_error {
 public:
  TransportError(Failure failure, const std::string& what)
      : std::runtime_error(what), failure(failure) {}

  const Failure failure;
};

}  // namespace primitives
