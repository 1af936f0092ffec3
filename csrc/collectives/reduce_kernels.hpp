// The kernels of reduce.hpp, compiled once per instruction set: reduce_{scalar,avx2,avx512}.cpp
// define ISA and ISA_LEVEL (0, 1, 2) and include this file inside their target region. No other
// header may be included here: a function of a standard header compiled in that region could be
// used by the linker for all machines. (No include guard: one inclusion per translation unit, under
// another name.)

namespace primitives::ISA {
namespace {

// Combined at a time: partial results stay in the L1 cache. What goes around the caches goes in
// smaller blocks: stores that long hold up the loads of the next inputs.
constexpr size_t kBlock = 512;  // elements
constexpr size_t kStreamBlockNbytes = 512;
constexpr size_t kAheadNbytes = 4096;  // that a copy around the caches asks for what it reads

// ---- types: how elements are stored, and what they are combined in
template <class T>
struct Plain {
  using Store = T;
  using Acc = T;
  static constexpr bool kPlain = true, kWidens = true;
  static T widen(T x) { return x; }
};

inline float as_float(uint32_t bits) { return __builtin_bit_cast(float, bits); }
inline uint32_t as_bits(float x) { return __builtin_bit_cast(uint32_t, x); }

struct BFloat16 {
  using Store = uint16_t;
  using Acc = float;
  static constexpr bool kPlain = false, kWidens = true;  // an element at a time, in vector code
  static float widen(uint16_t x) { return as_float(static_cast<uint32_t>(x) << 16); }
  static void load(float* out, const uint16_t* in, size_t numel) {
    for (size_t i = 0; i < numel; i++) out[i] = widen(in[i]);
  }
  static void store(uint16_t* out, const float* in, size_t numel) {
    for (size_t i = 0; i < numel; i++) {
      const uint32_t bits = as_bits(in[i]);
      const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      out[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
    }
  }
};

struct Float16 {
  using Store = uint16_t;
  using Acc = float;
  static constexpr bool kPlain = false, kWidens = false;

  static float widen(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
    const uint32_t rest = half & 0x7fff;
    if (rest > 0x7c00) return as_float(sign | 0x7fc00000 | (rest << 13));
    if (rest == 0x7c00) return as_float(sign | 0x7f800000);
    if (rest >= 0x0400) return as_float(sign | ((rest << 13) + 0x38000000));
    // A subnormal is a multiple of 2^-24: exact in float32.
    return as_float(sign | as_bits(static_cast<float>(rest) * 0x1p-24f));
  }
  static uint16_t narrow(float x) {
    const uint32_t bits = as_bits(x);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00 | ((rest >> 13) & 0x1ff));
    if (rest >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
    if (rest < 0x38800000) {
      // Adding 0.5 lets the float unit round to multiples of 2^-24.
      const float shifted = as_float(rest) + 0.5f;
      return static_cast<uint16_t>(sign | (as_bits(shifted) - 0x3f000000));
    }
    return static_cast<uint16_t>(sign | ((rest - 0x38000000 + 0xfff + ((rest >> 13) & 1)) >> 13));
  }
  static void load(float* out, const uint16_t* in, size_t numel) {
    size_t i = 0;
#if ISA_LEVEL >= 1
    for (; i + 8 <= numel; i += 8) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i));
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(half));
    }
#endif
    for (; i < numel; i++) out[i] = widen(in[i]);
  }
  static void store(uint16_t* out, const float* in, size_t numel) {
    size_t i = 0;
#if ISA_LEVEL >= 1
    for (; i + 8 <= numel; i += 8) {
      const __m128i half = _mm256_cvtps_ph(_mm256_loadu_ps(in + i), _MM_FROUND_TO_NEAREST_INT);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), half);
    }
#endif
    for (; i < numel; i++) out[i] = narrow(in[i]);
  }
};

// ---- operations: what happens to an input, to two values, and to the result
struct Sum {
  template <class A>
  static A in(A x, A) {
    return x;
  }
  template <class A>
  static A two(A a, A b) {
    return static_cast<A>(a + b);
  }
  template <class A>
  static A out(A x, A) {
    return x;
  }
};
struct Avg : Sum {
  template <class A>
  static A out(A x, A num_ranks) {
    return x / num_ranks;
  }
};
struct PremulSum : Sum {
  template <class A>
  static A in(A x, A factor) {
    return x * factor;
  }
};
struct Product : Sum {
  template <class A>
  static A two(A a, A b) {
    return static_cast<A>(a * b);
  }
};
struct Min : Sum {  // a NaN wins, as in torch.minimum
  template <class A>
  static A two(A a, A b) {
    return a != a || a < b ? a : b;
  }
};
struct Max : Sum {
  template <class A>
  static A two(A a, A b) {
    return a != a || a > b ? a : b;
  }
};
struct Band : Sum {
  template <class A>
  static A two(A a, A b) {
    return static_cast<A>(a & b);
  }
};
struct Bor : Sum {
  template <class A>
  static A two(A a, A b) {
    return static_cast<A>(a | b);
  }
};
struct Bxor : Sum {
  template <class A>
  static A two(A a, A b) {
    return static_cast<A>(a ^ b);
  }
};

