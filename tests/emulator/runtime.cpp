#include "emulator/runtime.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <map>
#include <string>
#include <utility>

#include "emulator/collective_kernel.hpp"
#include "transport/device_virtual.h"

namespace emulator {
namespace {

using namespace primitives::cuda;

constexpr int kLanes = 8;

// A machine of [Note: device code] that is the calling thread.
struct HostThread {
  int num_lanes() const { return kLanes; }
  template <class F>
  void each_lane(F f) {
    for (int lane = 0; lane < kLanes; lane++) f(lane);
  }
  template <class F>
  bool all(F f) {
    bool result = true;
    for (int lane = 0; lane < kLanes; lane++) result = f(lane) && result;
    return result;
  }
  void sync() {}
  template <class T>
  T load(const T* at) {
    return *at;
  }
  template <class T>
  void store(T* at, T value) {
    *at = value;
  }
  template <class T>
  T acquire(const T* at) {
    return __atomic_load_n(at, __ATOMIC_ACQUIRE);
  }
  template <class T>
  void release(T* at, T value) {
    __atomic_store_n(at, value, __ATOMIC_RELEASE);
  }
  bool claim(uint32_t* at) {
    uint32_t none = 0;
    return __atomic_compare_exchange_n(at, &none, 1, false, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
  }
  uint32_t count(uint32_t* at) { return __atomic_fetch_add(at, 1, __ATOMIC_ACQ_REL); }
  uint64_t now_ns() const {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
  }
  void pause() { usleep(20); }
};

enum class Kind { kPlain, kIpcMapping, kVirtual };

struct Allocation {
  size_t nbytes;
  int fd;  // by which others find it
  Kind kind;
};

struct Event {
  Stream* stream = nullptr;
  uint64_t number = 0;

  void wait() const {
    if (stream != nullptr) stream->wait_for(number);
  }
};

std::mutex mutex;                         // of what follows
std::map<char*, Allocation> allocations;  // own and mapped memory
thread_local std::string failing;         // the call that is to fail

int refuse(const char* text, primitives_cuda_error* error) {
  std::snprintf(error->text, sizeof error->text, "%s", text);
  return -1;
}

bool fails(const char* call) {
  if (failing != call) return false;
  failing.clear();
  return true;
}

char* map_file(int fd, size_t nbytes, Kind kind) {
  void* at = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (at == MAP_FAILED) return nullptr;
  const std::lock_guard<std::mutex> lock(mutex);
  allocations[static_cast<char*>(at)] = {nbytes, fd, kind};
  return static_cast<char*>(at);
}

// What was made otherwise, or freed before, ends the process.
Allocation& allocation(char* memory, Kind kind) {
  const auto found = allocations.find(memory);
  if (found == allocations.end() || found->second.kind != kind) std::abort();
  return found->second;
}

void unmap(char* memory, Kind kind) {
  const std::lock_guard<std::mutex> lock(mutex);
  allocation(memory, kind);
  const auto found = allocations.find(memory);
  munmap(memory, found->second.nbytes);
  close(found->second.fd);
  allocations.erase(found);
}

int make(size_t nbytes, Kind kind, char** memory, primitives_cuda_error* error) {
  if (fails("allocate")) return refuse("out of memory", error);
  const int fd = memfd_create("emulated device", 0);
  if (fd < 0 || ftruncate(fd, static_cast<off_t>(nbytes)) != 0) return refuse("no file", error);
  *memory = map_file(fd, nbytes, kind);
  return *memory == nullptr ? refuse("no memory", error) : 0;
}

}  // namespace

void fail_next(const char* call) { failing = call; }

Stream& legacy_stream() {
  static auto* stream = new Stream;  // till the end of the process
  return *stream;
}

Stream& stream_of(void* handle) {
  return handle == reinterpret_cast<void*>(1) ? legacy_stream() : *static_cast<Stream*>(handle);
}

Stream::Stream() : thread_([this] { loop(); }) {}

Stream::~Stream() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
  }
  changed_.notify_all();
  thread_.join();
}

void Stream::launch(std::function<void()> kernel) {
  const std::lock_guard<std::mutex> lock(mutex_);
  kernels_.push_back(std::move(kernel));
  num_launched_++;
  changed_.notify_all();
}

uint64_t Stream::num_launched() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_launched_;
}

uint64_t Stream::num_ended() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return num_ended_;
}

void Stream::wait_for(uint64_t number) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [&] { return num_ended_ >= number; });
}

void Stream::loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return stopping_ || !kernels_.empty(); });
    if (kernels_.empty()) return;
    const auto kernel = std::move(kernels_.front());
    kernels_.pop_front();
    lock.unlock();
    kernel();
    lock.lock();
    num_ended_++;
    changed_.notify_all();
  }
}

}  // namespace emulator

using namespace emulator;

int primitives_cuda_device_of(const void*, primitives_cuda_error*) { return 0; }

int primitives_cuda_exchange_device(int) { return 0; }

int primitives_cuda_gpu_of(int, primitives_cuda_gpu* gpu, primitives_cuda_error*) {
  std::memset(gpu->uuid, 7, sizeof gpu->uuid);
  gpu->num_multiprocessors = 132;
  return 0;
}

int primitives_cuda_allocate(int, size_t nbytes, char** memory, primitives_cuda_error* error) {
  return make(nbytes, Kind::kPlain, memory, error);
}

