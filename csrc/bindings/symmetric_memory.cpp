// torch.distributed._symmetric_memory on the CPU: its allocator, on the heap of the world.
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/symm_mem/SymmetricMemory.hpp>

#include "bindings/bindings.hpp"
#include "bindings/c10d_backend.hpp"

namespace primitives {
namespace {

namespace symm_mem = c10d::symmetric_memory;

// The buffers of all ranks of one group. A signal is a word per channel and sender in the
// receiver's pad: 1 when it was sent and not yet received.
class Buffers : public symm_mem::SymmetricMemory {
 public:
  Buffers(c10::intrusive_ptr<Backend> backend, std::shared_ptr<SymmetricHeap> heap,
          std::vector<void*> buffers, size_t nbytes, size_t pad_offset)
      : backend_(std::move(backend)),
        heap_(std::move(heap)),
        buffers_(std::move(buffers)),
        nbytes_(nbytes) {
    for (void* buffer : buffers_) pads_.push_back(static_cast<char*>(buffer) + pad_offset);
  }

  std::vector<void*> get_buffer_ptrs() override { return buffers_; }
  std::vector<void*> get_signal_pad_ptrs() override { return pads_; }
  void** get_buffer_ptrs_dev() override { return buffers_.data(); }
  void** get_signal_pad_ptrs_dev() override { return pads_.data(); }
  size_t get_buffer_size() override { return nbytes_; }
  size_t get_offset() override { return 0; }
  bool has_multicast_support() override { return false; }
  void* get_multicast_ptr() override { return nullptr; }
  int get_rank() override { return backend_->getRank(); }
  int get_world_size() override { return backend_->getSize(); }
  c10::Device get_device() override { return c10::Device(c10::kCPU); }
  bool world_within_direct_access() override { return true; }

  void put_signal(int dst_rank, int channel, size_t timeout_ms) override {
    exchange(signal(dst_rank, channel, get_rank()), 0, 1, timeout_ms,
             "put_signal to rank " + std::to_string(dst_rank));
  }
  void wait_signal(int src_rank, int channel, size_t timeout_ms) override {
    exchange(signal(get_rank(), channel, src_rank), 1, 0, timeout_ms,
             "wait_signal from rank " + std::to_string(src_rank));
  }
  void barrier(int channel, size_t timeout_ms) override {
    const int n = get_world_size(), me = get_rank();
    for (int j = 1; j < n; j++) put_signal((me + j) % n, channel, timeout_ms);
    for (int j = 1; j < n; j++) wait_signal((me + j) % n, channel, timeout_ms);
  }

 private:
  std::atomic<uint32_t>& signal(int dst, int channel, int src) {
    const size_t index = static_cast<size_t>(channel) * get_world_size() + src;
    TORCH_CHECK_VALUE(channel >= 0 && (index + 1) * sizeof(uint32_t) <= get_signal_pad_size(),
                      "symmetric memory: expected a channel that fits the signal pad of ",
                      get_signal_pad_size(), " bytes, got ", channel);
    TORCH_CHECK_VALUE(std::max(dst, src) < get_world_size() && std::min(dst, src) >= 0,
                      "symmetric memory: expected a rank in [0, ", get_world_size(), "), got ",
                      dst == get_rank() ? src : dst);
    return static_cast<std::atomic<uint32_t>*>(pads_[dst])[index];
  }

  // Waits until the word is `from` and makes it `to`. No timeout means that of the group.
  void exchange(std::atomic<uint32_t>& word, uint32_t from, uint32_t to, size_t timeout_ms,
                const std::string& what) {
    const Milliseconds timeout =
        timeout_ms > 0 ? Milliseconds(timeout_ms) : backend_->getBackendOptions()->timeout;
    const auto deadline = Clock::now() + timeout;
    for (int num_tries = 0;; num_tries++) {
      uint32_t expected = from;
      if (word.compare_exchange_strong(expected, to, std::memory_order_acq_rel)) return;
      if (num_tries < 1000) {
        std::this_thread::yield();
        continue;
      }
      backend_->check();
      translated([&] {
        if (Clock::now() < deadline) return;
        throw TransportError(Failure::kTimeout, "rank " + std::to_string(get_rank()) + ": " + what +
                                                    " passed its " + "deadline of " +
                                                    std::to_string(timeout.count()) + " ms");
      });
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }

  c10::intrusive_ptr<Backend> backend_;
  std::shared_ptr<SymmetricHeap> heap_;
  std::vector<void*> buffers_, pads_;
  size_t nbytes_;
};

class Allocator : public symm_mem::SymmetricMemoryAllocator {
 public:
  void* alloc(size_t nbytes, int, const std::optional<std::string>& group_name) override {
    return translated([&] {
      auto heap = group_name ? backend_of(*group_name)->heap() : heap_of_world();
      const size_t pad_offset = (nbytes + 63) & ~size_t{63};
      const size_t pad_nbytes = symm_mem::get_signal_pad_size();
      void* data = heap->allocate(pad_offset + pad_nbytes);
      std::memset(static_cast<char*>(data) + pad_offset, 0, pad_nbytes);
      std::lock_guard<std::mutex> lock(mutex_);
      allocations_[data] = {std::move(heap), nbytes, pad_offset, {}};
      return data;
    });
  }

