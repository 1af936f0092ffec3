// The tree over ranks on memory: one lane's part of a sum.
#pragma once

#include "collectives/cuda/elements.hpp"
#include "collectives/cuda/exchange.hpp"

namespace primitives::cuda {

struct Inputs {
  const char* at[kMaxRanks] = {};

  template <class Place>
  DEVICE_FN Inputs(Place place, int n) {
    DEVICE_UNROLL
    for (int r = 0; r < kMaxRanks; r++) {
      if (r < n) at[r] = place(r);
    }
  }
};

struct Outputs {
  char* at[kMaxRanks];
};

DEVICE_FN bool are_congruent(const Inputs& in, int n, const Outputs& out, int num_out,
                             size_t word) {
  uintptr_t apart = 0;
  for (int r = 0; r < n; r++) apart |= in.at[r] - out.at[0];
  for (int k = 1; k < num_out; k++) apart |= out.at[k] - out.at[0];
  return apart % word == 0;
}

// D is the type, O the operation of elements.hpp, Word what is loaded and stored at a time.
template <class D, class O, class Word>
struct Reducer {
  using Store = typename D::Store;
  using Acc = typename D::Acc;

  // This lane's part of out[each of num_out] = the tree over the n ranks of in[rank], `nbytes`
  // long. An output may be one of the inputs, but may not overlap them otherwise. By packs when all
  // lie at the same distance from a multiple of 16 bytes, else by elements.
  template <class M>
  DEVICE_FN static void run(M& m, int lane, const Call& call, int n, const Inputs& in,
                            const Outputs& out, int num_out, size_t nbytes) {
    const bool is_avg = static_cast<ReduceOp>(call.reduce_op) == ReduceOp::kAvg;
    const Acc f = static_cast<Acc>(is_avg ? n : call.factor);
    const size_t numel = nbytes / sizeof(Store), step = m.num_lanes();
    Split split(out.at[0], numel, sizeof(Store), sizeof(Word));
    if (!are_congruent(in, n, out, num_out, sizeof(Word)))
      split.head = numel, split.num_words = split.tail = 0;
    for (size_t i = lane; i < split.num_words; i += step) {
      const size_t at = split.head * sizeof(Store) + i * sizeof(Word);
      reduce_word<Word>(m, at, n, f, in, out, num_out);
    }
    for (size_t i = lane; i < split.head + split.tail; i += step) {
      reduce_word<Store>(m, split.edge(i, numel) * sizeof(Store), n, f, in, out, num_out);
    }
  }

 private:
  // The elements of a word, as they are combined.
  template <class W>
  struct Values {
    static constexpr int kNum = sizeof(W) / sizeof(Store);
    Acc at[kNum];
  };

  template <class W, class M>
  DEVICE_FN static void reduce_word(M& m, size_t at, int n, Acc factor, const Inputs& in,
                                    const Outputs& out, int num_out) {
    constexpr int kNum = Values<W>::kNum;
    W words[kMaxRanks];
    DEVICE_UNROLL
    for (int r = 0; r < kMaxRanks; r++) {
      if (r < n) words[r] = m.load(reinterpret_cast<const W*>(in.at[r] + at));
    }
    auto get = [&](int r) {
      Store x[kNum];
      memcpy(x, &words[r], sizeof x);
      Values<W> values;
      DEVICE_UNROLL
      for (int e = 0; e < kNum; e++) values.at[e] = O::in(D::widen(x[e]), factor);
      return values;
    };
    auto two = [](Values<W> a, const Values<W>& b) {
      DEVICE_UNROLL
      for (int e = 0; e < kNum; e++) a.at[e] = O::two(a.at[e], b.at[e]);
      return a;
    };
    const Values<W> sum = tree(n, get, two);
    Store x[kNum];
    DEVICE_UNROLL
    for (int e = 0; e < kNum; e++) x[e] = D::narrow(O::out(sum.at[e], factor));
    W result;
    memcpy(&result, x, sizeof result);
    for (int k = 0; k < num_out; k++) m.store(reinterpret_cast<W*>(out.at[k] + at), result);
  }
};

// The sums that training waits for have kernels of their own, with loads of 16 bytes. All others
// share one kernel, with loads of 4 or 8, so that a build takes minutes and not a quarter of an
// hour.
template <class D, class O>
constexpr bool kHasKernel =
    (__is_same(D, Float32) || __is_same(D, Float16) || __is_same(D, BFloat16)) &&
    (__is_same(O, Sum) || __is_same(O, Avg) || __is_same(O, PremulSum));

template <int kItemsize>
struct WordFor {
  using type = uint32_t;
};
template <>
struct WordFor<8> {
  using type = uint64_t;
};

struct AnyReducer {
  template <class M>
  DEVICE_CALL static void run(M& m, int lane, const Call& call, int n, const Inputs& in,
                              const Outputs& out, int num_out, size_t nbytes) {
    visit_kind(static_cast<DType>(call.dtype), [&](auto kind) {
      kind.visit(static_cast<ReduceOp>(call.reduce_op), [&](auto d, auto o) {
        if constexpr (!kHasKernel<decltype(d), decltype(o)>) {
          run_one<decltype(d), decltype(o)>(m, lane, call, n, in, out, num_out, nbytes);
        }
      });
    });
  }

 private:
  template <class D, class O, class M>
  DEVICE_CALL static void run_one(M& m, int lane, const Call& call, int n, const Inputs& in,
                                  const Outputs& out, int num_out, size_t nbytes) {
    using Word = typename WordFor<sizeof(typename D::Store)>::type;
    Reducer<D, O, Word>::run(m, lane, call, n, in, out, num_out, nbytes);
  }
};

// f(the reducer of a type and operation); false when they have no meaning together. Host code.
template <class F>
bool visit_reducer(DType dtype, ReduceOp op, F&& f) {
  bool found = false;
  visit_kind(dtype, [&](auto kind) {
    found = kind.visit(op, [&](auto d, auto o) {
      if constexpr (kHasKernel<decltype(d), decltype(o)>) {
        f(Reducer<decltype(d), decltype(o), Pack>{});
      } else {
        f(AnyReducer{});
      }
    });
  });
  return found;
}

}  // namespace primitives::cuda