int primitives_cuda_export(int, char* memory, primitives_cuda_handle* handle,
                           primitives_cuda_error* error) {
  if (fails("export")) return refuse("cannot be shared", error);
  const std::lock_guard<std::mutex> lock(mutex);
  const Allocation& of = allocation(memory, Kind::kPlain);
  std::snprintf(reinterpret_cast<char*>(handle->bytes), sizeof handle->bytes, "%zu /proc/%d/fd/%d",
                of.nbytes, getpid(), of.fd);
  return 0;
}

void primitives_cuda_free(int, char* memory) { unmap(memory, Kind::kPlain); }

int primitives_cuda_clear(int, char* memory, size_t nbytes, primitives_cuda_error*) {
  std::memset(memory, 0, nbytes);
  return 0;
}

int primitives_cuda_map(int, const primitives_cuda_handle* handle, char** memory,
                        primitives_cuda_error* error) {
  if (fails("map")) return refuse("cannot be opened", error);
  size_t nbytes;
  char path[64];
  if (std::sscanf(reinterpret_cast<const char*>(handle->bytes), "%zu %63s", &nbytes, path) != 2) {
    return refuse("not a handle", error);
  }
  const int fd = open(path, O_RDWR);
  if (fd < 0) return refuse("no such memory", error);
  *memory = map_file(fd, nbytes, Kind::kIpcMapping);
  return *memory == nullptr ? refuse("no memory", error) : 0;
}

void primitives_cuda_unmap(int, char* memory) { unmap(memory, Kind::kIpcMapping); }

int primitives_cuda_virtual_unit(int, size_t* nbytes, primitives_cuda_error*) {
  *nbytes = 2 << 20;
  return 0;
}

int primitives_cuda_virtual_create(int, size_t nbytes, char** memory,
                                   primitives_cuda_error* error) {
  if (nbytes % (2 << 20) != 0) return refuse("no multiple of the unit", error);
  return make(nbytes, Kind::kVirtual, memory, error);
}

int primitives_cuda_virtual_export(int, char* memory, int* fd, primitives_cuda_error* error) {
  if (fails("export")) return refuse("cannot be shared", error);
  const std::lock_guard<std::mutex> lock(mutex);
  *fd = dup(allocation(memory, Kind::kVirtual).fd);
  return 0;
}

int primitives_cuda_virtual_open(int, int fd, size_t nbytes, char** memory,
                                 primitives_cuda_error* error) {
  if (fails("map")) return refuse("cannot be opened", error);
  *memory = map_file(dup(fd), nbytes, Kind::kVirtual);
  return *memory == nullptr ? refuse("no memory", error) : 0;
}

void primitives_cuda_virtual_close(int, char* memory, size_t nbytes) {
  if (allocation(memory, Kind::kVirtual).nbytes != nbytes) std::abort();
  unmap(memory, Kind::kVirtual);
}

int primitives_cuda_allocate_pinned(int, size_t nbytes, void** memory, primitives_cuda_error*) {
  *memory = std::calloc(1, nbytes);
  return 0;
}

void primitives_cuda_free_pinned(int, void* memory) { std::free(memory); }

int primitives_cuda_make_event(int, void** event, primitives_cuda_error*) {
  *event = new Event;
  return 0;
}

void primitives_cuda_destroy_event(int, void* event) { delete static_cast<Event*>(event); }

int primitives_cuda_synchronize(int, void* event, primitives_cuda_error*) {
  static_cast<Event*>(event)->wait();
  return 0;
}

int primitives_cuda_record(int, void* event, void* stream, primitives_cuda_error*) {
  Stream& on = stream_of(stream);
  *static_cast<Event*>(event) = {&on, on.num_launched()};
  return 0;
}

int primitives_cuda_wait(int, void* stream, void* event, primitives_cuda_error*) {
  stream_of(stream).launch([before = *static_cast<Event*>(event)] { before.wait(); });
  return 0;
}

int primitives_cuda_copy(int, void* to, const void* from, size_t nbytes, void* stream,
                         primitives_cuda_error* error) {
  if (fails("copy")) return refuse("cannot be copied", error);
  stream_of(stream).launch([=] { std::memcpy(to, from, nbytes); });
  return 0;
}

int primitives_cuda_synchronize_stream(int, void* stream, primitives_cuda_error*) {
  Stream& on = stream_of(stream);
  on.wait_for(on.num_launched());
  return 0;
}

size_t primitives_cuda_segment_nbytes(uint32_t slot_nbytes) { return segment_nbytes(slot_nbytes); }

int primitives_cuda_max_blocks(int num_multiprocessors, int ranks_on_device, int num_groups) {
  return max_blocks(num_multiprocessors, ranks_on_device, num_groups);
}

int primitives_cuda_load(int, primitives_cuda_error*) { return 0; }

int primitives_cuda_is_captured(int, void* stream, primitives_cuda_error*) {
  return stream_of(stream).captured;
}

int primitives_cuda_launch(int, const primitives_cuda_ranks* ranks, primitives_cuda_call call,
                           void* stream, void* last, primitives_cuda_error* error) {
  if (const char* refused = prepare(*ranks, &call); *refused != 0) return refuse(refused, error);
  Stream& on = stream_of(stream);
  Event& event = *static_cast<Event*>(last);
  on.launch([seen = *ranks, call, before = event] {
    before.wait();
    const Many& many = call.many;
    if (many.upload != nullptr) std::memcpy(many.table, many.upload, many.upload_nbytes);
    HostThread thread;
    for (int block = 0; block < call.num_blocks; block++) run_block(thread, block, seen, call);
  });
  event = {&on, on.num_launched()};
  return 0;
}
