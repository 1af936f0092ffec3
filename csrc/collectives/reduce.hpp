// Sums and friends over ranks, element by element, in the order of [Note: tree].
//
// [Note: tree] x0..xn-1 are combined as adjacent pairs, level by level, an odd last one carried up:
// ((x0 + x1) + (x2 + x3)) + x4. The order depends on the number of ranks alone, never on message
// size, chunk, SIMD width or arrival. float16 and bfloat16 are widened to float32, combined there,
// and rounded once (to nearest, ties to even, subnormals kept).
#pragma once

#include <cstddef>
#include <cstdint>

#include "collectives/dtype.hpp"
#include "transport/call.hpp"

namespace primitives {

// out[i] = op over ranks of in[rank][i]. `out` may be one of the inputs, but may not overlap them
// otherwise.
using ReduceFn = void (*)(const void* const* in, int num_in, void* out, size_t numel, double factor,
                          bool stream);

// Null when the operation has no meaning for the type. `factor`: what kPremulSum multiplies with,
// what kAvg divides by. `stream` writes around the caches.
ReduceFn find_reduce(DType dtype, ReduceOp op);

// out[i] = in[i] in another type, rounded to nearest, ties to even.
using CastFn = void (*)(void* out, const void* in, size_t numel);
// Null unless both are float32, float16 or bfloat16, and differ.
CastFn find_cast(DType from, DType to);

// out[i] = (accumulate ? out[i] : 0) + factor * tree over ranks of in[rank][i], in float32.
using SumIntoFn = void (*)(const void* const* in, int num_in, float* out, size_t numel,
                           float factor, bool accumulate);
// Null unless float32, float16 or bfloat16.
SumIntoFn find_sum_into(DType dtype);

// Copies around the caches: for results too large to be read back from them.
void copy_stream(void* out, const void* in, size_t nbytes);
// Makes streamed stores visible before a following barrier.
void stream_fence();

}  // namespace primitives
