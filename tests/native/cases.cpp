#include "cases.hpp"

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <utility>

#include "values.hpp"

namespace primitives::native_tests {
namespace {

constexpr Milliseconds kTimeout{60000};

template <class T>
struct TypeOf;
template <>
struct TypeOf<float> {
  static constexpr DType kDType = DType::kFloat32;
  static constexpr const char* kName = "float32";
};
template <>
struct TypeOf<double> {
  static constexpr DType kDType = DType::kFloat64;
  static constexpr const char* kName = "float64";
};
template <>
struct TypeOf<int64_t> {
  static constexpr DType kDType = DType::kInt64;
  static constexpr const char* kName = "int64";
};
template <>
struct TypeOf<int16_t> {
  static constexpr DType kDType = DType::kInt16;
  static constexpr const char* kName = "int16";
};
template <>
struct TypeOf<uint8_t> {
  static constexpr DType kDType = DType::kUInt8;
  static constexpr const char* kName = "uint8";
};

// Mostly small; else within two elements of where the algorithms change: cache lines, blocks of a
// slot, chunks, the pipeline, streaming stores.
template <class T>
size_t draw_numel(Player& player) {
  if (player.draw(4) > 0) return player.draw(100);
  constexpr size_t kLimits[] = {4096, 32 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 2 << 20};
  const size_t limit = kLimits[player.draw(std::size(kLimits))] / sizeof(T);
  return limit - 2 + player.draw(5);
}

template <class T>
ReduceOp draw_op(Player& player) {
  constexpr ReduceOp kFloat[] = {ReduceOp::kSum,     ReduceOp::kAvg, ReduceOp::kPremulSum,
                                 ReduceOp::kProduct, ReduceOp::kMin, ReduceOp::kMax};
  constexpr ReduceOp kInteger[] = {ReduceOp::kSum, ReduceOp::kProduct, ReduceOp::kMin,
                                   ReduceOp::kMax, ReduceOp::kBand,    ReduceOp::kBor,
                                   ReduceOp::kBxor};
  if constexpr (std::is_floating_point_v<T>) return kFloat[player.draw(std::size(kFloat))];
  return kInteger[player.draw(std::size(kInteger))];
}

// Symmetric memory for the inputs of one case, one behind the other.
class Room {
 public:
  Room() = default;
  Room(std::shared_ptr<void> memory, size_t nbytes, size_t begin)
      : memory_(std::move(memory)), end_(nbytes), used_(begin) {}

  // Null when there is none left.
  void* take(size_t nbytes) {
    if (nbytes > end_ - used_) return nullptr;
    return static_cast<char*>(memory_.get()) + std::exchange(used_, used_ + nbytes);
  }

 private:
  std::shared_ptr<void> memory_;
  size_t end_ = 0, used_ = 0;
};

// Elements in symmetric memory, or that begin anywhere in a cache line and end exactly where the
// allocation ends.
template <class T>
class Buffer {
 public:
  Buffer(size_t numel, size_t shift)
      : own_(numel + shift), data_(own_.data() + shift), numel_(numel) {}
  Buffer(const std::vector<T>& values, size_t shift, Room& room) : numel_(values.size()) {
    data_ = static_cast<T*>(room.take(nbytes()));
    if (data_ == nullptr) *this = Buffer(numel_, shift);
    std::copy(values.begin(), values.end(), data_);
  }
  Buffer(Buffer&&) = default;
  Buffer& operator=(Buffer&&) = default;

  T* data() { return data_; }
  size_t nbytes() const { return numel_ * sizeof(T); }

 private:
  std::vector<T> own_;
  T* data_;
  size_t numel_;
};

template <class T>
class Case {
 public:
  explicit Case(Player& player)
      : player_(player),
        transport_(player.transport),
        n_(player.transport.group().world_size()),
        me_(player.transport.group().rank()),
        seed_(player.random()),
        shift_(player.draw(16)),
        root_(static_cast<int>(player.draw(n_))),
        reduce_op_(draw_op<T>(player)) {
    const bool all = seed_ % 4 == 0, mine = seed_ % 4 == 1 && (seed_ >> 8 >> me_ & 1) == 0;
    if (player.allocate && (all || mine)) {
      room_ = Room(player.allocate(kRoomNbytes), kRoomNbytes, shift_ * sizeof(T));
    }
  }

  void play(int which) {
    switch (which) {
      case 0:
        return all_gather();
      case 1:
        return reduce_scatter();
      case 2:
        return all_reduce();
      case 3:
        return all_to_all();
      case 4:
        return broadcast();
      case 5:
        return reduce();
      case 6:
        return gather();
      case 7:
        return scatter();
      case 8:
        if (player_.sends_messages) return messages();
    }
    transport_.barrier(kTimeout);
  }

 private:
  std::vector<T> values(uint64_t stream, size_t numel) const {
    std::vector<T> made(numel);
    for (size_t i = 0; i < numel; i++) made[i] = value<T>(seed_, stream, i);
    return made;
  }

