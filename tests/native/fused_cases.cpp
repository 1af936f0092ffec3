// Random fused collectives on lists of tensors, each checked against its definition.
#include <algorithm>
#include <numeric>

#include "cases.hpp"
#include "values.hpp"

namespace primitives::native_tests {
namespace {

constexpr Milliseconds kTimeout{60000};
constexpr float kFactor = 0.3f;

float tree_of_squares(const float* x, int64_t n) {
  std::vector<float> squares(x, x + n);
  for (float& square : squares) square *= square;
  return n == 0 ? 0 : naive_tree(ReduceOp::kSum, squares, 0);
}

void sums_of_squares(const float* x, int64_t rows, int64_t n, float* out) {
  for (int64_t row = 0; row < rows; row++) out[row] = tree_of_squares(x + row * n, n);
}

uint16_t to_bfloat16(float x) {  // finite ones
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

class FusedCase {
 public:
  explicit FusedCase(Player& player)
      : player_(player),
        n_(player.transport.group().world_size()),
        me_(player.transport.group().rank()),
        num_tensors_(1 + player.draw(6)),
        seed_(player.random()),
        shift_(player.draw(5)),
        numels_(draw_numels()),
        cuts_(n_, numels_) {}

  void all_gather(bool casts) {
    std::vector<std::vector<float>> shards;
    std::vector<std::vector<uint16_t>> halves;
    std::vector<std::vector<float>> floats;
    std::vector<const void*> in;
    std::vector<void*> out;
    for (size_t t = 0; t < num_tensors_; t++) {
      const size_t begin = shift_ + cuts_.begin(me_, t), numel = full_numel(t) + shift_;
      const std::vector<float> full = full_of(me_, t);
      shards.emplace_back(full.begin() + begin, full.begin() + begin + cuts_.numel(me_, t));
      halves.emplace_back(casts ? numel : 0);
      floats.emplace_back(casts ? 0 : numel);
    }
    for (size_t t = 0; t < num_tensors_; t++) {
      in.push_back(shards[t].data());
      out.push_back(casts ? static_cast<void*>(halves[t].data() + shift_)
                          : floats[t].data() + shift_);
    }
    const CastFn cast = casts ? find_cast(DType::kFloat32, DType::kBFloat16) : nullptr;
    const size_t itemsize = casts ? sizeof(uint16_t) : sizeof(float);
    const GatherMany many{cuts_,           in, out, cast, sizeof(float), itemsize, DType::kFloat32,
                          DType::kBFloat16};
    player_.transport.all_gather_many(
        call(Op::kAllGatherMany, casts ? "float32>bfloat16" : "float32"), many, kTimeout);
    player_.settle();
    for (size_t t = 0; t < num_tensors_; t++) {
      std::vector<float> want;
      for (int r = 0; r < n_; r++) {
        const std::vector<float> full = full_of(r, t);
        const auto begin = full.begin() + shift_ + cuts_.begin(r, t);
        want.insert(want.end(), begin, begin + cuts_.numel(r, t));
      }
      if (casts) {
        std::vector<uint16_t> narrow(want.size());
        std::transform(want.begin(), want.end(), narrow.begin(), to_bfloat16);
        expect_bits(halves[t].data() + shift_, narrow, "fused all_gather with a cast");
      } else {
        expect_bits(floats[t].data() + shift_, want, "fused all_gather");
      }
    }
  }

  void reduce_scatter(bool accumulate) {
    std::vector<std::vector<float>> fulls, shards;
    std::vector<const void*> in;
    std::vector<float*> out;
    for (size_t t = 0; t < num_tensors_; t++) {
      fulls.push_back(full_of(me_, t));
      shards.emplace_back(cuts_.numel(me_, t) + shift_, 1.5f);
    }
    for (size_t t = 0; t < num_tensors_; t++) {
      in.push_back(fulls[t].data() + shift_);
      out.push_back(shards[t].data() + shift_);
    }
    std::vector<float> squares(num_tensors_, -1);
    Call made = call(Op::kReduceScatterMany, "float32");
    made.reduce_op = ReduceOp::kSum;
    made.factor = kFactor;
    if (accumulate) made.digest = ~made.digest;
    const ReduceScatterMany many{cuts_,          in,      out,        DType::kFloat32,
                                 sizeof(float),  kFactor, accumulate, squares.data(),
                                 sums_of_squares};
    player_.transport.reduce_scatter_many(made, many, kTimeout);
    player_.settle();
    for (size_t t = 0; t < num_tensors_; t++) {
      std::vector<float> want(cuts_.numel(me_, t)), of_ranks(n_);
      std::vector<std::vector<float>> all;
      for (int r = 0; r < n_; r++) all.push_back(full_of(r, t));
      for (size_t i = 0; i < want.size(); i++) {
        for (int r = 0; r < n_; r++) of_ranks[r] = all[r][shift_ + cuts_.begin(me_, t) + i];
        want[i] = naive_tree(ReduceOp::kSum, of_ranks, 0) * kFactor;
        if (accumulate) want[i] = 1.5f + want[i];
      }
      expect_bits(out[t], want, "fused reduce_scatter");
      const float sum = tree_of_squares(want.data(), static_cast<int64_t>(want.size()));
      expect_bits(&squares[t], {sum}, "sum of squares");
    }
  }

 private:
  // Mostly tiny; now and then several blocks, chunks and groups of squares.
  std::vector<int64_t> draw_numels() {
    std::vector<int64_t> numels(num_tensors_ * n_);
    const uint64_t largest = player_.draw(8) == 0 ? 90'000 / n_ : 300;
    for (int64_t& numel : numels) numel = static_cast<int64_t>(player_.draw(largest));
    return numels;
  }

  size_t full_numel(size_t t) const { return cuts_.begin(n_ - 1, t) + cuts_.numel(n_ - 1, t); }

  // Of a rank, `shift_` elements behind the beginning of its memory.
  std::vector<float> full_of(int rank, size_t t) const {
    std::vector<float> full(shift_ + full_numel(t));
    for (size_t i = 0; i < full.size(); i++) full[i] = value<float>(seed_ + t, rank, i);
    return full;
  }

  Call call(Op op, const char* dtype) const {
    Call made;
    made.op = op;
    std::snprintf(made.dtype, sizeof made.dtype, "%s", dtype);
    made.itemsize = sizeof(float);
    made.numel = cuts_.numel();
    made.num_tensors = num_tensors_;
    made.digest = cuts_.digest();
    return made;
  }

  Player& player_;
  const int n_, me_;
  const size_t num_tensors_;
  const uint64_t seed_;
  const size_t shift_;
  const std::vector<int64_t> numels_;
  const Cuts cuts_;
};

}  // namespace

void play_fused_case(Player& player) {
  const bool gathers = player.draw(2) == 0, which = player.draw(2) == 0;
  FusedCase fused(player);
  gathers ? fused.all_gather(which) : fused.reduce_scatter(which);
}

}  // namespace primitives::native_tests
