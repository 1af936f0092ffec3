// all_reduce, reduce_scatter and reduce: the tree of [Note: tree] over the ranks' staged inputs.
#include "collectives/chunks.hpp"
#include "collectives/collectives.hpp"
#include "collectives/symmetric.hpp"

namespace primitives {
namespace {

constexpr size_t kPipelineNbytes = 256 << 10;  // half a slot: the other half holds the sums

// This rank's part of a chunk, in whole cache lines.
struct Slice {
  size_t begin, end;
};

Slice slice_of(size_t nbytes, int rank, int n) {
  const size_t part = (ceil_div(nbytes, n) + 63) & ~size_t{63};
  const size_t begin = std::min(nbytes, part * rank);
  return {begin, std::min(nbytes, begin + part)};
}

// Small: every rank sums everything; the same tree, so the same bits everywhere.
void all_reduce_small(Group& group, char* data, size_t nbytes, const Reduction& reduction) {
  const int n = group.world_size(), me = group.rank();
  stage(group, group.slot(me, group.epoch() + 1), data, nbytes);
  publish(group, group.epoch() + 1, n, data, nbytes, 0);
  group.meet();
  std::vector<const void*> sources(n);
  for (int r = 0; r < n; r++) {
    sources[r] = r == me ? data : group.slot(r, group.epoch());
    verify(group, group.epoch(), r, n, sources[r], nbytes);
  }
  reduction.kernel(sources.data(), n, data, nbytes / reduction.itemsize, reduction.factor, false);
}

// Pipeline: in step s, chunk s goes in, this rank sums its slice of chunk s - 1, and the sums of
// chunk s - 2 come out. A rank's own slice never passes through staging on its way in.
void all_reduce_pipeline(Group& group, char* data, size_t nbytes, const Reduction& reduction) {
  const int n = group.world_size(), me = group.rank();
  size_t chunk = kPipelineNbytes;
  if (nbytes > chunk / 2 && nbytes < 2 * chunk) chunk = (ceil_div(nbytes, 2) + 63) & ~size_t{63};
  const size_t num_chunks = ceil_div(nbytes, chunk);
  const uint32_t first = group.epoch() + 1;  // the barrier that publishes chunk 0
  std::vector<const void*> sources(n);
  for (size_t step = 0; step < num_chunks + 2; step++) {
    if (step >= 2) {
      const size_t i = step - 2;
      char* at = data + i * chunk;
      const uint32_t published = first + static_cast<uint32_t>(i) + 1;
      for (int j = 1; j < n; j++) {
        const int r = (me + j) % n;
        const Slice slice = slice_of(chunk_nbytes(nbytes, i, chunk), r, n);
        copy(at + slice.begin, group.slot(r, published) + kPipelineNbytes + slice.begin,
             slice.end - slice.begin, false);
        verify(group, published, r, n, at + slice.begin, slice.end - slice.begin);
      }
    }
    if (step < num_chunks) {
      const size_t size = chunk_nbytes(nbytes, step, chunk);
      const Slice mine = slice_of(size, me, n);
      char* staged = group.slot(me, first + static_cast<uint32_t>(step));
      stage(group, staged, data + step * chunk, mine.begin);
      stage(group, staged + mine.end, data + step * chunk + mine.end, size - mine.end);
      for (int r = 0; group.checked() && r < n; r++) {
        const Slice slice = slice_of(size, r, n);
        const size_t at = step * chunk + slice.begin;
        publish(group, first + static_cast<uint32_t>(step), r, data + at, slice.end - slice.begin,
                at);
      }
    }
    if (step >= 1 && step - 1 < num_chunks) {
      const size_t i = step - 1;
      const Slice mine = slice_of(chunk_nbytes(nbytes, i, chunk), me, n);
      if (mine.end > mine.begin) {
        const uint32_t epoch = first + static_cast<uint32_t>(i);
        char* own = data + i * chunk + mine.begin;
        const size_t size = mine.end - mine.begin;
        for (int r = 0; r < n; r++) {
          sources[r] = r == me ? own : group.slot(r, epoch) + mine.begin;
          verify(group, epoch, r, me, sources[r], size);
        }
        reduction.kernel(sources.data(), n, own, size / reduction.itemsize, reduction.factor,
                         false);
        stage(group, group.slot(me, epoch + 1) + kPipelineNbytes + mine.begin, own, size);
        publish(group, epoch + 1, n, own, size, i * chunk + mine.begin);
      }
    }
    if (step == 0) {
      group.meet();
    } else if (step <= num_chunks) {
      group.barrier();
    }
  }
}

}  // namespace

void all_reduce(Group& group, const Call& call, void* data, size_t nbytes,
                const Reduction& reduction, Milliseconds timeout) {
  if (symmetric::all_reduce(group, call, data, nbytes, reduction, timeout)) return;
  group.start(call, nullptr, nullptr, timeout);
  if (nbytes <= kSmallNbytes || group.world_size() == 1) {
    if (group.world_size() == 1) {
      const void* source = data;
      group.meet();
      reduction.kernel(&source, 1, data, nbytes / reduction.itemsize, reduction.factor, false);
    } else {
      all_reduce_small(group, static_cast<char*>(data), nbytes, reduction);
    }
  } else {
    all_reduce_pipeline(group, static_cast<char*>(data), nbytes, reduction);
  }
  group.finish();
}

void reduce_scatter(Group& group, const Call& call, const std::vector<Part>& in, void* out,
                    const Reduction& reduction, Milliseconds timeout) {
  if (symmetric::reduce_scatter(group, call, in, out, reduction, timeout)) return;
  const int n = group.world_size(), me = group.rank();
  const size_t block = block_nbytes(n), out_nbytes = in[me].nbytes;
  const bool stream = around_caches(group, out_nbytes);
  std::vector<uint64_t> send(n), recv(n, out_nbytes);
  size_t longest = 0;
  for (int r = 0; r < n; r++) {
    send[r] = in[r].nbytes;
    longest = std::max(longest, in[r].nbytes);
  }
  const size_t stride = block_stride(call, longest, block);
  std::vector<const void*> sources(n);
  const size_t num_chunks = std::max<size_t>(1, ceil_div(longest, block));
  group.start(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout);
  for (size_t i = 0; i < num_chunks; i++) {
    const size_t at = i * block;
    for (int r = 0; r < n; r++) {
      if (r == me) continue;
      const char* mine = static_cast<const char*>(in[r].data) + at;
      const size_t size = chunk_nbytes(in[r].nbytes, i, block);
      stage(group, group.slot(me, group.epoch() + 1) + r * stride, mine, size);
      publish(group, group.epoch() + 1, r, mine, size, at);
    }
    i == 0 ? group.meet() : group.barrier();
    const size_t nbytes = chunk_nbytes(out_nbytes, i, block);
    for (int r = 0; r < n; r++) {
      sources[r] = r == me ? static_cast<const char*>(in[me].data) + at
                           : group.slot(r, group.epoch()) + me * stride;
      verify(group, group.epoch(), r, me, sources[r], nbytes);
    }
    if (nbytes > 0) {
      reduction.kernel(sources.data(), n, static_cast<char*>(out) + at, nbytes / reduction.itemsize,
                       reduction.factor, stream);
    }
  }
  if (stream) stream_fence();
  group.finish();
}

void reduce(Group& group, const Call& call, void* data, size_t nbytes, const Reduction& reduction,
            Milliseconds timeout) {
  const int n = group.world_size(), me = group.rank();
  std::vector<const void*> sources(n);
  const size_t num_chunks = std::max<size_t>(1, ceil_div(nbytes, kChunkNbytes));
  group.start(call, nullptr, nullptr, timeout);
  for (size_t i = 0; i < num_chunks; i++) {
    char* at = static_cast<char*>(data) + i * kChunkNbytes;
    const size_t size = chunk_nbytes(nbytes, i, kChunkNbytes);
    if (me != call.root) {
      stage(group, group.slot(me, group.epoch() + 1), at, size);
      publish(group, group.epoch() + 1, call.root, at, size, i * kChunkNbytes);
    }
    i == 0 ? group.meet() : group.barrier();
    if (me != call.root || size == 0) continue;
    for (int r = 0; r < n; r++) {
      sources[r] = r == me ? at : group.slot(r, group.epoch());
      verify(group, group.epoch(), r, me, sources[r], size);
    }
    reduction.kernel(sources.data(), n, at, size / reduction.itemsize, reduction.factor, false);
  }
  group.finish();
}

}  // namespace primitives