  std::vector<T> reduced(size_t numel, uint64_t first_stream) const {
    std::vector<T> made(numel), level(n_);
    for (size_t i = 0; i < numel; i++) {
      for (int r = 0; r < n_; r++) level[r] = value<T>(seed_, first_stream + r, i);
      made[i] = naive_tree(reduce_op_, level, kFactor);
    }
    return made;
  }

  Call call(Op op, size_t numel, bool reduces, bool uneven = false) const {
    Call call;
    call.op = op;
    call.reduce_op = reduces ? reduce_op_ : ReduceOp::kNone;
    call.has_counts = uneven;
    std::snprintf(call.dtype, sizeof call.dtype, "%s", TypeOf<T>::kName);
    call.itemsize = sizeof(T);
    call.numel = numel;
    return call;
  }

  Reduction reduction() const {
    const double factor = reduce_op_ == ReduceOp::kPremulSum ? kFactor : n_;
    return {find_reduce(TypeOf<T>::kDType, reduce_op_), TypeOf<T>::kDType, reduce_op_, sizeof(T),
            factor};
  }

  static std::vector<Part> parts(std::vector<Buffer<T>>& buffers) {
    std::vector<Part> made;
    for (Buffer<T>& buffer : buffers) made.push_back({buffer.data(), buffer.nbytes()});
    return made;
  }

  std::vector<size_t> draw_numels(size_t num, bool uneven) {
    std::vector<size_t> numels(num, draw_numel<T>(player_));
    for (size_t& numel : numels) numel = uneven ? draw_numel<T>(player_) : numel;
    return numels;
  }

  void all_gather() {
    const bool uneven = player_.draw(2) == 0;
    const auto numels = draw_numels(n_, uneven);
    std::vector<Buffer<T>> out;
    for (size_t numel : numels) out.emplace_back(numel, shift_);
    Buffer<T> in(values(me_, numels[me_]), 0, room_);
    transport_.all_gather(call(Op::kAllGather, numels[me_], false, uneven), in.data(), in.nbytes(),
                          parts(out), kTimeout);
    player_.settle();
    for (int r = 0; r < n_; r++) expect_bits(out[r].data(), values(r, numels[r]), "all_gather");
  }

  void reduce_scatter() {
    const bool uneven = player_.draw(2) == 0;
    const auto numels = draw_numels(n_, uneven);
    std::vector<Buffer<T>> in;  // stream r * n + s: what rank s has for rank r
    for (int r = 0; r < n_; r++) in.emplace_back(values(r * n_ + me_, numels[r]), shift_, room_);
    Buffer<T> out(numels[me_], shift_);
    transport_.reduce_scatter(call(Op::kReduceScatter, n_ * numels[me_], true, uneven), parts(in),
                              out.data(), reduction(), kTimeout);
    player_.settle();
    expect_bits(out.data(), reduced(numels[me_], me_ * n_), "reduce_scatter");
  }

  void all_reduce() {
    const size_t numel = draw_numel<T>(player_);
    Buffer<T> data(values(me_, numel), shift_, room_);
    transport_.all_reduce(call(Op::kAllReduce, numel, true), data.data(), data.nbytes(),
                          reduction(), kTimeout);
    player_.settle();
    expect_bits(data.data(), reduced(numel, 0), "all_reduce");
  }

  void all_to_all() {
    const bool uneven = player_.draw(2) == 0;
    const auto numels = draw_numels(n_ * n_, uneven);  // from s to r at s * n + r
    std::vector<Buffer<T>> in, out;
    size_t total = 0;
    for (int r = 0; r < n_; r++) {
      in.emplace_back(values(me_ * n_ + r, numels[me_ * n_ + r]), shift_, room_);
      out.emplace_back(numels[r * n_ + me_], 0);
      total += numels[me_ * n_ + r];
    }
    transport_.all_to_all(call(Op::kAllToAll, total, false, uneven), parts(in), parts(out),
                          kTimeout);
    player_.settle();
    for (int s = 0; s < n_; s++) {
      expect_bits(out[s].data(), values(s * n_ + me_, numels[s * n_ + me_]), "all_to_all");
    }
  }

  Call rooted(Op op, size_t numel, bool reduces) const {
    Call made = call(op, numel, reduces);
    made.root = root_;
    return made;
  }

  void broadcast() {
    const size_t numel = draw_numel<T>(player_);
    Buffer<T> data(values(me_, numel), shift_, room_);
    transport_.broadcast(rooted(Op::kBroadcast, numel, false), data.data(), data.nbytes(),
                         kTimeout);
    player_.settle();
    expect_bits(data.data(), values(root_, numel), "broadcast");
  }

