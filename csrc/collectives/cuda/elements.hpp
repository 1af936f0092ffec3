// Element types, operations, and the tree of [Note: tree] in registers; bits as on the CPU, but
// every NaN that is written is the canonical one.
//
// An operation is a value, not a type: one piece of code combines a type by any of them, so that
// nvcc compiles few. All threads of a kernel take the same way through it.
#pragma once

#include "canonical/rounding.hpp"
#include "collectives/cuda/pack.hpp"
#include "collectives/dtype.hpp"
#include "transport/operations.hpp"

namespace primitives::cuda {

// One rounding each, never contracted.
#if defined(__CUDA_ARCH__)
DEVICE_FN float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE_FN float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE_FN float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE_FN double add(double a, double b) { return __dadd_rn(a, b); }
DEVICE_FN double multiply(double a, double b) { return __dmul_rn(a, b); }
DEVICE_FN double divide(double a, double b) { return __ddiv_rn(a, b); }
#else
template <class A>
DEVICE_FN A add(A a, A b) {
  return a + b;
}
template <class A>
DEVICE_FN A multiply(A a, A b) {
  return a * b;
}
template <class A>
DEVICE_FN A divide(A a, A b) {
  return a / b;
}
#endif

// ---- operations: what happens to an input, to two values, and to the result
// sum, avg and premul_sum. A factor or divisor of 1 changes no bit.
template <class A>
struct Linear {
  A factor, divisor;

  DEVICE_FN Linear(ReduceOp op, DType, double factor, int num_ranks)
      : factor(op == ReduceOp::kPremulSum ? static_cast<A>(factor) : A{1}),
        divisor(op == ReduceOp::kAvg ? static_cast<A>(num_ranks) : A{1}) {}
  DEVICE_FN A in(A x) const { return multiply(x, factor); }
  DEVICE_FN A two(A a, A b) const { return add(a, b); }
  DEVICE_FN A out(A x) const { return divisor == A{1} ? x : divide(x, divisor); }
};

// All that floats know. In min and max a NaN wins.
template <class A>
struct AnyFloat : Linear<A> {
  ReduceOp op;

  DEVICE_FN AnyFloat(ReduceOp op, DType dtype, double factor, int num_ranks)
      : Linear<A>(op, dtype, factor, num_ranks), op(op) {}
  DEVICE_FN A two(A a, A b) const {
    if (op == ReduceOp::kProduct) return multiply(a, b);
    if (op == ReduceOp::kMin) return a != a || a < b ? a : b;
    if (op == ReduceOp::kMax) return a != a || a > b ? a : b;
    return add(a, b);
  }
};

// Integers of any sign, and bool, which is stored as 0 and 1.
template <class U>
struct AnyInteger {
  ReduceOp op;
  U flip;  // of signed ones: then they compare as unsigned

