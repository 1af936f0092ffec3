#include "transport/process.hpp"

#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstring>

namespace primitives {
namespace {

// Reads state and start time of a pid; false, and errno, when that is impossible.
bool read_stat(int32_t pid, char* state, uint64_t* start_time) {
  char path[64], text[1024];
  std::snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const ssize_t nbytes = read(fd, text, sizeof text - 1);
  const int error = nbytes < 0 ? errno : 0;
  close(fd);
  errno = error;
  if (nbytes <= 0) return false;
  text[nbytes] = '\0';
  // Field 2 is "(name)" and may hold anything, so count from the last parenthesis: field 3 is the
  // state, field 22 the start time.
  const char* field = std::strrchr(text, ')');
  if (field == nullptr || field[1] == '\0') return false;
  field += 2;
  *state = *field;
  for (int i = 3; i < 22; i++) {
    field = std::strchr(field, ' ');
    if (field == nullptr) return false;
    field++;
  }
  unsigned long long ticks = 0;
  if (std::sscanf(field, "%llu", &ticks) != 1) return false;
  *start_time = ticks;
  return true;
}

std::atomic<uint32_t> forks{0};
[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });

}  // namespace

uint32_t num_forks() { return forks.load(std::memory_order_relaxed); }

ProcessId this_process() {
  char state = 0;
  ProcessId self{getpid(), 0};
  read_stat(self.pid, &state, &self.start_time);
  return self;
}

char process_state(ProcessId process) {
  char state = 0;
  uint64_t start_time = 0;
  if (!read_stat(process.pid, &state, &start_time)) {
    return errno == ENOENT || errno == ESRCH ? 0 : '?';
  }
  if (start_time != process.start_time) return 0;
  return state == 'Z' || state == 'X' ? 0 : state;
}

int num_runnable() {
  constexpr int kUnknown = 1 << 30;
  char text[64] = "";  // "0.20 0.18 0.12 1/80 11206"
  const int fd = open("/proc/loadavg", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return kUnknown;
  const ssize_t nbytes = read(fd, text, sizeof text - 1);
  close(fd);
  int found = 0;
  return nbytes > 0 && std::sscanf(text, "%*s %*s %*s %d/", &found) == 1 ? found : kUnknown;
}

uint64_t pid_space() {
  struct stat info;
  return stat("/proc/self/ns/pid", &info) == 0 ? info.st_ino : 0;
}

std::string boot_id() {
  char text[64] = "";
  const int fd = open("/proc/sys/kernel/random/boot_id", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return "unknown";
  const ssize_t nbytes = read(fd, text, sizeof text - 1);
  close(fd);
  return std::string(text, nbytes > 36 ? 36 : nbytes < 0 ? 0 : nbytes);
}

}  // namespace primitives
