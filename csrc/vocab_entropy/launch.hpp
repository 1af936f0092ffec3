// Which kernel runs on which grid. Launcher: run(kernel, grid) starts it, on CUDA or an emulated
// device, and returns 0 or a code; fail(text) returns the code of a wrong argument;
// enough_blocks() is how many blocks of threads keep the device busy.
#pragma once

#include "canonical/grid.hpp"
#include "vocab_entropy/cuda.hpp"
#include "vocab_entropy/device_backward.hpp"

namespace primitives::vocab_entropy {
namespace {

// How a row is shared out. The bits do not depend on it.
struct ForwardPlan {
  int num_parts;       // of a row, whole segments each; a power of two
  int num_segments;    // of a part
  int64_t num_blocks;  // canonical blocks of a part, at most
  int64_t shared_nbytes;
};

// Enough blocks of threads, even for few tokens, and parts whose sums fit into shared memory.
inline ForwardPlan plan_forward(const Logits& logits, int64_t num_tokens, int64_t enough_blocks) {
  constexpr int64_t kMaxSharedNbytes = 48 << 10;
  const int64_t segment_blocks = (logits.segment_length + kBlock - 1) / kBlock;
  ForwardPlan plan{};
  for (int num_parts = 1; num_parts <= logits.num_segments; num_parts *= 2) {
    const int num_segments = logits.num_segments / num_parts;
    const int64_t num_blocks = num_segments * segment_blocks;
    const int64_t sums = 12 * num_blocks, quads = 16 * num_segments;
    plan = {num_parts, num_segments, num_blocks, sums > quads ? sums : quads};
    if (plan.shared_nbytes <= kMaxSharedNbytes && num_tokens * num_parts >= enough_blocks) break;
  }
  if (plan.shared_nbytes > kMaxSharedNbytes) plan.num_parts = 0;  // not even one segment fits
  return plan;
}

inline int64_t workspace_of(const Logits& logits, int64_t num_tokens, int64_t enough_blocks) {
  const int num_parts = plan_forward(logits, num_tokens, enough_blocks).num_parts;
  return num_parts > 1 ? 4 * num_parts * num_tokens : 0;
}

template <bool kValue>
struct Constant {
  static constexpr bool value = kValue;
};

// body(T{}, Exp{}, Constant<scaled>{}) with the types of a call.
template <class T, class Body>
int with_exp(Mode mode, bool scaled, const Body& body) {
  constexpr Constant<true> yes;
  constexpr Constant<false> no;
  switch (mode) {
    case Mode::kPortable:
      return scaled ? body(T{}, PortableExp{}, yes) : body(T{}, PortableExp{}, no);
    case Mode::kDevice:
      return scaled ? body(T{}, DeviceExp{}, yes) : body(T{}, DeviceExp{}, no);
  }
  return 0;
}

template <class Body>
int with_types(const Logits& logits, Mode mode, const Body& body) {
  const bool scaled = logits.scale != 1.0f;
  switch (logits.dtype) {
    case Dtype::kFloat32:
      return with_exp<PackedFloat32>(mode, scaled, body);
    case Dtype::kFloat16:
      return with_exp<PackedFloat16>(mode, scaled, body);
    case Dtype::kBFloat16:
      return with_exp<PackedBFloat16>(mode, scaled, body);
  }
  return 0;
}

template <class Launcher>
int launch_forward(Launcher& launcher, Mode mode, const Logits& logits, const Labels& labels,
                   int64_t num_tokens, float* workspace, float* quads) {
  if (num_tokens == 0) return 0;
  const ForwardPlan plan = plan_forward(logits, num_tokens, launcher.enough_blocks());
  if (plan.num_parts == 0) {
    return launcher.fail("segments of more than 4,194,304 columns do not fit into shared memory");
  }
  float* of_parts = plan.num_parts == 1 ? quads : workspace;
  const int code = with_types(logits, mode, [&](auto type, auto exp, auto scaled) {
    const Forward<decltype(type), decltype(exp), decltype(scaled)::value> kernel{
        logits,
        labels,
        num_tokens,
        plan.num_segments,
        static_cast<int>(plan.num_blocks / plan.num_segments),
        of_parts};
    return launcher.run(kernel, Grid{num_tokens, plan.num_parts, plan.shared_nbytes});
  });
  if (code != 0 || plan.num_parts == 1) return code;
  const Combine combine{workspace, 4 * num_tokens, plan.num_parts, logits.scale, num_tokens, quads};
  return launcher.run(combine,
                      Grid{(num_tokens + Combine::kThreads - 1) / Combine::kThreads, 1, 0});
}

template <class Launcher>
int launch_finish(Launcher& launcher, const float* shards, int64_t rank_stride, int num_ranks,
                  const Labels& labels, float scale, int64_t num_tokens, float* quads,
                  float* entropy, float* log_prob, float* log_sum_exp) {
  if (num_tokens == 0) return 0;
  const Finish finish{{shards, rank_stride, num_ranks, scale, num_tokens, quads},
                      labels,
                      entropy,
                      log_prob,
                      log_sum_exp};
  return launcher.run(finish, Grid{(num_tokens + Finish::kThreads - 1) / Finish::kThreads, 1, 0});
}

template <class Launcher>
int launch_backward(Launcher& launcher, Mode mode, const Logits& logits, const Labels& labels,
                    const float* quads, const Gradients& gradients, int64_t num_tokens, void* out,
                    int64_t out_stride) {
  if (num_tokens == 0 || logits.columns == 0) return 0;
  return with_types(logits, mode, [&](auto type, auto exp, auto scaled) {
    using Kernel = Backward<decltype(type), decltype(exp), decltype(scaled)::value>;
    // One piece more than the columns need, for memory that is not aligned.
    const int64_t pieces = (logits.columns + Kernel::kSlots - 1) / Kernel::kSlots + 1;
    const int64_t per_block = Kernel::kThreads * Kernel::kPieces;
    const int blocks_per_row = static_cast<int>((pieces + per_block - 1) / per_block);
    const Kernel kernel{
        logits,     labels,        quads, gradients, static_cast<typename Kernel::S*>(out),
        out_stride, blocks_per_row};
    return launcher.run(kernel, Grid{num_tokens * blocks_per_row, 1, Kernel::kSharedNbytes});
  });
}

}  // namespace
}  // namespace primitives::vocab_entropy
