// What fused collectives do to elements: casts, and the scaled sum over ranks in float32; eight at
// a time by 16-byte accesses where all addresses allow it, else one by one.
#pragma once

#include <type_traits>

#include "collectives/cuda/reducer.hpp"

namespace primitives::cuda {

// ---- casts: the bits of the CPU, also of a NaN, which keeps sign and payload but in bfloat16
struct CastFloat32 {
  using Store = float;
  DEVICE_FN static float widen(float x) { return x; }
  DEVICE_FN static float narrow(float x) { return x; }
};

struct CastFloat16 {
  using Store = uint16_t;
  DEVICE_FN static float widen(uint16_t x) {
    const uint32_t rest = x & 0x7fffu;
    if (rest <= 0x7c00u) return canonical::float16_to_float(x);
    return canonical::float_of((x & 0x8000u) << 16 | 0x7fc00000u | rest << 13);
  }
  DEVICE_FN static uint16_t narrow(float x) {
    if (x == x) return canonical::float_to_float16(x);
    const uint32_t bits = canonical::bits_of(x);
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | 0x7e00u | (bits >> 13 & 0x1ffu));
  }
};

using CastBFloat16 = BFloat16;

// f(T{}) of float32, float16 and bfloat16; does nothing for another number.
template <class F>
DEVICE_FN void visit_cast(uint8_t dtype, F f) {
  if (dtype == static_cast<uint8_t>(DType::kFloat32)) f(CastFloat32{});
  if (dtype == static_cast<uint8_t>(DType::kFloat16)) f(CastFloat16{});
  if (dtype == static_cast<uint8_t>(DType::kBFloat16)) f(CastBFloat16{});
}

// The same with the types that are summed.
template <class F>
DEVICE_FN void visit_sum(uint8_t dtype, F f) {
  if (dtype == static_cast<uint8_t>(DType::kFloat32)) f(Float32{});
  if (dtype == static_cast<uint8_t>(DType::kFloat16)) f(Float16{});
  if (dtype == static_cast<uint8_t>(DType::kBFloat16)) f(BFloat16{});
}

template <int kNum>
struct Numel {
  static constexpr int kValue = kNum;
};

// How a run of elements is cut: `head` of them, `num` batches of kNum that begin at multiples of 16
// bytes, and the rest.
template <int kNum>
struct Batches {
  size_t numel, head, num;

  DEVICE_FN Batches(const void* p, size_t itemsize, size_t numel) : numel(numel) {
    const size_t misfit = reinterpret_cast<uintptr_t>(p) % kPackNbytes;
    head = smaller(numel, (misfit == 0 ? 0 : kPackNbytes - misfit) / itemsize);
    num = (numel - head) / kNum;
  }
  // One by one unless p, too, lies at a multiple of 16 bytes behind the head.
  DEVICE_FN void need(const void* p, size_t itemsize) {
    if ((reinterpret_cast<uintptr_t>(p) + head * itemsize) % kPackNbytes != 0) num = 0;
  }
  // each(at, Numel<k>) for this lane's part.
  template <class Each>
  DEVICE_FN void each(int lane, size_t step, Each each) const {
    for (size_t i = lane; i < num; i += step) each(head + kNum * i, Numel<kNum>{});
    for (size_t i = lane; i < numel - kNum * num; i += step) {
      each(i < head ? i : i + kNum * num, Numel<1>{});
    }
  }
};

// One element, or a batch of them by 16-byte accesses.
template <class T, int kNum>
struct Some {
  using Word = std::conditional_t<kNum == 1, T, Pack>;
  static constexpr int kWords = kNum == 1 ? 1 : kNum * static_cast<int>(sizeof(T)) / kPackNbytes;
  T at[kNum];

