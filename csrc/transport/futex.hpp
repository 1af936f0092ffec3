// Sleep until a word in shared memory changes.
#pragma once

#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdint>
#include <ctime>

namespace primitives {

// Returns at the latest after `limit`; the caller looks again. True when a signal ended the wait.
inline bool futex_wait(std::atomic<uint32_t>* word, uint32_t seen,
                       std::chrono::milliseconds limit) {
  const timespec time{limit.count() / 1000, (limit.count() % 1000) * 1000000};
  return syscall(SYS_futex, word, FUTEX_WAIT, seen, &time, nullptr, 0) != 0 && errno == EINTR;
}

inline void futex_wake_all(std::atomic<uint32_t>* word) {
  syscall(SYS_futex, word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

}  // namespace primitives
