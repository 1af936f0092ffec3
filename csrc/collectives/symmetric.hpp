// The collectives on symmetric memory: no staging, each rank reads or writes its peers' tensors in
// place. See [Note: symmetric] in transport/group.hpp.
//
// Each returns false when this call must be staged: too small to pay, or buffers elsewhere on some
// rank. Same arguments, same bits as in collectives.hpp.
//
// What must be symmetric on every rank, steps:
//   all_gather      the outputs (each rank writes its shard to all: one read, n writes), or else
//                   the inputs (each rank reads all)
//   reduce_scatter  the inputs; each rank sums its part of all
//   all_reduce      the data; each rank sums its slice of all and writes it to all
//   all_to_all      the inputs; each rank reads its part of all
//   broadcast       the data; each rank reads the root's
#pragma once

#include "collectives/collectives.hpp"

namespace primitives::symmetric {

bool all_gather(Group& group, const Call& call, const void* in, size_t in_nbytes,
                const std::vector<Part>& out, Milliseconds timeout);
bool reduce_scatter(Group& group, const Call& call, const std::vector<Part>& in, void* out,
                    const Reduction& reduction, Milliseconds timeout);
bool all_reduce(Group& group, const Call& call, void* data, size_t nbytes,
                const Reduction& reduction, Milliseconds timeout);
bool all_to_all(Group& group, const Call& call, const std::vector<Part>& in,
                const std::vector<Part>& out, Milliseconds timeout);
bool broadcast(Group& group, const Call& call, void* data, size_t nbytes, Milliseconds timeout);

// Memory of `nbytes` in this rank's heap, on every rank or on none: throws TransportError on all
// ranks when one has no room.
void* empty(Group& group, const Call& call, size_t nbytes, Milliseconds timeout);
std::string no_room(const std::string& rank, size_t nbytes);  // what it then says

}  // namespace primitives::symmetric
