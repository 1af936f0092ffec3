// Elements of tensors as CUDA threads read and write them: 16 bytes at once where memory allows,
// and one by one in a type that is known at run time.
#pragma once

#include "canonical/kernels.hpp"
#include "canonical/packed.hpp"

namespace primitives::canonical {
namespace {

constexpr int kWarp = 32;

// A piece: the elements [first, first + kNumel) of p[0, n), first a multiple of kNumel. Those from
// n on read as 0 and are not written.
template <class T>
DEVICE_FN bool is_whole_piece(const typename T::Storage* p, int64_t first, int64_t n) {
  return first + T::kNumel <= n && reinterpret_cast<uintptr_t>(p) % sizeof(Packed) == 0;
}

template <class T, class Thread>
DEVICE_FN void load_piece(const Thread& thread, const typename T::Storage* p, int64_t first,
                          int64_t n, float x[T::kNumel]) {
  if (is_whole_piece<T>(p, first, n)) {
    const Packed packed = thread.load(reinterpret_cast<const Packed*>(p + first));
#pragma unroll
    for (int i = 0; i < T::kNumel; i++) x[i] = T::widen(T::element(packed, i));
  } else {
#pragma unroll
    for (int i = 0; i < T::kNumel; i++) {
      x[i] = first + i < n ? T::widen(thread.load(p + first + i)) : 0.0f;
    }
  }
}

template <class T, class Thread>
DEVICE_FN void store_piece(const Thread& thread, typename T::Storage* p, int64_t first, int64_t n,
                           const float x[T::kNumel]) {
  if (is_whole_piece<T>(p, first, n)) {
    Packed packed{};
#pragma unroll
    for (int i = 0; i < T::kNumel; i++) T::set(&packed, i, T::narrow(x[i]));
    thread.store(reinterpret_cast<Packed*>(p + first), packed);
  } else {
#pragma unroll
    for (int i = 0; i < T::kNumel; i++) {
      if (first + i < n) thread.store(p + first + i, T::narrow(x[i]));
    }
  }
}

template <class T, class Thread>
DEVICE_FN float load_one(const Thread& thread, const void* data, int64_t i) {
  return T::widen(thread.load(static_cast<const typename T::Storage*>(data) + i));
}

template <class T, class Thread>
DEVICE_FN void store_one(const Thread& thread, void* data, int64_t i, float x) {
  thread.store(static_cast<typename T::Storage*>(data) + i, T::narrow(x));
}

// Element i of any type.
template <class Thread>
DEVICE_FN float load_any(const Thread& thread, const Input& x, int64_t i) {
  switch (x.dtype) {
    case Dtype::kFloat32:
      return load_one<PackedFloat32>(thread, x.data, i);
    case Dtype::kFloat16:
      return load_one<PackedFloat16>(thread, x.data, i);
    default:
      return load_one<PackedBFloat16>(thread, x.data, i);
  }
}

template <class Thread>
DEVICE_FN void store_any(const Thread& thread, const Output& out, int64_t i, float x) {
  switch (out.dtype) {
    case Dtype::kFloat32:
      return store_one<PackedFloat32>(thread, out.data, i, x);
    case Dtype::kFloat16:
      return store_one<PackedFloat16>(thread, out.data, i, x);
    default:
      return store_one<PackedBFloat16>(thread, out.data, i, x);
  }
}

// A float32 that is no part of a piece.
template <class Thread>
DEVICE_FN void store_float(const Thread& thread, float* p, float x) {
  thread.store(p, canonical_nan(x));
}

}  // namespace
}  // namespace primitives::canonical
