// Casts and sums of reduce.hpp for fused collectives, once per instruction set: included after
// reduce_kernels.hpp, by the same files and under the same rule.

namespace primitives::ISA {
namespace {

template <class From, class To>
void cast(void* out, const void* in, size_t numel) {
  const auto* from = static_cast<const typename From::Store*>(in);
  auto* to = static_cast<typename To::Store*>(out);
  if constexpr (From::kPlain) {
    To::store(to, from, numel);
  } else if constexpr (To::kPlain) {
    From::load(to, from, numel);
  } else {
    float wide[kBlock];
    for (size_t at = 0; at < numel; at += kBlock) {
      const size_t k = numel - at < kBlock ? numel - at : kBlock;
      From::load(wide, from + at, k);
      To::store(to + at, wide, k);
    }
  }
}

template <class From>
CastFn find_cast_from(DType to) {
  if constexpr (!__is_same(From, Plain<float>)) {
    if (to == DType::kFloat32) return cast<From, Plain<float>>;
  }
  if constexpr (!__is_same(From, Float16)) {
    if (to == DType::kFloat16) return cast<From, Float16>;
  }
  if constexpr (!__is_same(From, BFloat16)) {
    if (to == DType::kBFloat16) return cast<From, BFloat16>;
  }
  return nullptr;
}

template <class D>
void sum_into(const void* const* in, int n, float* out, size_t numel, float factor,
              bool accumulate) {
  const auto* sources = reinterpret_cast<const typename D::Store* const*>(in);
  float acc[kBlock];
  for (size_t at = 0; at < numel; at += kBlock) {
    const size_t k = numel - at < kBlock ? numel - at : kBlock;
    float* to = out + at;
    tree<D, Sum>(sources, n, at, k, acc, 0.0f);
    if (accumulate) {
      for (size_t i = 0; i < k; i++) to[i] += acc[i] * factor;
    } else {
      for (size_t i = 0; i < k; i++) to[i] = acc[i] * factor;
    }
  }
}

}  // namespace

CastFn find_cast(DType from, DType to) {
  if (from == DType::kFloat32) return find_cast_from<Plain<float>>(to);
  if (from == DType::kFloat16) return find_cast_from<Float16>(to);
  if (from == DType::kBFloat16) return find_cast_from<BFloat16>(to);
  return nullptr;
}

SumIntoFn find_sum_into(DType dtype) {
  if (dtype == DType::kFloat32) return sum_into<Plain<float>>;
  if (dtype == DType::kFloat16) return sum_into<Float16>;
  if (dtype == DType::kBFloat16) return sum_into<BFloat16>;
  return nullptr;
}

}  // namespace primitives::ISA
