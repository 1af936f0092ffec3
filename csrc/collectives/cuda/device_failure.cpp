// What a kernel reports, as the failure of the group. See [Note: device watch].
#ifdef PRIMITIVES_CUDA
#include <unistd.h>

#include <cstring>

#include "collectives/cuda/device_transport.hpp"
#include "transport/operations.hpp"

namespace primitives {
namespace {

constexpr Milliseconds kWatchPeriod{20};
constexpr int kTellPatience = 100;  // periods, for the words of the rank that found the failure

uint32_t acquire(const uint32_t* word) { return __atomic_load_n(word, __ATOMIC_ACQUIRE); }

// In the order of DType; then those that can only be moved.
constexpr const char* kDtypes[] = {
    "float32", "float64", "float16", "bfloat16", "int8", "uint8",     "int16",     "int32",
    "int64",   "uint16",  "uint32",  "uint64",   "bool", "complex32", "complex64", "complex128"};

std::string dtype_named(uint8_t number) {
  if (number <= static_cast<uint8_t>(DType::kBool)) return kDtypes[number];
  for (const char* name : kDtypes) {
    if (moved_dtype(name) == number) return name;
    for (const char* target : kDtypes) {  // of a fused all_gather
      const std::string cast = std::string(name) + ">" + target;
      if (moved_dtype(cast.c_str()) == number) return cast;
    }
  }
  return "another dtype";
}

// A letter of exchange.hpp: the call of one side of a mismatch.
std::string describe_letter(const uint64_t* letter) {
  const auto op = static_cast<Op>(letter[0] & 0xff);
  const auto reduce_op = static_cast<ReduceOp>(letter[0] >> 16 & 0xff);
  const int root = static_cast<int>(letter[0] >> 32 & 0xff) - 1;
  std::string text = op_name(op);
  if (op == Op::kBarrier) return text;
  text += "(";
  if (reduce_op != ReduceOp::kNone) text += std::string(reduce_op_name(reduce_op)) + ", ";
  const bool fused = op == Op::kAllGatherMany || op == Op::kReduceScatterMany;
  text += dtype_named(static_cast<uint8_t>(letter[0] >> 8)) + ", ";
  if (fused) {
    char digest[32];
    std::snprintf(digest, sizeof digest, "%08x", static_cast<uint32_t>(letter[1]));
    text += std::to_string(letter[3]) + " tensors cut as " + digest;
  } else {
    text += std::to_string(letter[1] != 0 ? letter[1] : letter[3]) + " bytes";
  }
  if (root >= 0) text += ", root " + std::to_string(root);
  if (reduce_op == ReduceOp::kPremulSum || op == Op::kReduceScatterMany) {
    double factor;
    std::memcpy(&factor, &letter[2], sizeof factor);
    text += ", factor " + std::to_string(factor);
  }
  return text + ")";
}

}  // namespace

uint8_t moved_dtype(const char* name) {
  uint32_t hash = 0;
  for (const char* c = name; *c != '\0'; c++) hash = hash * 31 + static_cast<uint8_t>(*c);
  return static_cast<uint8_t>(128 + hash % 128);
}

void DeviceTransport::check() {
  group().check();
  if (ranks_.status != nullptr && acquire(&ranks_.status->state) == 2) report();
}

std::string DeviceTransport::describe_missing(uint32_t missing) const {
  std::string text;
  for (int r = 0; r < ranks_.world_size; r++) {
    if (missing >> r & 1) text += "; missing: " + describe_rank(r);
  }
  return text;
}

std::string DeviceTransport::describe_call(uint32_t seq) const {
  const std::lock_guard<std::mutex> lock(launched_mutex_);
  const Launched& of = launched_[seq % launched_.size()];
  return describe(of.call, nullptr, 0) + (of.site == nullptr ? "" : at_site(of.site->text));
}

std::string DeviceTransport::describe_failure(Failure* failure) const {
  const primitives_cuda_status& status = *ranks_.status;
  const Group& group = host_.group();
  const bool own = status.rank == ranks_.rank;
  const std::string what = own ? describe_call(status.seq) : op_name(static_cast<Op>(status.op));
  const std::string where = group.named(status.rank) + " of group '" + group.name() + "' in " +
                            what + ", collective " + std::to_string(status.seq) + " on its device";
  *failure = Failure::kTimeout;
  switch (static_cast<primitives_cuda_failure>(status.failure)) {
    case PRIMITIVES_CUDA_TIMEOUT:
      return where + ", reached the timeout of its call" + describe_missing(status.missing);
    case PRIMITIVES_CUDA_ABORTED:
      *failure = Failure::kPeerLost;
      for (int r = 0; r < ranks_.world_size; r++) {
        if (has_gone(r)) return describe_rank(r) + ", is gone; " + where + ", still needs it";
      }
      return where + ", gave up, since the group had failed";
    case PRIMITIVES_CUDA_MISMATCH:
      *failure = Failure::kMismatch;
      return "collective " + std::to_string(status.seq) + " on the devices of group '" +
             group.name() + "' differs between ranks; " + group.named(status.rank) + ": " + what +
             "; " + group.named(status.peer) + ": " + describe_letter(status.theirs);
    case PRIMITIVES_CUDA_TOLD:
      return where + ", failed" + describe_missing(status.missing);
  }
  return where + ", failed";
}

void DeviceTransport::report() {
  Group& of = group();
  if (ranks_.status->failure == PRIMITIVES_CUDA_TOLD) {
    for (int i = 0; i < kTellPatience && !of.failed(); i++) usleep(kWatchPeriod.count() * 1000);
  }
  Failure failure;
  const std::string text = describe_failure(&failure);
  of.fail(failure, text);
}

void DeviceTransport::watch() {
  const Group& of = host_.group();
  std::unique_lock<std::mutex> lock(mutex_);
  while (!changed_.wait_for(lock, kWatchPeriod, [&] { return closing_; })) {
    if (acquire(&ranks_.status->state) == 2) {
      try {
        report();
      } catch (const TransportError&) {
        return;  // all ranks know
      }
    }
    bool lost = of.failed();
    for (int r = 0; r < ranks_.world_size; r++) lost = lost || has_gone(r);
    if (lost) __atomic_store_n(&ranks_.status->abort, 1u, __ATOMIC_RELEASE);
  }
}

}  // namespace primitives
#endif