  template <class M>
  DEVICE_FN static Some load(M& m, const T* from) {
    Word words[kWords];
    DEVICE_UNROLL
    for (int i = 0; i < kWords; i++) words[i] = m.load(reinterpret_cast<const Word*>(from) + i);
    Some some;
    memcpy(some.at, words, sizeof some.at);
    return some;
  }
  template <class M>
  DEVICE_FN void store(M& m, T* to) const {
    Word words[kWords];
    memcpy(words, at, sizeof at);
    DEVICE_UNROLL
    for (int i = 0; i < kWords; i++) m.store(reinterpret_cast<Word*>(to) + i, words[i]);
  }
};

template <class From, class To, class M>
DEVICE_CALL void cast(M& m, int lane, char* out, const char* in, size_t numel) {
  using FromStore = typename From::Store;
  using ToStore = typename To::Store;
  auto* to = reinterpret_cast<ToStore*>(out);
  const auto* from = reinterpret_cast<const FromStore*>(in);
  Batches<8> batches(to, sizeof *to, numel);
  batches.need(from, sizeof *from);
  batches.each(lane, m.num_lanes(), [&](size_t at, auto num) {
    constexpr int kNum = decltype(num)::kValue;
    const auto x = Some<FromStore, kNum>::load(m, from + at);
    Some<ToStore, kNum> y;
    DEVICE_UNROLL
    for (int i = 0; i < kNum; i++) y.at[i] = To::narrow(From::widen(x.at[i]));
    y.store(m, to + at);
  });
}

// This lane's part of `numel` elements of a shard, as they are in the full tensors.
template <class M>
DEVICE_FN void convert(M& m, int lane, const primitives_cuda_many& many, char* out, const char* in,
                       size_t numel) {
  if (many.from == many.to) return copy(m, lane, out, in, numel * many.out_itemsize);
  visit_cast(many.from, [&](auto from) {
    visit_cast(many.to, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      if constexpr (!std::is_same_v<From, To>) cast<From, To>(m, lane, out, in, numel);
    });
  });
}

// This lane's part of out = (out if it accumulates, else 0) + factor * the tree over the n ranks of
// in[rank], in float32, one rounding each.
template <class D, class M>
DEVICE_CALL void sum_into(M& m, int lane, const Call& call, int n, Inputs in, float* out,
                          size_t numel) {
  using Store = typename D::Store;
  const float factor = static_cast<float>(call.factor);
  Batches<kPackNbytes / static_cast<int>(sizeof(Store))> batches(out, sizeof *out, numel);
  for (int r = 0; r < n; r++) batches.need(in.at[r], sizeof(Store));
  batches.each(lane, m.num_lanes(), [&](size_t at, auto num) {
    constexpr int kNum = decltype(num)::kValue;
    using Inputs = Some<Store, kNum>;
    using Sums = Some<float, kNum>;
    Inputs xs[kMaxRanks];
    DEVICE_UNROLL
    for (int r = 0; r < kMaxRanks; r++) {
      if (r < n) xs[r] = Inputs::load(m, reinterpret_cast<const Store*>(in.at[r]) + at);
    }
    const auto get = [&](int r) {
      Sums x;
      DEVICE_UNROLL
      for (int i = 0; i < kNum; i++) x.at[i] = D::widen(xs[r].at[i]);
      return x;
    };
    const auto two = [](Sums a, const Sums& b) {
      DEVICE_UNROLL
      for (int i = 0; i < kNum; i++) a.at[i] = add(a.at[i], b.at[i]);
      return a;
    };
    Sums sum = tree(n, get, two);
    DEVICE_UNROLL
    for (int i = 0; i < kNum; i++) sum.at[i] = multiply(sum.at[i], factor);
    if (call.many.accumulate) sum = two(Sums::load(m, out + at), sum);
    DEVICE_UNROLL
    for (int i = 0; i < kNum; i++) sum.at[i] = canonical::canonical_nan(sum.at[i]);
    sum.store(m, out + at);
  });
}

}  // namespace primitives::cuda
