#include "collectives/fused.hpp"

#include <cmath>
#include <limits>

#include "collectives/chunks.hpp"

namespace primitives {

Cuts::Cuts(int world_size, const std::vector<int64_t>& numels)
    : num_tensors_(numels.size() / world_size),
      world_size_(world_size),
      begins_(numels.size()),
      starts_(numels.size() + world_size) {
  for (size_t t = 0; t < num_tensors_; t++) {
    size_t begin = 0;
    for (int r = 0; r < world_size; r++) {
      const size_t numel = numels[t * world_size + r];
      begins_[r * num_tensors_ + t] = begin;
      starts_[row(r) + t + 1] = starts_[row(r) + t] + numel;
      begin += numel;
    }
  }
}

size_t Cuts::longest_stream() const {
  size_t longest = 0;
  for (int r = 0; r < world_size_; r++) longest = std::max(longest, stream_numel(r));
  return longest;
}

size_t Cuts::numel() const {
  size_t total = 0;
  for (int r = 0; r < world_size_; r++) total += stream_numel(r);
  return total;
}

uint64_t Cuts::digest() const {
  uint64_t hash = 0xcbf29ce484222325;  // FNV-1a, by words
  for (size_t start : starts_) hash = (hash ^ start) * 0x100000001b3;
  return hash;
}

namespace {

constexpr size_t kPushNumel = 8 << 10;  // cast once, written n times: stays in the L1 cache
constexpr size_t kSquaresNumel = 1024;  // a subtree of the tree of squares
constexpr int kSquaresBatch = 16;

// Walks the stream of one rank, chunk after chunk.
class Stream {
 public:
  Stream(const Cuts& cuts, int rank) : cuts_(cuts), rank_(rank) {}

  // visit(tensor, at, numel, position) for each run of elements in [from, to) of the stream: `at`
  // in the shard, `position` from `from`.
  template <class Visit>
  void chunk(size_t from, size_t to, Visit visit) {
    to = std::min(to, cuts_.stream_numel(rank_));
    for (size_t at = from; at < to;) {
      while (cuts_.start(rank_, tensor_ + 1) <= at) tensor_++;
      const size_t end = std::min(to, cuts_.start(rank_, tensor_ + 1));
      visit(tensor_, at - cuts_.start(rank_, tensor_), end - at, at - from);
      at = end;
    }
  }

 private:
  const Cuts& cuts_;
  int rank_;
  size_t tensor_ = 0;
};

// The sum of squares of one tensor by the tree over its elements, as its values become final from
// the left. Partial sums wait on a stack, one per set bit of the number of whole blocks seen.
class Squares {
 public:
  explicit Squares(SumOfSquaresFn kernel) : kernel_(kernel) {}
  void start(const float* data) {
    data_ = data;
    num_done_ = num_blocks_ = 0;
    depth_ = 0;
  }
  void advance(size_t num_final) {
    float sums[kSquaresBatch];
    while (num_final - num_done_ >= kSquaresNumel) {
      const size_t rows = std::min<size_t>(kSquaresBatch, (num_final - num_done_) / kSquaresNumel);
      kernel_(data_ + num_done_, static_cast<int64_t>(rows), kSquaresNumel, sums);
      for (size_t i = 0; i < rows; i++, num_blocks_++) {
        float sum = sums[i];
        for (size_t merged = num_blocks_; merged & 1; merged >>= 1) sum = stack_[--depth_] + sum;
        stack_[depth_++] = sum;
      }
      num_done_ += rows * kSquaresNumel;
    }
  }
  float finish(size_t numel) {
    advance(numel);
    if (numel > num_done_) {
      const int64_t rest = static_cast<int64_t>(numel - num_done_);
      kernel_(data_ + num_done_, 1, rest, &stack_[depth_++]);
    }
    if (depth_ == 0) return 0;
    float sum = stack_[--depth_];
    while (depth_ > 0) sum = stack_[--depth_] + sum;
    return std::isnan(sum) ? std::numeric_limits<float>::quiet_NaN() : sum;  // one NaN everywhere
  }