  void reduce() {
    const size_t numel = draw_numel<T>(player_);
    Buffer<T> data(values(me_, numel), shift_, room_);
    transport_.reduce(rooted(Op::kReduce, numel, true), data.data(), data.nbytes(), reduction(),
                      kTimeout);
    player_.settle();
    expect_bits(data.data(), me_ == root_ ? reduced(numel, 0) : values(me_, numel), "reduce");
  }

  void gather() {
    const size_t numel = draw_numel<T>(player_);
    std::vector<Buffer<T>> out;
    for (int r = 0; me_ == root_ && r < n_; r++) out.emplace_back(numel, shift_);
    Buffer<T> in(values(me_, numel), 0, room_);
    transport_.gather(rooted(Op::kGather, numel, false), in.data(), in.nbytes(), parts(out),
                      kTimeout);
    player_.settle();
    for (size_t r = 0; r < out.size(); r++) {
      expect_bits(out[r].data(), values(r, numel), "gather");
    }
  }

  void scatter() {
    const size_t numel = draw_numel<T>(player_);
    std::vector<Buffer<T>> in;
    for (int r = 0; me_ == root_ && r < n_; r++) in.emplace_back(values(r, numel), shift_, room_);
    Buffer<T> out(numel, 0);
    transport_.scatter(rooted(Op::kScatter, numel, false), parts(in), out.data(), out.nbytes(),
                       kTimeout);
    player_.settle();
    expect_bits(out.data(), values(me_, numel), "scatter");
  }

  // Every rank sends to every rank, itself included, in an order of its own; some receives come
  // from any source.
  void messages() {
    const auto numels = draw_numels(n_ * n_, true);
    const bool any_source = player_.draw(3) == 0;
    const uint64_t turn = player_.draw(n_);
    std::mutex mutex;
    std::condition_variable changed;
    size_t num_done = 0;
    std::exception_ptr failed;
    std::vector<int> sources(n_);
    std::vector<Buffer<T>> in, out;
    auto done = [&](int slot) {
      return [&, slot](std::exception_ptr error, int src) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (error) failed = error;
        if (slot >= 0) sources[slot] = src;
        num_done++;
        changed.notify_all();
      };
    };
    // From any source the sizes must be equal.
    auto numel_of = [&](int src, int dst) {
      return any_source ? numels[0] : numels[src * n_ + dst];
    };
    auto envelope = [&](size_t numel, int tag) {
      Envelope made{};
      made.nbytes = numel * sizeof(T);
      made.numel = numel;
      made.tag = tag;
      std::snprintf(made.dtype, sizeof made.dtype, "%s", TypeOf<T>::kName);
      return made;
    };
    for (int r = 0; r < n_; r++) {
      in.emplace_back(numel_of(r, me_), shift_);
      out.emplace_back(values(me_ * n_ + r, numel_of(me_, r)), 0, room_);
    }
    auto post_sends = [&] {
      for (int j = 0; j < n_; j++) {
        const int dst = static_cast<int>((me_ + j + turn) % n_);
        const int tag = any_source ? 7 : 100 + me_;
        transport_.send(out[dst].data(), envelope(numel_of(me_, dst), tag), dst, kTimeout,
                        done(-1));
      }
    };
    if (me_ % 2 == 0) post_sends();
    for (int j = 0; j < n_; j++) {
      const int src = static_cast<int>((me_ + n_ - j) % n_);
      const int tag = any_source ? 7 : 100 + src;
      transport_.recv(in[src].data(), envelope(numel_of(src, me_), tag),
                      any_source ? kAnySource : src, kTimeout, done(src));
    }
    if (me_ % 2 == 1) post_sends();
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return num_done == 2 * static_cast<size_t>(n_); });
    if (failed) std::rethrow_exception(failed);
    std::vector<int> seen = sources;
    std::sort(seen.begin(), seen.end());
    for (int r = 0; r < n_; r++) {
      if (seen[r] != r) throw WrongResult("messages: not one from each rank");
      const int src = sources[r];
      expect_bits(in[r].data(), values(src * n_ + me_, numel_of(src, me_)), "message");
    }
    lock.unlock();
    // A message from any source of the next round must not be taken for one of this round.
    transport_.barrier(kTimeout);
  }

  static constexpr double kFactor = 0.3;  // not exact in float: how it is rounded shows
  static constexpr size_t kRoomNbytes = 16 << 20;

  Player& player_;
  Transport& transport_;
  const int n_, me_;
  const uint64_t seed_;
  const size_t shift_;
  const int root_;
  const ReduceOp reduce_op_;
  Room room_;
};

}  // namespace

void play_case(Player& player) {
  const int which = static_cast<int>(player.draw(12));
  if (which >= 10) return play_fused_cases(player);
  switch (player.draw(5)) {
    case 0:
      return Case<float>(player).play(which);
    case 1:
      return Case<double>(player).play(which);
    case 2:
      return Case<int64_t>(player).play(which);
    case 3:
      return Case<int16_t>(player).play(which);
  }
  Case<uint8_t>(player).play(which);
}

}  // namespace primitives::native_tests
