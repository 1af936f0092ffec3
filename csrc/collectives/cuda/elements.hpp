// Element types, operations, and the tree of [Note: tree] in registers; bits as on the CPU, but
// every NaN that is written is the canonical one.
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
DEVICE_FN float add(float a, float b) { return a + b; }
DEVICE_FN float multiply(float a, float b) { return a * b; }
DEVICE_FN float divide(float a, float b) { return a / b; }
DEVICE_FN double add(double a, double b) { return a + b; }
DEVICE_FN double multiply(double a, double b) { return a * b; }
DEVICE_FN double divide(double a, double b) { return a / b; }
#endif
template <class A>
DEVICE_FN A add(A a, A b) {
  return static_cast<A>(a + b);
}
template <class A>
DEVICE_FN A multiply(A a, A b) {
  return static_cast<A>(1u * a * b);  // 1u: small types are not promoted to an int that overflows
}

// ---- types: how elements are stored, and what they are combined in
template <class T>
struct Plain {
  using Store = T;
  using Acc = T;
  DEVICE_FN static T widen(T x) { return x; }
  DEVICE_FN static T narrow(T x) { return x; }
};

struct Float32 : Plain<float> {
  DEVICE_FN static float narrow(float x) { return canonical::canonical_nan(x); }
};

struct Float64 : Plain<double> {
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
  DEVICE_FN static float widen(uint16_t x) { return canonical::float16_to_float(x); }
  DEVICE_FN static uint16_t narrow(float x) { return canonical::float_to_float16(x); }
};

struct BFloat16 {
  using Store = uint16_t;
  using Acc = float;
  DEVICE_FN static float widen(uint16_t x) { return canonical::bfloat16_to_float(x); }
  DEVICE_FN static uint16_t narrow(float x) { return canonical::float_to_bfloat16(x); }
};

// ---- operations: what happens to an input, to two values, and to the result
struct Sum {
  template <class A>
  DEVICE_FN static A in(A x, A) {
    return x;
  }
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return add(a, b);
  }
  template <class A>
  DEVICE_FN static A out(A x, A) {
    return x;
  }
};
struct Avg : Sum {
  template <class A>
  DEVICE_FN static A out(A x, A num_ranks) {
    return divide(x, num_ranks);
  }
};
struct PremulSum : Sum {
  template <class A>
  DEVICE_FN static A in(A x, A factor) {
    return multiply(x, factor);
  }
};
struct Product : Sum {
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return multiply(a, b);
  }
};
struct Min : Sum {  // a NaN wins
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return a != a || a < b ? a : b;
  }
};
struct Max : Sum {
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return a != a || a > b ? a : b;
  }
};
struct Band : Sum {
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return static_cast<A>(a & b);
  }
};
struct Bor : Sum {
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return static_cast<A>(a | b);
  }
};
struct Bxor : Sum {
  template <class A>
  DEVICE_FN static A two(A a, A b) {
    return static_cast<A>(a ^ b);
  }
};

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

// ---- kinds: the operations of a type. visit(op, f) calls f(D{}, O{}); false when the operation
// has no meaning for the type.
template <class D>
struct Float {
  using Store = typename D::Store;

  EXEC_CHECK_OFF template <class F>
  HOST_DEVICE_FN static bool visit(ReduceOp op, F&& f) {
    switch (op) {
      case ReduceOp::kSum:
        return f(D{}, Sum{}), true;
      case ReduceOp::kAvg:
        return f(D{}, Avg{}), true;
      case ReduceOp::kPremulSum:
        return f(D{}, PremulSum{}), true;
      case ReduceOp::kProduct:
        return f(D{}, Product{}), true;
      case ReduceOp::kMin:
        return f(D{}, Min{}), true;
      case ReduceOp::kMax:
        return f(D{}, Max{}), true;
      case ReduceOp::kNone:
      case ReduceOp::kBand:
      case ReduceOp::kBor:
      case ReduceOp::kBxor:
        return false;
    }
    return false;
  }
};

// Sums, products and bits are those of the unsigned type U.
template <class T, class U>
struct Integer {
  using Store = T;

  EXEC_CHECK_OFF template <class F>
  HOST_DEVICE_FN static bool visit(ReduceOp op, F&& f) {
    switch (op) {
      case ReduceOp::kSum:
        return f(Plain<U>{}, Sum{}), true;
      case ReduceOp::kProduct:
        return f(Plain<U>{}, Product{}), true;
      case ReduceOp::kMin:
        return f(Plain<T>{}, Min{}), true;
      case ReduceOp::kMax:
        return f(Plain<T>{}, Max{}), true;
      case ReduceOp::kBand:
        return f(Plain<U>{}, Band{}), true;
      case ReduceOp::kBor:
        return f(Plain<U>{}, Bor{}), true;
      case ReduceOp::kBxor:
        return f(Plain<U>{}, Bxor{}), true;
      case ReduceOp::kNone:
      case ReduceOp::kAvg:
      case ReduceOp::kPremulSum:
        return false;
    }
    return false;
  }
};

// Stored as 0 and 1.
struct Bool {
  using Store = uint8_t;

  EXEC_CHECK_OFF template <class F>
  HOST_DEVICE_FN static bool visit(ReduceOp op, F&& f) {
    switch (op) {
      case ReduceOp::kSum:
      case ReduceOp::kMax:
      case ReduceOp::kBor:
        return f(Plain<uint8_t>{}, Bor{}), true;
      case ReduceOp::kProduct:
      case ReduceOp::kMin:
      case ReduceOp::kBand:
        return f(Plain<uint8_t>{}, Band{}), true;
      case ReduceOp::kBxor:
        return f(Plain<uint8_t>{}, Bxor{}), true;
      case ReduceOp::kNone:
      case ReduceOp::kAvg:
      case ReduceOp::kPremulSum:
        return false;
    }
    return false;
  }
};

// f(kind); false for a number that is no type.
EXEC_CHECK_OFF template <class F>
HOST_DEVICE_FN bool visit_kind(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(Float<Float32>{}), true;
    case DType::kFloat64:
      return f(Float<Float64>{}), true;
    case DType::kFloat16:
      return f(Float<Float16>{}), true;
    case DType::kBFloat16:
      return f(Float<BFloat16>{}), true;
    case DType::kInt8:
      return f(Integer<int8_t, uint8_t>{}), true;
    case DType::kUInt8:
      return f(Integer<uint8_t, uint8_t>{}), true;
    case DType::kInt16:
      return f(Integer<int16_t, uint16_t>{}), true;
    case DType::kInt32:
      return f(Integer<int32_t, uint32_t>{}), true;
    case DType::kInt64:
      return f(Integer<int64_t, uint64_t>{}), true;
    case DType::kUInt16:
      return f(Integer<uint16_t, uint16_t>{}), true;
    case DType::kUInt32:
      return f(Integer<uint32_t, uint32_t>{}), true;
    case DType::kUInt64:
      return f(Integer<uint64_t, uint64_t>{}), true;
    case DType::kBool:
      return f(Bool{}), true;
  }
  return false;
}

}  // namespace primitives::cuda
