// Work of the backend, and the thread that runs asynchronous collectives in the order of their
// calls.
#pragma once

#include <ATen/ATen.h>

#include <condition_variable>
#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <vector>

#include "transport/callbacks.hpp"
#include "transport/caller.hpp"

namespace primitives {

// A future of torch's WorkResult, as a number: how `future` ended.
c10::intrusive_ptr<c10::ivalue::Future> result_of(c10::ivalue::Future& future);

// The error of a wait that ends before what it waits for.
[[noreturn]] void throw_wait_timeout(std::chrono::milliseconds timeout);

// One collective or message: done when its outputs hold the result. Its future is completed by
// `callbacks`.
class Work : public c10d::Work {
 public:
  Work(c10d::OpType type, std::vector<at::Tensor> outputs, std::shared_ptr<Callbacks> callbacks);

  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override {}
  void abort() override;
  std::vector<at::Tensor> result() override { return outputs_; }
  int sourceRank() const override { return source_rank_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFutureResult() override;

  // Called once, by whoever ran it.
  void complete(std::exception_ptr error = nullptr);
  void set_source_rank(int rank) { source_rank_ = rank; }

 private:
  std::vector<at::Tensor> outputs_;
  std::shared_ptr<Callbacks> callbacks_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;  // made when somebody asks
  int source_rank_ = -1;
};

// Several works as one (endCoalescing).
class WorkBatch : public c10d::Work {
 public:
  explicit WorkBatch(std::vector<c10::intrusive_ptr<c10d::Work>> works);

  bool isCompleted() override;
  bool isSuccess() const override;
  std::exception_ptr exception() const override;
  bool wait(std::chrono::milliseconds timeout = kNoTimeout) override;
  void synchronize() override {}
  std::vector<at::Tensor> result() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;
  c10::intrusive_ptr<c10::ivalue::Future> getFutureResult() override;

 private:
  std::vector<c10::intrusive_ptr<c10d::Work>> works_;
};

// Runs jobs one at a time in the order they came: asynchronous ones on its thread, a synchronous
// one on the caller's when nothing is queued. No job may need the GIL.
class WorkQueue {
 public:
  using Job = std::function<void()>;

  ~WorkQueue() { stop(); }
  void run_async(c10::intrusive_ptr<Work> work, Job job);
  // Throws what the job throws.
  void run_sync(const Job& job);
  bool idle();
  // Ends the thread after the running job; queued jobs are dropped, their works failed.
  void stop();

 private:
  struct Entry {
    c10::intrusive_ptr<Work> work;
    Job job;
    const Site* site;
  };
  void loop();
  void run_queued(std::unique_lock<std::mutex>& lock);

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Entry> entries_;
  bool busy_ = false;  // a job is running, on either thread
  bool stopping_ = false;
  std::thread thread_;  // started by the first asynchronous job
};

}  // namespace primitives
