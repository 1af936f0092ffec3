// The kernels of the collectives, as launch.cu starts them, on any machine of [Note: device code].
#pragma once

#include "collectives/cuda/prepare.hpp"

namespace primitives::cuda {

// Block `block` of a prepared call.
template <class M>
void run_block(M& machine, int block, const Ranks& ranks, const Call& call) {
  if (is_fused(static_cast<Op>(call.op))) return many_block(machine, block, ranks, call);
  if (!is_reduction(static_cast<Op>(call.op))) return move_block(machine, block, ranks, call);
  visit_reducer(
      static_cast<DType>(call.dtype), static_cast<ReduceOp>(call.reduce_op),
      [&](auto reducer) { reduce_block<decltype(reducer)>(machine, block, ranks, call); });
}

}  // namespace primitives::cuda
