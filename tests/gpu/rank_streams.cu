// Plays collectives of the CUDA device code on one GPU, for Python (ctypes): each rank is a stream.
// Buffers come from the host and go back to it; on the device they begin at the same distance from
// a multiple of 256 bytes.
#include <cuda_runtime.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "collectives/cuda/launch.h"
#include "collectives/cuda/table.hpp"

// (In no namespace, or the function that takes them would have a name of its own.)
struct Region {
  char* begin;
  uint64_t nbytes;
};

namespace {

using Ranks = primitives_cuda_ranks;
using Call = primitives_cuda_call;
using Status = primitives_cuda_status;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

void check(int code, const primitives_cuda_error& error) {
  if (code != 0) throw std::runtime_error(error.text);
}

// The buffers of the host, each with its copy on the device.
class Buffers {
 public:
  Buffers(const Region* regions, int num_regions) {
    std::vector<Region> sorted(regions, regions + num_regions);
    std::sort(sorted.begin(), sorted.end(), [](const Region& a, const Region& b) {
      return a.begin != b.begin ? a.begin < b.begin : a.nbytes > b.nbytes;
    });
    for (const Region& region : sorted) {
      if (region.nbytes == 0 || at_device(region.begin) != nullptr) continue;  // a part of another
      char* memory;
      check(cudaMalloc(&memory, region.nbytes + 256), "cudaMalloc");
      memories_.push_back(memory);
      char* copy = memory + reinterpret_cast<uintptr_t>(region.begin) % 256;
      check(cudaMemcpy(copy, region.begin, region.nbytes, cudaMemcpyHostToDevice), "to the device");
      copies_[region.begin] = {copy, region.nbytes};
    }
  }
  ~Buffers() {
    for (char* memory : memories_) cudaFree(memory);
  }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  char* at_device(const char* host) const {
    auto after = copies_.upper_bound(const_cast<char*>(host));
    if (after == copies_.begin()) return nullptr;
    const auto& [begin, copy] = *std::prev(after);
    return host < begin + copy.nbytes ? copy.begin + (host - begin) : nullptr;
  }
  void copy_back() const {
    for (const auto& [begin, copy] : copies_) {
      check(cudaMemcpy(begin, copy.begin, copy.nbytes, cudaMemcpyDeviceToHost), "to the host");
    }
  }

 private:
  std::vector<char*> memories_;
  std::map<char*, Region> copies_;
};

// A fused call with all its memory on the device.
primitives_cuda_many on_device(const primitives_cuda_many& many, int n, const Buffers& buffers) {
  const primitives::cuda::TableLayout of{static_cast<size_t>(n), many.num_tensors};
  std::vector<uint64_t> words(many.table, many.table + of.num_words());
  for (size_t i = of.ins(); i < of.places(); i++) {  // addresses
    words[i] = reinterpret_cast<uintptr_t>(
        buffers.at_device(reinterpret_cast<const char*>(static_cast<uintptr_t>(words[i]))));
  }
  const auto moved = [&](auto* p) {
    return reinterpret_cast<decltype(p)>(buffers.at_device(reinterpret_cast<const char*>(p)));
  };
  primitives_cuda_many made = many;
  made.table = moved(many.table);
  made.squares = moved(many.squares);
  made.partials = moved(many.partials);
  check(
      cudaMemcpy(made.table, words.data(), words.size() * sizeof(uint64_t), cudaMemcpyHostToDevice),
      "a table");
  return made;
}

// What a rank owns on the device.
struct Rank {
  char* segment = nullptr;
  Status* status = nullptr;  // pinned, and the same address on the device
  cudaStream_t stream = nullptr;
  cudaEvent_t last = nullptr;

  Rank(uint32_t slot_nbytes, const Status& begin) {
    const size_t nbytes = primitives_cuda_segment_nbytes(slot_nbytes);
    check(cudaMalloc(&segment, nbytes), "cudaMalloc of a segment");
    check(cudaMemset(segment, 0, nbytes), "cudaMemset");
    check(cudaHostAlloc(&status, sizeof(Status), cudaHostAllocMapped), "cudaHostAlloc");
    *status = begin;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "cudaStreamCreate");
    check(cudaEventCreateWithFlags(&last, cudaEventDisableTiming), "cudaEventCreate");
  }
  ~Rank() {
    cudaEventDestroy(last);
    cudaStreamDestroy(stream);
    cudaFreeHost(status);
    cudaFree(segment);
  }
  Rank(const Rank&) = delete;
  Rank& operator=(const Rank&) = delete;
};

// Waits without blocking, so that a kernel that never ends is an error.
void wait_for(const std::vector<std::unique_ptr<Rank>>& ranks, std::chrono::nanoseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  for (const auto& rank : ranks) {
    while (true) {
      const cudaError_t status = cudaStreamQuery(rank->stream);
      if (status == cudaSuccess) break;
      if (status != cudaErrorNotReady) check(status, "kernel");
      if (std::chrono::steady_clock::now() > deadline) throw std::runtime_error("no end");
      std::this_thread::sleep_for(std::chrono::microseconds(50));
    }
  }
}

}  // namespace

// Plays num_calls calls of every rank, ranks[r] and calls[r * num_calls + i]; dead_rank makes none
// from dead_from on. Segments and chunks are those of this process. Returns 0, or 1 with `report`
// set.
extern "C" int play_on_gpu(int num_calls, int dead_rank, int dead_from, const Ranks* ranks,
                           const Call* calls, const Region* regions, int num_regions, char* report,
                           int capacity) {
  try {
    primitives_cuda_error error;
    check(primitives_cuda_load(0, &error), error);
    const int n = ranks[0].world_size;
    Buffers buffers(regions, num_regions);
    std::vector<std::unique_ptr<Rank>> own;
    for (int r = 0; r < n; r++) {
      own.push_back(std::make_unique<Rank>(ranks[r].slot_nbytes, *ranks[r].status));
    }
    std::vector<Call> calls_on_device(calls, calls + n * num_calls);
    for (Call& call : calls_on_device) {
      for (int s = 0; s < n; s++) {
        call.in[s] = buffers.at_device(call.in[s]);
        call.out[s] = buffers.at_device(const_cast<char*>(call.out[s]));
      }
      if (call.many.table != nullptr) call.many = on_device(call.many, n, buffers);
    }
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    for (int i = 0; i < num_calls; i++) {
      for (int r = 0; r < n; r++) {
        if (r == dead_rank && i >= dead_from) continue;
        Ranks seen = ranks[r];
        const Call& call = calls_on_device[r * num_calls + i];
        for (int s = 0; s < n; s++) {
          seen.segments[s] = own[s]->segment;
          for (char*& chunk : seen.chunks[s]) chunk = buffers.at_device(chunk);
        }
        seen.status = own[r]->status;
        check(primitives_cuda_launch(0, &seen, call, own[r]->stream, own[r]->last, &error), error);
      }
    }
    wait_for(own, std::chrono::nanoseconds(ranks[0].timeout_ns) * (num_calls + 1) +
                      std::chrono::seconds(60));
    buffers.copy_back();
    for (int r = 0; r < n; r++) *ranks[r].status = *own[r]->status;
  } catch (const std::exception& error) {
    snprintf(report, capacity, "%s", error.what());
    return 1;
  }
  return 0;
}
