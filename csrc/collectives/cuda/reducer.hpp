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
  // long. An output may be one of the inputs, but may not overlap them otherwise. By words when all
  // lie at the same distance from a multiple of their size, else by elements.
  // (By value: addresses in registers.)
  template <class M>
  DEVICE_CALL static void run(M& m, int lane, const Call& call, int n, Inputs in, Outputs out,
                              int num_out, size_t nbytes) {
    const O op(static_cast<ReduceOp>(call.reduce_op), static_cast<DType>(call.dtype), call.factor,
               n);
    const size_t numel = nbytes / sizeof(Store), step = m.num_lanes();
    Split split(out.at[0], numel, sizeof(Store), sizeof(Word));
    if (!are_congruent(in, n, out, num_out, sizeof(Word)))
      split.head = numel, split.num_words = split.tail = 0;
    for (size_t i = lane; i < split.num_words; i += step) {
      const size_t at = split.head * sizeof(Store) + i * sizeof(Word);
      reduce_word<Word>(m, at, n, op, in, out, num_out);
    }
    for (size_t i = lane; i < split.head + split.tail; i += step) {
      reduce_word<Store>(m, split.edge(i, numel) * sizeof(Store), n, op, in, out, num_out);
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
  DEVICE_FN static void reduce_word(M& m, size_t at, int n, const O& op, const Inputs& in,
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
      for (int e = 0; e < kNum; e++) values.at[e] = op.in(D::widen(x[e]));
      return values;
    };
    auto two = [&](Values<W> a, const Values<W>& b) {
      DEVICE_UNROLL
      for (int e = 0; e < kNum; e++) a.at[e] = op.two(a.at[e], b.at[e]);
      return a;
    };
    const Values<W> sum = tree(n, get, two);
    Store x[kNum];
    DEVICE_UNROLL
    for (int e = 0; e < kNum; e++) x[e] = D::narrow(op.out(sum.at[e]));
    W result;
    memcpy(&result, x, sizeof result);
    for (int k = 0; k < num_out; k++) m.store(reinterpret_cast<W*>(out.at[k] + at), result);
  }
};

// The sums that training waits for have kernels of their own, with accesses of 16 bytes. All others
// share one kernel that goes by elements, so that a build takes seconds and not minutes.
template <class D>
using SumReducer = Reducer<D, Linear<typename D::Acc>, Pack>;

struct AnyReducer {
  template <class M>
  DEVICE_FN static void run(M& m, int lane, const Call& call, int n, const Inputs& in,
                            const Outputs& out, int num_out, size_t nbytes) {
    visit_type(static_cast<DType>(call.dtype), [&](auto d) {
      using D = decltype(d);
      Reducer<D, typename D::Any, typename D::Store>::run(m, lane, call, n, in, out, num_out,
                                                          nbytes);
    });
  }
};

// f(the reducer of a type and operation). Host code.
template <class F>
void visit_reducer(DType dtype, ReduceOp op, F&& f) {
  if (is_linear(op) && dtype == DType::kFloat32) return f(SumReducer<Float32>{});
  if (is_linear(op) && dtype == DType::kFloat16) return f(SumReducer<Float16>{});
  if (is_linear(op) && dtype == DType::kBFloat16) return f(SumReducer<BFloat16>{});
  f(AnyReducer{});
}

}  // namespace primitives::cuda
