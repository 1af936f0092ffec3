// Random fused collectives on lists of tensors, each checked against its definition.
#include <algorithm>
#include <cstdlib>
#include <memory>

#include "cases.hpp"
#include "values.hpp"

namespace primitives::native_tests {
namespace {

constexpr Milliseconds kTimeout{60000};
constexpr float kFactor = 0.3f;
constexpr float kHeld = 1.5f;

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

// Tensors of all ranks, `shift_` elements behind the beginning of their memory.
class FusedCase {
 public:
  explicit FusedCase(Player& player)
      : player_(player),
        n_(player.transport.group().world_size()),
        me_(player.transport.group().rank()),
        num_tensors_(1 + player.draw(6)),
        seed_(player.random()),
        shift_(player.draw(5)),
        cuts_(n_, draw_numels()) {
    const bool all = seed_ % 4 == 0, mine = seed_ % 4 == 1 && (seed_ >> 8 >> me_ & 1) == 0;
    is_symmetric_ = player.allocate && (all || mine);
  }
  virtual ~FusedCase() = default;

  virtual void start() = 0;
  virtual void check() = 0;

 protected:
  size_t full_numel(size_t t) const { return cuts_.begin(n_ - 1, t) + cuts_.numel(n_ - 1, t); }

  std::vector<float> full_of(int rank, size_t t) const {
    std::vector<float> full(shift_ + full_numel(t));
    for (size_t i = 0; i < full.size(); i++) full[i] = value<float>(seed_ + t, rank, i);
    return full;
  }

  std::vector<float> shard_of(int rank, size_t t) const {
    const std::vector<float> full = full_of(rank, t);
    const auto begin = full.begin() + static_cast<std::ptrdiff_t>(shift_ + cuts_.begin(rank, t));
    return {begin, begin + static_cast<std::ptrdiff_t>(cuts_.numel(rank, t))};
  }

  // The elements behind shift_, for the length of the case; maybe in symmetric memory.
  const float* input(const std::vector<float>& values) {
    const size_t nbytes = values.size() * sizeof(float);
    std::shared_ptr<void> memory(std::malloc(nbytes), std::free);
    if (is_symmetric_) memory = player_.allocate(nbytes);
    inputs_.push_back(memory);
    auto* const data = static_cast<float*>(memory.get());
    std::copy(values.begin(), values.end(), data);
    return data + shift_;
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
  const Cuts cuts_;

 private:
  bool is_symmetric_;
  std::vector<std::shared_ptr<void>> inputs_;

  // Mostly tiny; now and then several blocks, chunks and leaves of squares.
  std::vector<int64_t> draw_numels() {
    std::vector<int64_t> numels(num_tensors_ * n_);
    const uint64_t largest = player_.draw(8) == 0 ? 20'000 / n_ : 300;
    for (int64_t& numel : numels) numel = static_cast<int64_t>(player_.draw(largest));
    return numels;
  }
};

class Gather : public FusedCase {
 public:
  explicit Gather(Player& player) : FusedCase(player), casts_(player.draw(2) == 0) {}

  void start() override {
    for (size_t t = 0; t < num_tensors_; t++) {
      halves_.emplace_back(casts_ ? shift_ + full_numel(t) : 0);
      floats_.emplace_back(casts_ ? 0 : shift_ + full_numel(t));
    }
    std::vector<const void*> in;
    std::vector<void*> out;
    for (size_t t = 0; t < num_tensors_; t++) {
      std::vector<float> shard(shift_);
      const std::vector<float> elements = shard_of(me_, t);
      shard.insert(shard.end(), elements.begin(), elements.end());
      in.push_back(input(shard));
      if (casts_) out.push_back(halves_[t].data() + shift_);
      if (!casts_) out.push_back(floats_[t].data() + shift_);
    }
    const CastFn cast = casts_ ? find_cast(DType::kFloat32, DType::kBFloat16) : nullptr;
    const size_t itemsize = casts_ ? sizeof(uint16_t) : sizeof(float);
    const GatherMany many{cuts_,           in, out, cast, sizeof(float), itemsize, DType::kFloat32,
                          DType::kBFloat16};
    const char* dtype = casts_ ? "float32>bfloat16" : "float32";
    player_.transport.all_gather_many(call(Op::kAllGatherMany, dtype), many, kTimeout);
  }

  void check() override {
    for (size_t t = 0; t < num_tensors_; t++) {
      std::vector<float> want;
      for (int r = 0; r < n_; r++) {
        const std::vector<float> shard = shard_of(r, t);
        want.insert(want.end(), shard.begin(), shard.end());
      }
      if (casts_) {
        std::vector<uint16_t> narrow(want.size());
        std::transform(want.begin(), want.end(), narrow.begin(), to_bfloat16);
        expect_bits(halves_[t].data() + shift_, narrow, "fused all_gather with a cast");
      } else {
        expect_bits(floats_[t].data() + shift_, want, "fused all_gather");
      }
    }
  }

 private:
  const bool casts_;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<uint16_t>> halves_;
};

class ReduceScatter : public FusedCase {
 public:
  explicit ReduceScatter(Player& player)
      : FusedCase(player), accumulates_(player.draw(2) == 0), squares_(num_tensors_, -1) {}

  void start() override {
    for (size_t t = 0; t < num_tensors_; t++) {
      shards_.emplace_back(cuts_.numel(me_, t) + shift_, kHeld);
    }
    std::vector<const void*> in;
    std::vector<float*> out;
    for (size_t t = 0; t < num_tensors_; t++) {
      in.push_back(input(full_of(me_, t)));
      out.push_back(shards_[t].data() + shift_);
    }
    Call made = call(Op::kReduceScatterMany, "float32");
    made.reduce_op = ReduceOp::kSum;
    made.factor = kFactor;
    if (accumulates_) made.digest = ~made.digest;
    const ReduceScatterMany many{cuts_,          in,      out,          DType::kFloat32,
                                 sizeof(float),  kFactor, accumulates_, squares_.data(),
                                 sums_of_squares};
    player_.transport.reduce_scatter_many(made, many, kTimeout);
  }

  void check() override {
    for (size_t t = 0; t < num_tensors_; t++) {
      std::vector<float> want(cuts_.numel(me_, t)), of_ranks(n_);
      std::vector<std::vector<float>> all;
      for (int r = 0; r < n_; r++) all.push_back(full_of(r, t));
      for (size_t i = 0; i < want.size(); i++) {
        for (int r = 0; r < n_; r++) of_ranks[r] = all[r][shift_ + cuts_.begin(me_, t) + i];
        want[i] = naive_tree(ReduceOp::kSum, of_ranks, 0) * kFactor;
        if (accumulates_) want[i] = kHeld + want[i];
      }
      expect_bits(shards_[t].data() + shift_, want, "fused reduce_scatter");
      const float sum = tree_of_squares(want.data(), static_cast<int64_t>(want.size()));
      expect_bits(&squares_[t], std::vector<float>{sum}, "sum of squares");
    }
  }

 private:
  const bool accumulates_;
  std::vector<std::vector<float>> shards_;
  std::vector<float> squares_;
};

}  // namespace

void play_fused_cases(Player& player) {
  std::vector<std::unique_ptr<FusedCase>> cases;
  for (size_t num = 1 + player.draw(4); cases.size() < num;) {
    if (player.draw(2) == 0) {
      cases.push_back(std::make_unique<Gather>(player));
    } else {
      cases.push_back(std::make_unique<ReduceScatter>(player));
    }
  }
  for (const auto& one : cases) one->start();
  player.settle();
  for (const auto& one : cases) one->check();
}

}  // namespace primitives::native_tests
