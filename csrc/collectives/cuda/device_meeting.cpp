// How the ranks come to see each other's segments, and how they leave. See [Note: device segments].
#ifdef PRIMITIVES_CUDA
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "collectives/cuda/device_transport.hpp"
#include "transport/device_sharing.hpp"

namespace primitives {
namespace {

constexpr int kMaxGroups = 4;  // whose kernels may wait at a time: of tp, dp, pp and the world
constexpr Milliseconds kLeavePatience{2000};

// What a rank tells the others.
struct Card {
  primitives_cuda_error error;        // text: why it cannot take part; else ""
  primitives_cuda_error unreachable;  // text: why its memory cannot be mapped; else ""
  DeviceHandle handle;
  primitives_cuda_gpu gpu;
  int32_t pid;
  uint64_t start_time;
  char* segment;  // in its own address space
};
static_assert(std::is_trivially_copyable_v<Card>);

template <class T>
std::vector<T> all_gather_values(Transport& host, const T& mine, Milliseconds timeout) {
  const int n = host.group().world_size();
  std::vector<T> all(n);
  std::vector<Part> parts;
  for (T& value : all) parts.push_back({&value, sizeof value});
  Call call;
  call.op = Op::kAllGather;
  std::snprintf(call.dtype, sizeof call.dtype, "device segment");
  call.numel = sizeof mine;
  host.all_gather(call, &mine, sizeof mine, parts, timeout);
  return all;
}

// Blocks of a kernel of each of the ranks on a device; 0: there are too many ranks.
int blocks_of(int num_multiprocessors, std::ptrdiff_t sharers) {
  int blocks = 0;
  for (int groups = kMaxGroups; groups > 0 && blocks == 0; groups--) {
    blocks = primitives_cuda_max_blocks(num_multiprocessors, static_cast<int>(sharers), groups);
  }
  return blocks;
}

// What the ranks say, if any says something: "rank 1: out of memory; rank 2: ..."
template <class T, class TextOf>
std::string texts_of(const Group& group, const std::vector<T>& values, TextOf text_of) {
  std::string all;
  for (int r = 0; r < group.world_size(); r++) {
    const char* found = text_of(values[r]);
    if (*found != '\0') all += (all.empty() ? "" : "; ") + group.named(r) + ": " + found;
  }
  return all;
}

}  // namespace

DeviceTransport::DeviceTransport(Transport& host, int device, CurrentStream stream,
                                 Milliseconds timeout)
    : host_(host), device_(device), stream_(std::move(stream)) {
  try {
    meet(timeout);
  } catch (...) {
    close();
    throw;
  }
  watch_ = std::thread([this] { watch(); });
}

void DeviceTransport::meet(Milliseconds timeout) {
  const int n = group().world_size(), me = group().rank();
  if (n > PRIMITIVES_CUDA_MAX_RANKS) {
    throw Unreachable("expected up to 8 ranks, got " + std::to_string(n));
  }
  ranks_.rank = me;
  ranks_.world_size = n;
  ranks_.slot_nbytes = PRIMITIVES_CUDA_SLOT_NBYTES;
  ranks_.block_nbytes = PRIMITIVES_CUDA_BLOCK_NBYTES;
  ranks_.one_shot_nbytes = PRIMITIVES_CUDA_ONE_SHOT_NBYTES;
  ranks_.direct_nbytes = PRIMITIVES_CUDA_DIRECT_NBYTES;
  mapped_.assign(n, false);

  const ProcessId self = this_process();
  Card card{};
  card.pid = self.pid;
  card.start_time = self.start_time;
  void* status = nullptr;
  const size_t nbytes = primitives_cuda_segment_nbytes(ranks_.slot_nbytes);
  const bool ready = primitives_cuda_gpu_of(device_, &card.gpu, &card.error) == 0 &&
                     primitives_cuda_load(device_, &card.error) == 0 &&
                     primitives_cuda_make_event(device_, &last_, &card.error) == 0 &&
                     primitives_cuda_allocate_pinned(device_, sizeof(primitives_cuda_status),
                                                     &status, &card.error) == 0 &&
                     allocate_shared(device_, nbytes, &ranks_.segments[me], &card.error) &&
                     primitives_cuda_clear(device_, ranks_.segments[me], nbytes, &card.error) == 0;
  if (ready) {
    card.error.text[0] = '\0';
    export_shared(device_, ranks_.segments[me], &card.handle, &card.unreachable);
  }
  ranks_.status = static_cast<primitives_cuda_status*>(status);
  card.segment = ranks_.segments[me];

  const std::vector<Card> cards = all_gather_values(host_, card, timeout);
  const std::string errors = texts_of(group(), cards, [](const Card& of) { return of.error.text; });
  if (!errors.empty()) {
    throw TransportError(Failure::kOther, "group '" + group().name() +
                                              "' cannot be used on CUDA devices: " + errors);
  }

  auto same_gpu = [&](const Card& a, const Card& b) {
    return std::memcmp(a.gpu.uuid, b.gpu.uuid, sizeof a.gpu.uuid) == 0;
  };
  primitives_cuda_error error{};
  ranks_.max_blocks = PRIMITIVES_CUDA_MAX_BLOCKS;
  for (int r = 0; r < n; r++) {
    const Card& of = cards[r];
    const auto sharers = std::count_if(cards.begin(), cards.end(),
                                       [&](const Card& other) { return same_gpu(of, other); });
    ranks_.max_blocks = std::min(ranks_.max_blocks, blocks_of(of.gpu.num_multiprocessors, sharers));
    if (r == me || error.text[0] != '\0') continue;
    if (of.pid == card.pid && of.start_time == card.start_time) {
      ranks_.segments[r] = of.segment;
      if (!same_gpu(of, card)) {
        std::snprintf(error.text, sizeof error.text,
                      "expected the device of rank %d, which is in the same process", r);
      }
      continue;
    }
    primitives_cuda_error cause = of.unreachable;
    mapped_[r] = of.unreachable.text[0] == '\0' &&
                 map_shared(device_, of.handle, &ranks_.segments[r], &cause);
    if (!mapped_[r]) {
      std::snprintf(error.text, sizeof error.text, "the memory of rank %d cannot be mapped: %.160s",
                    r, cause.text);
    }
  }
  if (ranks_.max_blocks == 0) {
    std::snprintf(error.text, sizeof error.text,
                  "expected a multiprocessor for each rank that shares a device");
  }
  const auto reached = all_gather_values(host_, error, timeout);
  const std::string why =
      texts_of(group(), reached, [](const primitives_cuda_error& of) { return of.text; });
  if (!why.empty()) {
    unmap();  // before anybody frees it
    host_.barrier(timeout);
    throw Unreachable(why);
  }
  has_met_ = true;
  heap_ = std::make_shared<DeviceHeap>(group(), device_, mapped_);
}

void DeviceTransport::drain() {
  primitives_cuda_error error;
  if (last_ != nullptr) primitives_cuda_synchronize(device_, last_, &error);
}

void DeviceTransport::unmap() {
  for (int r = 0; r < static_cast<int>(mapped_.size()); r++) {
    if (mapped_[r]) unmap_shared(device_, ranks_.segments[r]);
    mapped_[r] = false;
  }
}

void DeviceTransport::close() {
  drain();
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (closing_) return;
    closing_ = true;
  }
  changed_.notify_all();
  if (watch_.joinable()) watch_.join();
  unmap();
  if (heap_) heap_->unmap();
  tables_.free(device_);
  if (last_ != nullptr) primitives_cuda_destroy_event(device_, std::exchange(last_, nullptr));
  if (void* status = std::exchange(ranks_.status, nullptr); status != nullptr) {
    primitives_cuda_free_pinned(device_, status);
  }
  char* segment = ranks_.segments[ranks_.rank];
  if (segment == nullptr) return;
  const auto all_gone = [&] {
    for (int r = 0; r < ranks_.world_size; r++) {
      if (r != ranks_.rank && !has_gone(r)) return false;
    }
    return true;
  };
  const auto end = Clock::now() + kLeavePatience;
  while (has_met_ && !all_gone() && Clock::now() < end) usleep(1000);
  // A peer that is still there may be reading: then the end of the process frees it.
  if (heap_) heap_->leave(all_gone());
  if (!has_met_ || all_gone()) free_shared(device_, segment);
}

}  // namespace primitives
#endif
