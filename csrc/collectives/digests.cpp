// Checked mode: the bytes that were read are the bytes that were meant. See [Note: digests].
#include <string>

#include "collectives/chunks.hpp"
#include "transport/digest.hpp"

namespace primitives {

void publish_digest(Group& group, uint32_t epoch, int reader, const void* data, size_t nbytes,
                    size_t at) {
  group.digest(group.rank(), epoch, reader) = {digest_of(data, nbytes), at, nbytes};
}

void verify_digest(Group& group, uint32_t epoch, int writer, int reader, const void* data,
                   size_t nbytes) {
  if (writer == group.rank() || nbytes == 0) return;  // own bytes never pass through staging
  const Digest meant = group.digest(writer, epoch, reader);
  if (meant.nbytes == nbytes && meant.value == digest_of(data, nbytes)) return;
  group.fail(Failure::kOther, group.here() + " read other bytes than " + group.named(writer) +
                                  " wrote, in bytes [" + std::to_string(meant.at) + ", " +
                                  std::to_string(meant.at + nbytes) + ") of its buffer");
}

}  // namespace primitives
