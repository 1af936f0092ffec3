// Reductions over several hosts: the tree over all ranks, its lower part inside each host. See
// [Note: two levels].
#include <algorithm>
#include <cstring>
#include <map>

#include "collectives/several_hosts.hpp"

namespace primitives {
namespace {

using Range = std::pair<int, int>;  // ranks [first, second)

// The left part of a node: adjacent pairs, level by level, split at the largest power of two.
int split_point(const Range& node) {
  int left = 1;
  while (2 * left < node.second - node.first) left *= 2;
  return node.first + left;
}

// The tree of some ranks given the sums of its subtrees, by `combine`, in place of the first.
char* finish_tree(const Range& node, const std::map<Range, char*>& sums, ReduceFn combine,
                  size_t numel) {
  if (const auto sum = sums.find(node); sum != sums.end()) return sum->second;
  const int middle = split_point(node);
  char* left = finish_tree({node.first, middle}, sums, combine, numel);
  char* right = finish_tree({middle, node.second}, sums, combine, numel);
  const void* pair[] = {left, right};
  combine(pair, 2, left, numel, 0, false);
  return left;
}

}  // namespace

std::vector<Range> Hosts::subtrees(int host, bool leaves) const {
  std::vector<Range> found;
  auto visit = [&](auto&& visit, const Range& node) -> void {
    const auto inside = std::count(of.begin() + node.first, of.begin() + node.second, host);
    if (inside == 0) return;
    const int size = node.second - node.first;
    if (inside == size && (size == 1 || !leaves)) {
      found.push_back(node);
      return;
    }
    visit(visit, {node.first, split_point(node)});
    visit(visit, {split_point(node), node.second});
  };
  visit(visit, {0, world_size()});
  return found;
}

std::vector<char> SeveralHosts::collect(const std::vector<Part>& in,
                                        const std::vector<int>& served) {
  const int mine = served[hosts_.position(hosts_.rank)];
  const size_t nbytes = mine < 0 ? 0 : in[mine].nbytes;
  std::vector<char> collected(served.size() * nbytes);
  std::vector<Part> from, to;
  for (size_t i = 0; i < served.size(); i++) {
    from.push_back(served[i] < 0 ? Part{nullptr, 0} : in[served[i]]);
    to.push_back({collected.data() + i * nbytes, nbytes});
  }
  Call call = local_call(Op::kAllToAll, 0);
  call.has_counts = true;
  primitives::all_to_all(*local_, call, from, to, time_left());
  return collected;
}

void SeveralHosts::reduce_parts(const std::vector<Part>& in, void* out,
                                const Reduction& reduction) {
  const int n = hosts_.world_size(), num_hosts = static_cast<int>(hosts_.members.size());
  // Half precision is rounded once, at the end: its partial sums are no values of its own.
  const bool leaves = reduction.dtype == DType::kFloat16 || reduction.dtype == DType::kBFloat16;
  const bool scaled = reduction.op == ReduceOp::kAvg || reduction.op == ReduceOp::kPremulSum;
  const ReduceFn combine = find_reduce(reduction.dtype, scaled ? ReduceOp::kSum : reduction.op);
  const ReduceFn lower = reduction.op == ReduceOp::kPremulSum ? reduction.kernel : combine;
  const size_t nbytes = in[hosts_.rank].nbytes;

  // Sums of subtrees of every host, for this rank's part.
  std::vector<std::vector<char>> sums(num_hosts), outgoing;
  Messages messages(*this);  // after the memory it uses
  for (int h = 0; h < num_hosts; h++) {
    sums[h].resize(hosts_.subtrees(h, leaves).size() * nbytes);
    if (h == hosts_.mine) continue;
    messages.recv({sums[h].data(), sums[h].size()}, hosts_.counterpart(h, hosts_.rank));
  }

  // Which ranks each rank of this host serves: itself, then some of other hosts.
  std::vector<std::vector<int>> served(hosts_.local().size());
  for (size_t i = 0; i < served.size(); i++) served[i].push_back(hosts_.local()[i]);
  for (int r = 0; r < n; r++) {
    if (!hosts_.is_local(r)) {
      served[hosts_.position(hosts_.counterpart(hosts_.mine, r))].push_back(r);
    }
  }
  size_t num_rounds = 0;
  for (const auto& ranks : served) num_rounds = std::max(num_rounds, ranks.size());

  const auto nodes = hosts_.subtrees(hosts_.mine, leaves);
  for (size_t round = 0; round < num_rounds; round++) {
    std::vector<int> now;
    for (const auto& ranks : served) now.push_back(round < ranks.size() ? ranks[round] : -1);
    std::vector<char> collected = collect(in, now);
    const int target = now[hosts_.position(hosts_.rank)];
    if (target < 0) continue;
    const size_t size = in[target].nbytes;
    std::vector<char> lower_sums(nodes.size() * size);
    for (size_t i = 0; i < nodes.size() && size > 0; i++) {
      std::vector<const void*> sources;
      for (int r = nodes[i].first; r < nodes[i].second; r++) {
        sources.push_back(collected.data() + hosts_.position(r) * size);
      }
      char* sum = lower_sums.data() + i * size;
      if (leaves) {
        std::memcpy(sum, sources[0], size);
      } else {
        lower(sources.data(), static_cast<int>(sources.size()), sum, size / reduction.itemsize,
              reduction.factor, false);
      }
    }
    if (target == hosts_.rank) {
      sums[hosts_.mine] = std::move(lower_sums);
    } else {
      outgoing.push_back(std::move(lower_sums));
      messages.send({outgoing.back().data(), outgoing.back().size()}, target);
    }
  }
  messages.wait();
  if (nbytes == 0) return;

  std::map<Range, char*> by_node;
  for (int h = 0; h < num_hosts; h++) {
    char* sum = sums[h].data();
    for (const Range& node : hosts_.subtrees(h, leaves)) {
      by_node[node] = sum;
      sum += nbytes;
    }
  }
  const size_t numel = nbytes / reduction.itemsize;
  std::vector<const void*> sources;
  if (leaves) {
    for (const auto& [node, leaf] : by_node) sources.push_back(leaf);  // in rank order
    reduction.kernel(sources.data(), n, out, numel, reduction.factor, false);
    return;
  }
  sources.push_back(finish_tree({0, n}, by_node, combine, numel));
  const ReduceFn last = reduction.op == ReduceOp::kAvg ? reduction.kernel : combine;
  last(sources.data(), 1, out, numel, reduction.factor, false);
}

void SeveralHosts::reduce_scatter(const Call& call, const std::vector<Part>& in, void* out,
                                  const Reduction& reduction, Milliseconds timeout) {
  std::vector<uint64_t> send, recv(in.size(), in[hosts_.rank].nbytes);
  for (const Part& part : in) send.push_back(part.nbytes);
  run(call, call.has_counts ? send.data() : nullptr, recv.data(), timeout,
      [&] { reduce_parts(in, out, reduction); });
}

void SeveralHosts::all_reduce(const Call& call, void* data, size_t nbytes,
                              const Reduction& reduction, Milliseconds timeout) {
  run(call, nullptr, nullptr, timeout, [&] {
    const size_t n = hosts_.of.size(), numel = nbytes / reduction.itemsize;
    std::vector<Part> slices;
    for (size_t r = 0; r < n; r++) {
      const size_t begin = numel * r / n, end = numel * (r + 1) / n;
      slices.push_back({static_cast<char*>(data) + begin * reduction.itemsize,
                        (end - begin) * reduction.itemsize});
    }
    const Part mine = slices[hosts_.rank];
    reduce_parts(slices, mine.data, reduction);
    gather_all(mine.data, mine.nbytes, slices);
  });
}

void SeveralHosts::reduce(const Call& call, void* data, size_t nbytes, const Reduction& reduction,
                          Milliseconds timeout) {
  run(call, nullptr, nullptr, timeout, [&] {
    std::vector<Part> parts(hosts_.of.size(), {nullptr, 0});
    parts[call.root] = {data, nbytes};
    reduce_parts(parts, data, reduction);
  });
}

}  // namespace primitives
