#ifdef PRIMITIVES_CUDA
#include "transport/device_sharing.hpp"

#include <fcntl.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "transport/device_virtual.h"

#ifndef SYS_pidfd_open  // of Linux 5.3 and 5.6; older headers lack them
#define SYS_pidfd_open 434
#endif
#ifndef SYS_pidfd_getfd
#define SYS_pidfd_getfd 438
#endif

namespace primitives {
namespace {

struct Mapping {
  size_t nbytes;
  int fd;  // by which others find it; -1: there is none yet, or it is another process's
};

// Of this process, made by the virtual memory API.
class Mappings {
 public:
  void add(char* memory, Mapping mapping) {
    const std::lock_guard<std::mutex> lock(mutex_);
    all_[memory] = mapping;
  }
  // {0, -1}: there is none.
  Mapping find(char* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = all_.find(memory);
    return found == all_.end() ? Mapping{0, -1} : found->second;
  }
  Mapping take(char* memory) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto taken = all_.extract(memory);
    return taken.empty() ? Mapping{0, -1} : taken.mapped();
  }

 private:
  std::mutex mutex_;
  std::map<char*, Mapping> all_;
};

Mappings& mappings() {
  static auto* of_process = new Mappings;  // tensors may be freed at its very end
  return *of_process;
}

bool refuse(primitives_cuda_error* error, const char* what, const char* why) {
  std::snprintf(error->text, sizeof error->text, "%s: %s", what, why);
  return false;
}

// Unmaps it, if the virtual memory API has made it.
bool close_virtual(int device, char* memory) {
  const Mapping mapping = mappings().take(memory);
  if (mapping.nbytes == 0) return false;
  primitives_cuda_virtual_close(device, memory, mapping.nbytes);
  if (mapping.fd >= 0) close(mapping.fd);
  return true;
}

// A descriptor of another process as one of this process, or -1.
int fetch(const DeviceHandle& handle) {
  const auto process = static_cast<int>(syscall(SYS_pidfd_open, handle.pid, 0));
  if (process < 0) return -1;
  const auto fd = static_cast<int>(syscall(SYS_pidfd_getfd, process, handle.fd, 0));
  const int why = errno;
  close(process);
  errno = why;
  return fd;
}

}  // namespace

bool allocate_shared(int device, size_t nbytes, char** memory, primitives_cuda_error* error) {
  const char* const way = std::getenv("PRIMITIVES_CUDA_MEMORY");
  if (way == nullptr || *way == '\0' || std::strcmp(way, "ipc") == 0) {
    return primitives_cuda_allocate(device, nbytes, memory, error) == 0;
  }
  if (std::strcmp(way, "virtual") != 0) {
    return refuse(error, "PRIMITIVES_CUDA_MEMORY: expected ipc or virtual, got", way);
  }
  size_t unit = 0;
  if (primitives_cuda_virtual_unit(device, &unit, error) != 0) return false;
  nbytes = (nbytes + unit - 1) / unit * unit;
  if (primitives_cuda_virtual_create(device, nbytes, memory, error) != 0) return false;
  mappings().add(*memory, {nbytes, -1});
  return true;
}

bool export_shared(int device, char* memory, DeviceHandle* handle, primitives_cuda_error* error) {
  Mapping mapping = mappings().find(memory);
  *handle = {};
  if (mapping.nbytes == 0) return primitives_cuda_export(device, memory, &handle->ipc, error) == 0;
  if (mapping.fd < 0) {
    if (primitives_cuda_virtual_export(device, memory, &mapping.fd, error) != 0) return false;
    fcntl(mapping.fd, F_SETFD, FD_CLOEXEC);
    mappings().add(memory, mapping);
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY);  // Yama, where it is on, lets only parents fetch
  }
  *handle = {true, getpid(), mapping.fd, mapping.nbytes, {}};
  return true;
}

void free_shared(int device, char* memory) {
  if (!close_virtual(device, memory)) primitives_cuda_free(device, memory);
}

bool map_shared(int device, const DeviceHandle& handle, char** memory,
                primitives_cuda_error* error) {
  if (!handle.is_virtual) return primitives_cuda_map(device, &handle.ipc, memory, error) == 0;
  const int fd = fetch(handle);
  if (fd < 0) {
    const char* const why = std::strerror(errno);
    const std::string what = "fetching a descriptor of process " + std::to_string(handle.pid);
    return refuse(error, what.c_str(), why);
  }
  const int status = primitives_cuda_virtual_open(device, fd, handle.nbytes, memory, error);
  close(fd);
  if (status == 0) mappings().add(*memory, {handle.nbytes, -1});
  return status == 0;
}

void unmap_shared(int device, char* memory) {
  if (!close_virtual(device, memory)) primitives_cuda_unmap(device, memory);
}

}  // namespace primitives
#endif