  DEVICE_FN AnyInteger(ReduceOp op, DType dtype, double, int) : op(op), flip(0) {
    const bool is_signed = dtype == DType::kInt8 || dtype == DType::kInt16 ||
                           dtype == DType::kInt32 || dtype == DType::kInt64;
    if (is_signed) flip = static_cast<U>(U{1} << (8 * sizeof(U) - 1));
    if (dtype == DType::kBool) {
      const bool is_or = op == ReduceOp::kSum || op == ReduceOp::kMax;
      const bool is_and = op == ReduceOp::kProduct || op == ReduceOp::kMin;
      this->op = is_or ? ReduceOp::kBor : is_and ? ReduceOp::kBand : op;
    }
  }
  DEVICE_FN U in(U x) const { return x; }
  DEVICE_FN U out(U x) const { return x; }
  DEVICE_FN U two(U a, U b) const {
    const bool less = static_cast<U>(a ^ flip) < static_cast<U>(b ^ flip);
    if (op == ReduceOp::kProduct) return static_cast<U>(1u * a * b);  // 1u: never a signed int
    if (op == ReduceOp::kMin) return less ? a : b;
    if (op == ReduceOp::kMax) return less ? b : a;
    if (op == ReduceOp::kBand) return static_cast<U>(a & b);
    if (op == ReduceOp::kBor) return static_cast<U>(a | b);
    if (op == ReduceOp::kBxor) return static_cast<U>(a ^ b);
    return static_cast<U>(a + b);
  }
};

// ---- types: how elements are stored, and what they are combined in
struct Float32 {
  using Store = float;
  using Acc = float;
  using Any = AnyFloat<float>;
  DEVICE_FN static float widen(float x) { return x; }
  DEVICE_FN static float narrow(float x) { return canonical::canonical_nan(x); }
};

struct Float64 {
  using Store = double;
  using Acc = double;
  using Any = AnyFloat<double>;
  DEVICE_FN static double widen(double x) { return x; }
  DEVICE_FN static double narrow(double x) {
    const uint64_t bits = 0x7ff8000000000000;
    double nan;
    memcpy(&nan, &bits, sizeof nan);
    return x != x ? nan : x;
  }
};

struct Float16 {
  using Store = uint16_t;
  using Acc = float;
  using Any = AnyFloat<float>;
  DEVICE_FN static float widen(uint16_t x) { return canonical::float16_to_float(x); }
  DEVICE_FN static uint16_t narrow(float x) { return canonical::float_to_float16(x); }
};

struct BFloat16 {
  using Store = uint16_t;
  using Acc = float;
  using Any = AnyFloat<float>;
  DEVICE_FN static float widen(uint16_t x) { return canonical::bfloat16_to_float(x); }
  DEVICE_FN static uint16_t narrow(float x) { return canonical::float_to_bfloat16(x); }
};

template <class U>
struct Integer {
  using Store = U;
  using Acc = U;
  using Any = AnyInteger<U>;
  DEVICE_FN static U widen(U x) { return x; }
  DEVICE_FN static U narrow(U x) { return x; }
};

// f(D{}); does nothing for a number that is no type.
EXEC_CHECK_OFF template <class F>
HOST_DEVICE_FN void visit_type(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Float32{});
    case DType::kFloat64:
      return f(Float64{});
    case DType::kFloat16:
      return f(Float16{});
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kBool:
      return f(Integer<uint8_t>{});
    case DType::kInt16:
    case DType::kUInt16:
      return f(Integer<uint16_t>{});
    case DType::kInt32:
    case DType::kUInt32:
      return f(Integer<uint32_t>{});
    case DType::kInt64:
    case DType::kUInt64:
      return f(Integer<uint64_t>{});
  }
}

HOST_DEVICE_FN bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat64 || dtype == DType::kFloat16 ||
         dtype == DType::kBFloat16;
}

HOST_DEVICE_FN bool is_linear(ReduceOp op) {
  return op == ReduceOp::kSum || op == ReduceOp::kAvg || op == ReduceOp::kPremulSum;
}

// Whether the operation is defined for the type.
inline bool has_meaning(ReduceOp op, DType dtype) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kProduct:
    case ReduceOp::kMin:
    case ReduceOp::kMax:
      return true;
    case ReduceOp::kAvg:
    case ReduceOp::kPremulSum:
      return is_float(dtype);
    case ReduceOp::kBand:
    case ReduceOp::kBor:
    case ReduceOp::kBxor:
      return !is_float(dtype);
    case ReduceOp::kNone:
      return false;
  }
  return false;
}

// get(0) ... get(n - 1) as adjacent pairs, level by level, an odd last one carried up. All
// arguments of `get` are constants, so what it reads may stay in registers.
template <class Get, class Two>
DEVICE_FN auto tree(int n, Get get, Two two) {
  static_assert(kMaxRanks == 8);
  auto sum = get(0);
  if (n > 1) sum = two(sum, get(1));
  if (n > 2) {
    auto right = get(2);
    if (n > 3) right = two(right, get(3));
    sum = two(sum, right);
  }
  if (n > 4) {
    auto right = get(4);
    if (n > 5) right = two(right, get(5));
    if (n > 6) {
      auto last = get(6);
      if (n > 7) last = two(last, get(7));
      right = two(right, last);
    }
    sum = two(sum, right);
  }
  return sum;
}

}  // namespace primitives::cuda
