#include "collectives/reduce.hpp"

#include <immintrin.h>

#include "isa.hpp"

namespace primitives {

#define PRIMITIVES_DECLARE(isa)                               \
  namespace isa {                                             \
  ReduceFn find_reduce(DType dtype, ReduceOp op);             \
  CastFn find_cast(DType from, DType to);                     \
  SumIntoFn find_sum_into(DType dtype);                       \
  void copy_stream(void* out, const void* in, size_t nbytes); \
  }
PRIMITIVES_DECLARE(scalar)
PRIMITIVES_DECLARE(avx2)
PRIMITIVES_DECLARE(avx512)
#undef PRIMITIVES_DECLARE

ReduceFn find_reduce(DType dtype, ReduceOp op) {
  switch (active_isa()) {
    case Isa::kScalar:
      return scalar::find_reduce(dtype, op);
    case Isa::kAvx2:
      return avx2::find_reduce(dtype, op);
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return avx512::find_reduce(dtype, op);
  }
  return nullptr;
}

CastFn find_cast(DType from, DType to) {
  switch (active_isa()) {
    case Isa::kScalar:
      return scalar::find_cast(from, to);
    case Isa::kAvx2:
      return avx2::find_cast(from, to);
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return avx512::find_cast(from, to);
  }
  return nullptr;
}

SumIntoFn find_sum_into(DType dtype) {
  switch (active_isa()) {
    case Isa::kScalar:
      return scalar::find_sum_into(dtype);
    case Isa::kAvx2:
      return avx2::find_sum_into(dtype);
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return avx512::find_sum_into(dtype);
  }
  return nullptr;
}

void copy_stream(void* out, const void* in, size_t nbytes) {
  switch (active_isa()) {
    case Isa::kScalar:
      return scalar::copy_stream(out, in, nbytes);
    case Isa::kAvx2:
      return avx2::copy_stream(out, in, nbytes);
    case Isa::kAvx512:
    case Isa::kAvx512Bf16:
      return avx512::copy_stream(out, in, nbytes);
  }
}

void stream_fence() { _mm_sfence(); }

}  // namespace primitives
