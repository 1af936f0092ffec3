// LayerNorm and RMSNorm: a block of kWarps warps per token, as in rows.hpp.
#pragma once

#include "canonical/cuda/rows.hpp"

namespace primitives::canonical {
namespace {

// x [tokens, hidden] -> y, mean [tokens], rstd [tokens]
template <class T, int kWarps>
struct LayerNorm : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S* x;
  Input weight, bias;
  float eps;
  int64_t hidden;
  typename Base::S* y;
  float *mean, *rstd;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    constexpr int kNumel = Base::kNumel;
    const int64_t t = thread.block_x();
    const float num = static_cast<float>(hidden);
    const auto load = [&](int64_t first, float v[kNumel]) {
      load_piece<T>(thread, x + t * hidden, first, hidden, v);
    };
    const float m = Base::tree(thread, hidden, load) / num;
    const float variance = Base::tree(thread, hidden,
                                      [&](int64_t first, float v[kNumel]) {
                                        load(first, v);
#pragma unroll
                                        for (int i = 0; i < kNumel; i++)
                                          v[i] = (v[i] - m) * (v[i] - m);
                                      }) /
                           num;
    const float r = rsqrt(variance + eps);
    Base::for_pieces(thread, hidden, [&](int64_t first) {
      float v[kNumel];
      load(first, v);
#pragma unroll
      for (int i = 0; i < kNumel; i++) {
        if (first + i >= hidden) break;
        const float w = load_any(thread, weight, first + i), b = load_any(thread, bias, first + i);
        v[i] = fma((v[i] - m) * r, w, b);
      }
      store_piece<T>(thread, y + t * hidden, first, hidden, v);
    });
    if (thread.index() != 0) return;
    store_float(thread, mean + t, m);
    store_float(thread, rstd + t, r);
  }
};

// x [tokens, hidden] -> y, rstd [tokens]
template <class T, int kWarps>
struct RmsNorm : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S* x;
  Input weight;
  float eps;
  int64_t hidden;
  typename Base::S* y;
  float* rstd;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    constexpr int kNumel = Base::kNumel;
    const int64_t t = thread.block_x();
    const auto load = [&](int64_t first, float v[kNumel]) {
      load_piece<T>(thread, x + t * hidden, first, hidden, v);
    };
    const float square = Base::tree(thread, hidden, [&](int64_t first, float v[kNumel]) {
      load(first, v);
#pragma unroll
      for (int i = 0; i < kNumel; i++) v[i] = v[i] * v[i];
    });
    const float r = rsqrt(square / static_cast<float>(hidden) + eps);
    Base::for_pieces(thread, hidden, [&](int64_t first) {
      float v[kNumel];
      load(first, v);
#pragma unroll
      for (int i = 0; i < kNumel; i++) {
        if (first + i >= hidden) break;
        v[i] = (v[i] * r) * load_any(thread, weight, first + i);
      }
      store_piece<T>(thread, y + t * hidden, first, hidden, v);
    });
    if (thread.index() == 0) store_float(thread, rstd + t, r);
  }
};

// dy, x [tokens, hidden] -> dx. mean is null for RMSNorm.
template <class T, int kWarps, bool kCentred>
struct NormBackward : RowKernel<T, kWarps> {
  using Base = RowKernel<T, kWarps>;
  const typename Base::S *dy, *x;
  const float *mean, *rstd;
  Input weight;
  int64_t hidden;
  typename Base::S* dx;

  template <class Thread>
  DEVICE_FN void operator()(const Thread& thread) const {
    constexpr int kNumel = Base::kNumel;
    const int64_t t = thread.block_x();
    const float num = static_cast<float>(hidden);
    const float m = kCentred ? thread.load(mean + t) : 0.0f, r = thread.load(rstd + t);
    // n, the normalized x, and g = dy * weight.
    const auto load = [&](int64_t first, float n[kNumel], float g[kNumel]) {
      load_piece<T>(thread, x + t * hidden, first, hidden, n);
      load_piece<T>(thread, dy + t * hidden, first, hidden, g);
#pragma unroll
      for (int i = 0; i < kNumel; i++) {
        if (first + i >= hidden) break;
        n[i] = (kCentred ? n[i] - m : n[i]) * r;
        g[i] = g[i] * load_any(thread, weight, first + i);
      }
    };
    float a = 0.0f;
    if (kCentred) {
      a = Base::tree(thread, hidden,
                     [&](int64_t first, float g[kNumel]) {
                       float n[kNumel];
                       load(first, n, g);
                     }) /
          num;
    }
    const float c = Base::tree(thread, hidden,
                               [&](int64_t first, float g[kNumel]) {
                                 float n[kNumel];
                                 load(first, n, g);
#pragma unroll
                                 for (int i = 0; i < kNumel; i++) g[i] = g[i] * n[i];
                               }) /
                    num;
    Base::for_pieces(thread, hidden, [&](int64_t first) {
      float n[kNumel], g[kNumel];
      load(first, n, g);
#pragma unroll
      for (int i = 0; i < kNumel; i++) n[i] = fma(n[i], -c, kCentred ? g[i] - a : g[i]) * r;
      store_piece<T>(thread, dx + t * hidden, first, hidden, n);
    });
  }
};

}  // namespace
}  // namespace primitives::canonical