 private:
  SumOfSquaresFn kernel_;
  const float* data_ = nullptr;
  size_t num_done_ = 0, num_blocks_ = 0;
  int depth_ = 0;
  float stack_[64];
};

// Puts the places of the tensors in this rank's heap into its slot, for the peers to find after the
// first barrier. False when one lies elsewhere.
template <class Pointers>
bool write_places(Group& group, const Pointers& tensors, const Cuts& cuts, size_t itemsize) {
  const SymmetricHeap* heap = group.zero_copy_heap();
  const int n = group.world_size();
  if (heap == nullptr || n == 1 || tensors.size() * sizeof(uint64_t) > kSlotNbytes) return false;
  auto* places = reinterpret_cast<uint64_t*>(group.slot(group.rank(), group.epoch() + 1));
  for (size_t t = 0; t < tensors.size(); t++) {
    const size_t numel = cuts.begin(n - 1, t) + cuts.numel(n - 1, t);
    places[t] = heap->offset_of(tensors[t], numel * itemsize);
    if (places[t] == kNotSymmetric) return false;
  }
  return true;
}

// True when all ranks have written their places; else the call goes on by staging.
bool all_symmetric(Group& group, const Call& call, Milliseconds timeout) {
  group.start_symmetric(call, {.in = 0}, nullptr, nullptr, timeout);
  for (int r = 0; r < group.world_size(); r++) {
    if (group.offer(r).any()) continue;
    group.decline();
    return false;
  }
  return true;
}

const uint64_t* places_of(const Group& group, int rank) {
  return reinterpret_cast<const uint64_t*>(group.slot(rank, group.epoch()));
}

// Each rank writes its shards into the full tensors of all.
void push(Group& group, const GatherMany& many, bool stream) {
  const Cuts& cuts = many.cuts;
  const int n = group.world_size(), me = group.rank();
  const SymmetricHeap& heap = *group.zero_copy_heap();
  const size_t itemsize = many.full_itemsize;
  const size_t block = std::max<size_t>(1, 2 * kPushNumel / itemsize);
  alignas(64) char converted[2 * kPushNumel];
  for (size_t t = 0; t < cuts.num_tensors(); t++) {
    for (size_t at = 0; at < cuts.numel(me, t); at += block) {
      const size_t numel = std::min(block, cuts.numel(me, t) - at);
      many.convert(converted, t, at, numel);
      const size_t to = (cuts.begin(me, t) + at) * itemsize;
      for (int j = 0; j < n; j++) {
        const int r = (me + j) % n;
        copy(heap.at(r, places_of(group, r)[t] + to), converted, numel * itemsize, stream);
      }
    }
  }
}

}  // namespace

void GatherMany::convert(void* out, size_t tensor, size_t at, size_t numel) const {
  const char* from = static_cast<const char*>(shards[tensor]) + at * shard_itemsize;
  if (cast != nullptr) {
    cast(out, from, numel);
  } else {
    copy(out, from, numel * full_itemsize, false);
  }
}

void all_gather_many(Group& group, Call call, const GatherMany& many, Milliseconds timeout) {
  const Cuts& cuts = many.cuts;
  const int n = group.world_size(), me = group.rank();
  const size_t itemsize = many.full_itemsize;
  const bool stream = around_caches(group, cuts.numel() * itemsize);
  if (write_places(group, many.fulls, cuts, itemsize) && all_symmetric(group, call, timeout)) {
    push(group, many, stream);
    if (stream) stream_fence();
    return group.finish_symmetric();
  }
  const size_t chunk = kChunkNbytes / itemsize, longest = cuts.longest_stream();
  std::vector<Stream> streams;
  for (int r = 0; r < n; r++) streams.emplace_back(cuts, r);
  Stream mine(cuts, me);
  group.start(call, nullptr, nullptr, timeout);
  for (size_t from = 0; from == 0 || from < longest; from += chunk) {
    char* staged = group.slot(me, group.epoch() + 1);
    mine.chunk(from, from + chunk, [&](size_t t, size_t at, size_t numel, size_t position) {
      many.convert(staged + position * itemsize, t, at, numel);
    });
    from == 0 ? group.meet() : group.barrier();
    for (int j = 0; j < n; j++) {
      const int r = (me + j) % n;
      const char* in = group.slot(r, group.epoch());
      streams[r].chunk(from, from + chunk, [&](size_t t, size_t at, size_t numel, size_t position) {
        char* out = static_cast<char*>(many.fulls[t]);
        copy(out + (cuts.begin(r, t) + at) * itemsize, in + position * itemsize, numel * itemsize,
             stream && numel >= 512);
      });
    }
  }
  if (stream) stream_fence();
  group.finish();
}

void reduce_scatter_many(Group& group, Call call, const ReduceScatterMany& many,
                         Milliseconds timeout) {
  const Cuts& cuts = many.cuts;
  const int n = group.world_size(), me = group.rank();
  const size_t itemsize = many.itemsize;
  std::vector<const void*> sources(n);
  const SumIntoFn kernel = find_sum_into(many.dtype);
  Squares squares(many.sum_of_squares);
  // Elements [at, at + numel) of this rank's shard of tensor t, from `sources`.
  auto sum = [&](size_t t, size_t at, size_t numel) {
    kernel(sources.data(), n, many.shards[t] + at, numel, many.factor, many.accumulate);
    if (many.squares == nullptr) return;
    if (at == 0) squares.start(many.shards[t]);
    squares.advance(at + numel);
    if (at + numel == cuts.numel(me, t)) many.squares[t] = squares.finish(at + numel);
  };
  if (many.squares != nullptr) std::fill_n(many.squares, cuts.num_tensors(), 0.0f);
  const size_t chunk = block_nbytes(n) / itemsize, longest = cuts.longest_stream();
  if (write_places(group, many.fulls, cuts, itemsize) && all_symmetric(group, call, timeout)) {
    const SymmetricHeap& heap = *group.zero_copy_heap();
    Stream mine(cuts, me);
    for (size_t from = 0; from < cuts.stream_numel(me); from += chunk) {
      mine.chunk(from, from + chunk, [&](size_t t, size_t at, size_t numel, size_t) {
        const size_t in = (cuts.begin(me, t) + at) * itemsize;
        for (int r = 0; r < n; r++) sources[r] = heap.at(r, places_of(group, r)[t] + in);
        sum(t, at, numel);
      });
    }
    return group.finish_symmetric();
  }
  std::vector<Stream> streams;
  for (int r = 0; r < n; r++) streams.emplace_back(cuts, r);
  Stream mine(cuts, me);
  group.start(call, nullptr, nullptr, timeout);
  for (size_t from = 0; from == 0 || from < longest; from += chunk) {
    for (int r = 0; r < n; r++) {
      if (r == me) continue;
      char* staged = group.slot(me, group.epoch() + 1) + r * block_nbytes(n);
      streams[r].chunk(from, from + chunk, [&](size_t t, size_t at, size_t numel, size_t position) {
        const char* in = static_cast<const char*>(many.fulls[t]);
        stage(group, staged + position * itemsize, in + (cuts.begin(r, t) + at) * itemsize,
              numel * itemsize);
      });
    }
    from == 0 ? group.meet() : group.barrier();
    mine.chunk(from, from + chunk, [&](size_t t, size_t at, size_t numel, size_t position) {
      for (int r = 0; r < n; r++) {
        const char* staged = group.slot(r, group.epoch()) + me * block_nbytes(n);
        sources[r] = staged + position * itemsize;
      }
      sources[me] = static_cast<const char*>(many.fulls[t]) + (cuts.begin(me, t) + at) * itemsize;
      sum(t, at, numel);
    });
  }
  group.finish();
}

}  // namespace primitives