// ---- the tree: splitting at the largest power of two below n gives adjacent pairs, level by level

// Up to four inputs in one pass, the partial results in registers; `finish` gets each result. `out`
// may be one of the inputs.
template <class D, class O, class Finish>
void few(const typename D::Store* const* in, int n, size_t at, size_t numel, typename D::Acc* out,
         typename D::Acc factor, Finish finish) {
  auto x = [=](const typename D::Store* source, size_t i) {
    return O::in(D::widen(source[i]), factor);
  };
  const auto *a = in[0] + at, *b = in[n > 1 ? 1 : 0] + at, *c = in[n > 2 ? 2 : 0] + at,
             *d = in[n > 3 ? 3 : 0] + at;
  if (n == 1) {
#pragma GCC ivdep
    for (size_t i = 0; i < numel; i++) out[i] = finish(x(a, i));
  } else if (n == 2) {
#pragma GCC ivdep
    for (size_t i = 0; i < numel; i++) out[i] = finish(O::two(x(a, i), x(b, i)));
  } else if (n == 3) {
#pragma GCC ivdep
    for (size_t i = 0; i < numel; i++) {
      out[i] = finish(O::two(O::two(x(a, i), x(b, i)), x(c, i)));
    }
  } else {
#pragma GCC ivdep
    for (size_t i = 0; i < numel; i++) {
      out[i] = finish(O::two(O::two(x(a, i), x(b, i)), O::two(x(c, i), x(d, i))));
    }
  }
}

template <class D, class O>
void tree(const typename D::Store* const* in, int n, size_t at, size_t numel, typename D::Acc* out,
          typename D::Acc factor) {
  using Acc = typename D::Acc;
  if constexpr (D::kWidens) {
    if (n <= 4) return few<D, O>(in, n, at, numel, out, factor, [](Acc x) { return x; });
  } else if (n == 1) {
    D::load(out, in[0] + at, numel);
    for (size_t i = 0; i < numel; i++) out[i] = O::in(out[i], factor);
    return;
  }
  int left = 1;
  while (2 * left < n) left *= 2;
  Acc other[kBlock];
  tree<D, O>(in, left, at, numel, out, factor);
  tree<D, O>(in + left, n - left, at, numel, other, factor);
  for (size_t i = 0; i < numel; i++) out[i] = O::two(out[i], other[i]);
}

constexpr size_t kLinesNbytes = 256;  // at a time

// kLinesNbytes to a whole number of cache lines, around the caches.
inline void stream_lines(char* to, const char* from) {
#if ISA_LEVEL == 2
  for (size_t i = 0; i < kLinesNbytes; i += 64) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), _mm512_loadu_si512(from + i));
  }
#elif ISA_LEVEL == 1
  for (size_t i = 0; i < kLinesNbytes; i += 32) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
  }
#else
  for (size_t i = 0; i < kLinesNbytes; i += 16) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
  }
#endif
}

void copy_around_caches(void* out, const void* in, size_t nbytes) {
  char* to = static_cast<char*>(out);
  const char* from = static_cast<const char*>(in);
  size_t head = (64 - (reinterpret_cast<uintptr_t>(to) & 63)) & 63;
  if (head > nbytes) head = nbytes;
  __builtin_memcpy(to, from, head);
  size_t i = head;
  for (; i + kLinesNbytes <= nbytes; i += kLinesNbytes) {
    if (i + kAheadNbytes + kLinesNbytes <= nbytes) {  // beyond may be what a peer writes now
      for (size_t line = 0; line < kLinesNbytes; line += 64) {
        _mm_prefetch(from + i + kAheadNbytes + line, _MM_HINT_T0);
      }
    }
    stream_lines(to + i, from + i);
  }
  __builtin_memcpy(to + i, from + i, nbytes - i);
}

