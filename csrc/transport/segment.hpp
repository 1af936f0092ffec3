// One piece of shared memory: a file in /dev/shm that is unlinked as soon as every rank has mapped
// it, so that nothing is left whatever kills a process.
//
// What dies between create and unlink leaves a file behind; its name holds uid, pid and start time
// of the owner, who also holds a file lock, and the next start sweeps it.
#pragma once

#include <cstddef>
#include <string>

namespace primitives {

class Segment {
 public:
  // Memory of `nbytes`, of which the first `num_mapped` are mapped and the first `num_committed`
  // backed by pages at once; the rest only by map() and commit(). Throws TransportError when
  // `folder` has too little room: never a SIGBUS later.
  static Segment create(const std::string& folder, size_t nbytes, size_t num_mapped,
                        size_t num_committed);
  static Segment open(const std::string& folder, const std::string& name, size_t num_mapped);
  // Memory of this process only, for a group of one rank.
  static Segment anonymous(size_t num_mapped);

  Segment(Segment&& other) noexcept;
  Segment(const Segment&) = delete;
  Segment& operator=(const Segment&) = delete;
  ~Segment();

  // Maps a further range, whose bytes may be touched once they are committed; the caller unmaps it.
  char* map(size_t offset, size_t nbytes) const;
  // Backs a range of bytes by pages. Throws TransportError when there is no room.
  void commit(size_t offset, size_t nbytes);
  void unlink();

  char* data() const { return data_; }
  size_t nbytes() const { return nbytes_; }
  const std::string& name() const { return name_; }

 private:
  Segment() = default;

  std::string folder_, name_;
  int fd_ = -1;
  char* data_ = nullptr;
  size_t nbytes_ = 0, num_mapped_ = 0;
  bool linked_ = false;  // this process created the file and has not removed it yet
};

// Removes segments whose owner has ended. Returns how many.
int sweep_segments(const std::string& folder);

}  // namespace primitives
