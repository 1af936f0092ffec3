// Which process is it, and is it still there? A pid alone can be reused; pid and start time cannot.
#pragma once

#include <cstdint>
#include <string>

namespace primitives {

struct ProcessId {
  int32_t pid;
  uint64_t start_time;  // clock ticks since boot
};

ProcessId this_process();

// How often the line of processes that ends in this one has forked: a child finds another number
// than its parent left in a variable. Cheaper than a pid, which is a system call.
uint32_t num_forks();

// The state letter of /proc/PID/stat ('T' is stopped), 0 when it has ended (a zombie has ended), or
// '?' when that cannot be read, as for want of file descriptors: it may well be alive.
char process_state(ProcessId process);

inline bool is_alive(ProcessId process) { return process_state(process) != 0; }

// Threads that run or could, on the whole machine; a large number when that cannot be read.
int num_runnable();

// Equal for processes of one kernel that see each other by their pids.
uint64_t pid_space();

// Equal for all processes of one running kernel.
std::string boot_id();

}  // namespace primitives