template <class D, class O>
void reduce(const void* const* in, int n, void* out, size_t numel, double factor, bool stream) {
  using Store = typename D::Store;
  using Acc = typename D::Acc;
  const auto* sources = reinterpret_cast<const Store* const*>(in);
  Store* result = static_cast<Store*>(out);
  const Acc f = static_cast<Acc>(factor);
  constexpr size_t kStreamBlock = kStreamBlockNbytes / sizeof(Store);
  Acc acc[kBlock];
  alignas(64) Store block[kStreamBlock];
  // The first block ends where a cache line of the result does.
  const size_t before = reinterpret_cast<uintptr_t>(out) % 64 / sizeof(Store);
  size_t k = stream ? kStreamBlock - before : kBlock;
  for (size_t at = 0; at < numel; at += k, k = stream ? kStreamBlock : kBlock) {
    if (k > numel - at) k = numel - at;
    Store* to = stream ? block : result + at;
    if constexpr (D::kPlain) {
      if (n <= 4) {
        few<D, O>(sources, n, at, k, to, f, [f](Acc x) { return O::out(x, f); });
      } else {
        tree<D, O>(sources, n, at, k, acc, f);
        for (size_t i = 0; i < k; i++) to[i] = O::out(acc[i], f);
      }
    } else {
      tree<D, O>(sources, n, at, k, acc, f);
      for (size_t i = 0; i < k; i++) acc[i] = O::out(acc[i], f);
      D::store(to, acc, k);
    }
    if (!stream) continue;
    char* const bytes = reinterpret_cast<char*>(result + at);
    if (k == kStreamBlock && reinterpret_cast<uintptr_t>(bytes) % 64 == 0) {
      const char* const from = reinterpret_cast<const char*>(block);
      for (size_t i = 0; i < sizeof block; i += kLinesNbytes) stream_lines(bytes + i, from + i);
    } else {
      __builtin_memcpy(bytes, block, k * sizeof(Store));
    }
  }
}

template <class D>
ReduceFn find_float(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return reduce<D, Sum>;
    case ReduceOp::kAvg:
      return reduce<D, Avg>;
    case ReduceOp::kPremulSum:
      return reduce<D, PremulSum>;
    case ReduceOp::kProduct:
      return reduce<D, Product>;
    case ReduceOp::kMin:
      return reduce<D, Min>;
    case ReduceOp::kMax:
      return reduce<D, Max>;
    case ReduceOp::kNone:
    case ReduceOp::kBand:
    case ReduceOp::kBor:
    case ReduceOp::kBxor:
      return nullptr;
  }
  return nullptr;
}

// Sums and products wrap around, so they are those of the unsigned type U.
template <class T, class U>
ReduceFn find_integer(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
      return reduce<Plain<U>, Sum>;
    case ReduceOp::kProduct:
      return reduce<Plain<U>, Product>;
    case ReduceOp::kMin:
      return reduce<Plain<T>, Min>;
    case ReduceOp::kMax:
      return reduce<Plain<T>, Max>;
    case ReduceOp::kBand:
      return reduce<Plain<U>, Band>;
    case ReduceOp::kBor:
      return reduce<Plain<U>, Bor>;
    case ReduceOp::kBxor:
      return reduce<Plain<U>, Bxor>;
    case ReduceOp::kNone:
    case ReduceOp::kAvg:
    case ReduceOp::kPremulSum:
      return nullptr;
  }
  return nullptr;
}

ReduceFn find_bool(ReduceOp op) {
  switch (op) {
    case ReduceOp::kSum:
    case ReduceOp::kMax:
    case ReduceOp::kBor:
      return reduce<Plain<uint8_t>, Bor>;
    case ReduceOp::kProduct:
    case ReduceOp::kMin:
    case ReduceOp::kBand:
      return reduce<Plain<uint8_t>, Band>;
    case ReduceOp::kBxor:
      return reduce<Plain<uint8_t>, Bxor>;
    case ReduceOp::kNone:
    case ReduceOp::kAvg:
    case ReduceOp::kPremulSum:
      return nullptr;
  }
  return nullptr;
}

}  // namespace

ReduceFn find_reduce(DType dtype, ReduceOp op) {
  switch (dtype) {
    case DType::kFloat32:
      return find_float<Plain<float>>(op);
    case DType::kFloat64:
      return find_float<Plain<double>>(op);
    case DType::kFloat16:
      return find_float<Float16>(op);
    case DType::kBFloat16:
      return find_float<BFloat16>(op);
    case DType::kInt8:
      return find_integer<int8_t, uint8_t>(op);
    case DType::kUInt8:
      return find_integer<uint8_t, uint8_t>(op);
    case DType::kInt16:
      return find_integer<int16_t, uint16_t>(op);
    case DType::kInt32:
      return find_integer<int32_t, uint32_t>(op);
    case DType::kInt64:
      return find_integer<int64_t, uint64_t>(op);
    case DType::kUInt16:
      return find_integer<uint16_t, uint16_t>(op);
    case DType::kUInt32:
      return find_integer<uint32_t, uint32_t>(op);
    case DType::kUInt64:
      return find_integer<uint64_t, uint64_t>(op);
    case DType::kBool:
      return find_bool(op);
  }
  return nullptr;
}

void copy_stream(void* out, const void* in, size_t nbytes) { copy_around_caches(out, in, nbytes); }

}  // namespace primitives::ISA

#include "collectives/fused_kernels.hpp"
