#include "transport/segment.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <random>
#include <utility>

#include "transport/errors.hpp"
#include "transport/process.hpp"

namespace primitives {
namespace {

[[noreturn]] void fail(const std::string& doing, const std::string& path, int error) {
  throw TransportError(Failure::kOther, doing + " " + path + ": " + std::strerror(error));
}

std::string new_name() {
  const ProcessId self = this_process();
  std::random_device random;
  char name[128];
  std::snprintf(name, sizeof name, "primitives-%u-%d-%llu-%08x%08x", getuid(), self.pid,
                static_cast<unsigned long long>(self.start_time), random(), random());
  return name;
}

}  // namespace

Segment Segment::create(const std::string& folder, size_t nbytes, size_t num_mapped,
                        size_t num_committed) {
  Segment segment;
  segment.folder_ = folder;
  segment.name_ = new_name();
  const std::string path = folder + "/" + segment.name_;
  segment.fd_ = ::open(path.c_str(), O_CREAT | O_EXCL | O_RDWR | O_CLOEXEC, 0600);
  if (segment.fd_ < 0) fail("cannot create shared memory", path, errno);
  segment.linked_ = true;
  flock(segment.fd_, LOCK_EX | LOCK_NB);
  if (ftruncate(segment.fd_, static_cast<off_t>(nbytes)) != 0) {
    fail("cannot size shared memory", path, errno);
  }
  segment.nbytes_ = nbytes;
  segment.commit(0, num_committed);
  segment.data_ = segment.map(0, segment.num_mapped_ = num_mapped);
  return segment;
}

Segment Segment::open(const std::string& folder, const std::string& name, size_t num_mapped) {
  Segment segment;
  segment.folder_ = folder;
  segment.name_ = name;
  const std::string path = folder + "/" + name;
  segment.fd_ = ::open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (segment.fd_ < 0) fail("cannot open the group's shared memory", path, errno);
  struct stat info;
  if (fstat(segment.fd_, &info) != 0) fail("cannot read the size of", path, errno);
  segment.nbytes_ = static_cast<size_t>(info.st_size);
  segment.data_ = segment.map(0, segment.num_mapped_ = num_mapped);
  return segment;
}

Segment Segment::anonymous(size_t num_mapped) {
  Segment segment;
  segment.name_ = "(private)";
  segment.data_ = segment.map(0, segment.num_mapped_ = num_mapped);
  return segment;
}

Segment::Segment(Segment&& other) noexcept
    : folder_(std::move(other.folder_)),
      name_(std::move(other.name_)),
      fd_(std::exchange(other.fd_, -1)),
      data_(std::exchange(other.data_, nullptr)),
      nbytes_(other.nbytes_),
      num_mapped_(other.num_mapped_),
      linked_(std::exchange(other.linked_, false)) {}

Segment::~Segment() {
  unlink();
  if (data_ != nullptr) munmap(data_, num_mapped_);
  if (fd_ >= 0) close(fd_);
}

char* Segment::map(size_t offset, size_t nbytes) const {
  const int flags = fd_ < 0 ? MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE : MAP_SHARED;
  const off_t from = fd_ < 0 ? 0 : static_cast<off_t>(offset);
  void* data = mmap(nullptr, nbytes, PROT_READ | PROT_WRITE, flags, fd_, from);
  if (data == MAP_FAILED) fail("cannot map shared memory", name_, errno);
  return static_cast<char*>(data);
}

void Segment::commit(size_t offset, size_t nbytes) {
  if (fd_ < 0) return;
  int error = EINTR;
  while (error == EINTR) {
    error = posix_fallocate(fd_, static_cast<off_t>(offset), static_cast<off_t>(nbytes));
  }
  if (error == 0) return;
  struct statvfs room;
  if (error == ENOSPC && fstatvfs(fd_, &room) == 0) {
    const unsigned long long num_free = 1ull * room.f_bavail * room.f_bsize;
    throw TransportError(Failure::kOther, "shared memory is full: " + folder_ + " has " +
                                              std::to_string(num_free) + " bytes free, but " +
                                              std::to_string(nbytes) + " are needed");
  }
  fail("cannot reserve shared memory in", folder_, error);
}

void Segment::unlink() {
  if (!std::exchange(linked_, false)) return;
  ::unlink((folder_ + "/" + name_).c_str());
  flock(fd_, LOCK_UN);
}

int sweep_segments(const std::string& folder) {
  DIR* entries = opendir(folder.c_str());
  if (entries == nullptr) return 0;
  int num_removed = 0;
  while (const dirent* entry = readdir(entries)) {
    unsigned uid = 0;
    int pid = 0;
    unsigned long long start_time = 0;
    if (std::sscanf(entry->d_name, "primitives-%u-%d-%llu-", &uid, &pid, &start_time) != 3)
      continue;
    if (uid != getuid() || is_alive({pid, start_time})) continue;
    const std::string path = folder + "/" + entry->d_name;
    const int fd = ::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NOFOLLOW);
    if (fd < 0) continue;
    // The owner may live in another pid namespace, where its pid means nothing here: the lock
    // decides.
    if (flock(fd, LOCK_EX | LOCK_NB) == 0 && ::unlink(path.c_str()) == 0) num_removed++;
    close(fd);
  }
  closedir(entries);
  return num_removed;
}

}  // namespace primitives
