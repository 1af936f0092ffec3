// Thread ranks share one mapping of a segment.
//
// Each rank maps the segment for itself. ThreadSanitizer follows virtual addresses, so between two
// mappings of the same memory it would see neither a race nor the synchronisation that prevents
// it. Linked with --wrap=mmap,--wrap=munmap, all maps of one piece of a file are the same
// addresses, and the whole protocol between the ranks is under its eyes.
#include <sys/mman.h>
#include <sys/stat.h>

#include <map>
#include <mutex>
#include <tuple>

extern "C" {
void* __real_mmap(void* at, size_t nbytes, int protection, int flags, int fd, off_t offset);
int __real_munmap(void* at, size_t nbytes);

void* __wrap_mmap(void* at, size_t nbytes, int protection, int flags, int fd, off_t offset);
int __wrap_munmap(void* at, size_t nbytes);
}

namespace {

using Key = std::tuple<dev_t, ino_t, off_t, size_t>;
struct Mapping {
  Key key;
  int num_users;
};

std::mutex mutex;
std::map<void*, Mapping> mappings;

}  // namespace

void* __wrap_mmap(void* at, size_t nbytes, int protection, int flags, int fd, off_t offset) {
  struct stat info;
  if (fd < 0 || (flags & MAP_SHARED) == 0 || at != nullptr || fstat(fd, &info) != 0) {
    return __real_mmap(at, nbytes, protection, flags, fd, offset);
  }
  const std::lock_guard<std::mutex> lock(mutex);
  const Key key{info.st_dev, info.st_ino, offset, nbytes};
  for (auto& [data, mapping] : mappings) {
    if (mapping.key != key) continue;
    mapping.num_users++;
    return data;
  }
  void* data = __real_mmap(at, nbytes, protection, flags, fd, offset);
  if (data != MAP_FAILED) mappings[data] = {key, 1};
  return data;
}

int __wrap_munmap(void* at, size_t nbytes) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = mappings.find(at);
  if (found != mappings.end()) {
    if (--found->second.num_users > 0) return 0;
    mappings.erase(found);
  }
  return __real_munmap(at, nbytes);
}
