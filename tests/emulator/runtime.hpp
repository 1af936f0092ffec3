// The CUDA runtime as csrc/collectives/cuda/ needs it, on the host: for what is around the kernels.
// Device memory is memory of the process that others can map, its IPC handle the name; a stream is
// a thread; a kernel is the device code, block by block. (Block b waits for other ranks' block b
// only, so one after the other is a possible order.)
#pragma once

#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>

namespace emulator {

class Stream {
 public:
  Stream();
  ~Stream();
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  void launch(std::function<void()> kernel);
  // How many were launched, and have ended, so far; and the wait until so many have ended.
  uint64_t num_launched();
  uint64_t num_ended();
  void wait_for(uint64_t number);
  bool captured = false;  // as if into a graph

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> kernels_;
  uint64_t num_launched_ = 0, num_ended_ = 0;
  bool stopping_ = false;
  std::thread thread_;
};

// The legacy default stream; and the stream behind a cudaStream_t: one of these, or 1 for that one.
Stream& legacy_stream();
Stream& stream_of(void* handle);

// The next call of the calling thread that is named so ("allocate", "export", "map", "copy") fails.
void fail_next(const char* call);

}  // namespace emulator
