#include "transport/call.hpp"

#include <algorithm>
#include <cstdio>

#include "transport/caller.hpp"

namespace primitives {

const char* op_name(Op op) {
  switch (op) {
    case Op::kNone:
      return "nothing";
    case Op::kAllGather:
      return "all_gather";
    case Op::kReduceScatter:
      return "reduce_scatter";
    case Op::kAllReduce:
      return "all_reduce";
    case Op::kAllToAll:
      return "all_to_all";
    case Op::kBroadcast:
      return "broadcast";
    case Op::kReduce:
      return "reduce";
    case Op::kGather:
      return "gather";
    case Op::kScatter:
      return "scatter";
    case Op::kBarrier:
      return "barrier";
    case Op::kSend:
      return "send";
    case Op::kRecv:
      return "recv";
    case Op::kAllGatherMany:
      return "fused all_gather";
    case Op::kReduceScatterMany:
      return "fused reduce_scatter";
    case Op::kEmpty:
      return "empty";
  }
  return "?";
}

const char* reduce_op_name(ReduceOp op) {
  switch (op) {
    case ReduceOp::kNone:
      return "";
    case ReduceOp::kSum:
      return "sum";
    case ReduceOp::kAvg:
      return "avg";
    case ReduceOp::kPremulSum:
      return "premul_sum";
    case ReduceOp::kProduct:
      return "product";
    case ReduceOp::kMin:
      return "min";
    case ReduceOp::kMax:
      return "max";
    case ReduceOp::kBand:
      return "band";
    case ReduceOp::kBor:
      return "bor";
    case ReduceOp::kBxor:
      return "bxor";
  }
  return "?";
}

std::string describe(const Call& call, const uint64_t* counts, int num_counts) {
  std::string text = op_name(call.op);
  if (call.op == Op::kBarrier) return text;
  text += "(";
  if (call.reduce_op != ReduceOp::kNone) text += reduce_op_name(call.reduce_op) + std::string(", ");
  text += call.dtype + std::string(", numel ") + std::to_string(call.numel);
  if (call.root >= 0) text += ", root " + std::to_string(call.root);
  if (call.digest != 0) {
    char digest[32];
    std::snprintf(digest, sizeof digest, "%08x", static_cast<uint32_t>(call.digest));
    text += ", " + std::to_string(call.num_tensors) + " tensors cut as " + digest;
  }
  if (call.reduce_op == ReduceOp::kPremulSum || call.op == Op::kReduceScatterMany) {
    char factor[32];
    std::snprintf(factor, sizeof factor, "%.17g", call.factor);
    text += std::string(", factor ") + factor;
  }
  if (call.has_counts && counts != nullptr) {
    text += ", numel per rank [";
    for (int i = 0; i < num_counts; i++) {
      text += (i ? ", " : "") + std::to_string(counts[i] / call.itemsize);
    }
    text += "]";
  }
  return text + ")";
}

std::string describe_sides(uint64_t seq, const std::string& group, const std::vector<Side>& sides,
                           const std::vector<std::string>& sites) {
  const int n = static_cast<int>(sides.size());
  std::vector<std::string> calls(n);
  for (int r = 0; r < n; r++) {
    const auto& [call, counts] = sides[r];
    calls[r] = describe(*call, counts, n);
    if (call->has_counts && call->op != Op::kAllGather) {
      calls[r] += " expecting " + describe(*call, counts + n, n);
    }
    calls[r] += at_site(sites[r]);
  }
  std::string text =
      "collective " + std::to_string(seq) + " of group '" + group + "' differs between ranks";
  for (int r = 0; r < n; r++) {
    if (std::find(calls.begin(), calls.begin() + r, calls[r]) != calls.begin() + r) continue;
    std::string ranks;
    for (int s = r; s < n; s++) {
      if (calls[s] == calls[r]) ranks += (s == r ? "" : ", ") + std::to_string(s);
    }
    text += "; rank " + ranks + ": " + calls[r];
  }
  return text;
}

}  // namespace primitives
