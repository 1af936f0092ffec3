// Messages between the ranks of different hosts, by an engine that exists (gloo).
#pragma once

#include <cstddef>
#include <memory>
#include <stdexcept>

#include "transport/group.hpp"

namespace primitives {

class WireError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Between two ranks, messages with one tag arrive in the order they were posted. Any thread.
class Wire {
 public:
  class Pending {
   public:
    virtual ~Pending() = default;  // gives the memory back, done or not
    // The rank it came from (a receive). Throws WireError.
    virtual int wait(Clock::time_point deadline) = 0;
  };
  using PendingPtr = std::unique_ptr<Pending>;

  virtual ~Wire() = default;
  virtual PendingPtr send(const void* data, size_t nbytes, int dst, int tag) = 0;
  // `src` may be kAnySource.
  virtual PendingPtr recv(void* data, size_t nbytes, int src, int tag) = 0;
  // Waits end with an error, now and from now on.
  virtual void abort() = 0;
  // Hangs up: peers that wait for this rank get an error.
  virtual void close() = 0;
};

}  // namespace primitives