  void free(void* data) override {
    Allocation freed;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto found = allocations_.find(data);
      if (found == allocations_.end()) return;
      freed = std::move(found->second);
      allocations_.erase(found);
    }
    freed.heap->free(data);
  }

  size_t get_alloc_size(void* data) override { return find(data).nbytes; }

  // Collective over the group: every rank tells where in the heap its buffer lies.
  c10::intrusive_ptr<symm_mem::SymmetricMemory> rendezvous(
      void* data, const std::optional<std::string>& group_name) override {
    TORCH_CHECK_VALUE(group_name, "symmetric memory: rendezvous needs a group");
    Allocation mine = find(data);
    if (const auto made = mine.buffers.find(*group_name); made != mine.buffers.end()) {
      return made->second;
    }
    const auto backend = backend_of(*group_name);
    const int n = backend->getSize();
    at::Tensor all = at::empty({n, 4}, at::kLong), own = at::empty({4}, at::kLong);
    int64_t* place = own.mutable_data_ptr<int64_t>();
    place[0] = mine.heap->rank();
    place[1] = static_cast<int64_t>(mine.heap->offset_of(data, 1));
    place[2] = static_cast<int64_t>(mine.nbytes);
    place[3] = static_cast<int64_t>(std::hash<std::string>{}(mine.heap->segment_name()));
    backend->_allgather_base(all, own, {})->wait();
    std::vector<void*> buffers;
    for (int r = 0; r < n; r++) {
      const int64_t* of = all.const_data_ptr<int64_t>() + 4 * r;
      TORCH_CHECK_VALUE(
          of[2] == place[2] && of[3] == place[3],
          "symmetric memory: expected tensors of one size and heap on all ranks, got ", of[2],
          " bytes on rank ", r, " and ", place[2], " bytes on rank ", backend->getRank(),
          of[3] == place[3] ? "" : ", in another group's heap");
      buffers.push_back(mine.heap->at(static_cast<int>(of[0]), of[1]));
    }
    auto made = c10::make_intrusive<Buffers>(backend, mine.heap, std::move(buffers), mine.nbytes,
                                             mine.pad_offset);
    std::lock_guard<std::mutex> lock(mutex_);
    allocations_.at(data).buffers[*group_name] = made;
    return made;
  }

  bool has_multicast_support(int) override { return false; }
  c10::DeviceType supported_device_type() override { return c10::kCPU; }
  std::string name() override { return "PRIMITIVES"; }
  bool has_allocation(void* data) {  // overrides; torch 2.11 does not ask yet
    std::lock_guard<std::mutex> lock(mutex_);
    return allocations_.contains(data);
  }

 private:
  struct Allocation {
    std::shared_ptr<SymmetricHeap> heap;
    size_t nbytes = 0, pad_offset = 0;
    std::map<std::string, c10::intrusive_ptr<symm_mem::SymmetricMemory>> buffers;  // by group
  };

  static c10::intrusive_ptr<Backend> backend_of(const std::string& group_name) {
    const auto group = c10d::resolve_process_group(group_name);
    auto backend = c10::dynamic_intrusive_pointer_cast<Backend>(group->getBackend(c10::kCPU));
    TORCH_CHECK_VALUE(backend, "symmetric memory: expected a group of the primitives backend, got ",
                      group->getBackendName());
    return backend;
  }

  Allocation find(void* data) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto found = allocations_.find(data);
    TORCH_CHECK_VALUE(found != allocations_.end(),
                      "symmetric memory: expected memory of symm_mem.empty()");
    return found->second;
  }

  std::mutex mutex_;
  std::map<void*, Allocation> allocations_;
};

}  // namespace

void bind_symmetric_memory(py::module_&) {
  if (symm_mem::has_allocator(c10::kCPU)) return;  // another extension was first
  symm_mem::register_allocator(c10::kCPU, c10::make_intrusive<Allocator>());
}

}  // namespace primitives
