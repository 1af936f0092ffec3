// Fused collectives and symmetric memory over several hosts. See [Note: two levels].
#include <cmath>
#include <limits>

#include "collectives/chunks.hpp"
#include "collectives/several_hosts.hpp"

namespace primitives {
namespace {

// The shards of all ranks, one stream after the other: room for them, and each rank's part of it.
struct Streams {
  Streams(const Cuts& cuts, int world_size, size_t itemsize) : memory(cuts.numel() * itemsize) {
    char* at = memory.data();
    for (int r = 0; r < world_size; r++) {
      parts.push_back({at, cuts.stream_numel(r) * itemsize});
      at += parts.back().nbytes;
    }
  }
  char* at(int rank, size_t nbytes) const { return static_cast<char*>(parts[rank].data) + nbytes; }

  std::vector<char> memory;
  std::vector<Part> parts;
};

}  // namespace

void SeveralHosts::all_gather_many(const Call& call, const GatherMany& many, Milliseconds timeout) {
  const Cuts& cuts = many.cuts;
  const int n = hosts_.world_size(), me = hosts_.rank;
  const size_t itemsize = many.full_itemsize;
  run(call, nullptr, nullptr, timeout, [&] {
    const Streams streams(cuts, n, itemsize);
    for (size_t t = 0; t < cuts.num_tensors(); t++) {
      many.convert(streams.at(me, cuts.start(me, t) * itemsize), t, 0, cuts.numel(me, t));
    }
    gather_all(streams.parts[me].data, streams.parts[me].nbytes, streams.parts);
    for (int r = 0; r < n; r++) {
      for (size_t t = 0; t < cuts.num_tensors(); t++) {
        copy(static_cast<char*>(many.fulls[t]) + cuts.begin(r, t) * itemsize,
             streams.at(r, cuts.start(r, t) * itemsize), cuts.numel(r, t) * itemsize, false);
      }
    }
  });
}

void SeveralHosts::reduce_scatter_many(const Call& call, const ReduceScatterMany& many,
                                       Milliseconds timeout) {
  const Cuts& cuts = many.cuts;
  const int n = hosts_.world_size(), me = hosts_.rank;
  const CastFn widen = find_cast(many.dtype, DType::kFloat32);  // null: they are float32
  const SumIntoFn scale = find_sum_into(DType::kFloat32);
  const Reduction sum{find_reduce(DType::kFloat32, ReduceOp::kSum), DType::kFloat32, ReduceOp::kSum,
                      sizeof(float), 0};
  run(call, nullptr, nullptr, timeout, [&] {
    const Streams streams(cuts, n, sizeof(float));
    for (int r = 0; r < n; r++) {
      for (size_t t = 0; t < cuts.num_tensors(); t++) {
        char* to = streams.at(r, cuts.start(r, t) * sizeof(float));
        const char* from =
            static_cast<const char*>(many.fulls[t]) + cuts.begin(r, t) * many.itemsize;
        if (widen != nullptr) {
          widen(to, from, cuts.numel(r, t));
        } else {
          copy(to, from, cuts.numel(r, t) * sizeof(float), false);
        }
      }
    }
    std::vector<float> sums(cuts.stream_numel(me));
    reduce_parts(streams.parts, sums.data(), sum);
    for (size_t t = 0; t < cuts.num_tensors(); t++) {
      const size_t numel = cuts.numel(me, t);
      const void* source = sums.data() + cuts.start(me, t);
      scale(&source, 1, many.shards[t], numel, many.factor, many.accumulate);
      if (many.squares == nullptr) continue;
      float& squares = many.squares[t] = 0;
      if (numel > 0) many.sum_of_squares(many.shards[t], 1, static_cast<int64_t>(numel), &squares);
      if (std::isnan(squares)) squares = std::numeric_limits<float>::quiet_NaN();  // one everywhere
    }
  });
}

void* SeveralHosts::empty(const Call& call, size_t nbytes, Milliseconds timeout) {
  void* data = nullptr;
  run(call, nullptr, nullptr, timeout, [&] {
    std::string why;
    try {
      data = symmetric::empty(*local_, call, nbytes, time_left());
    } catch (const TransportError& error) {
      if (local_->failed()) throw;
      why = error.what();  // no room on this host
    }
    const char mine = why.empty();
    std::vector<char> has_room(hosts_.of.size());
    std::vector<Part> parts;
    for (char& one : has_room) parts.push_back({&one, 1});
    gather_all(&mine, 1, parts);
    if (!why.empty()) throw TransportError(Failure::kOther, why);
    for (int r = 0; r < hosts_.world_size(); r++) {
      if (has_room[r]) continue;
      local_->heap()->free(data);
      throw TransportError(Failure::kOther, symmetric::no_room(describe_rank(r), nbytes));
    }
  });
  return data;
}

}  // namespace primitives
