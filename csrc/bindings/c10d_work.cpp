#include "bindings/c10d_work.hpp"

#include <ATen/core/grad_mode.h>
#include <pthread.h>

#include "bindings/c10d_errors.hpp"
#include "transport/errors.hpp"

namespace primitives {
namespace {

c10::intrusive_ptr<c10::ivalue::Future> new_future() {
  return c10::make_intrusive<c10::ivalue::Future>(c10::ListType::create(c10::TensorType::get()));
}

// Waits until `done`, but for signals of the program: their handlers run in between.
template <class Done>
void wait_with_signals(std::condition_variable& changed, std::unique_lock<std::mutex>& lock,
                       Done done) {
  while (!changed.wait_for(lock, std::chrono::milliseconds(100), done)) {
    lock.unlock();
    check_signals();
    lock.lock();
  }
}

}  // namespace

c10::intrusive_ptr<c10::ivalue::Future> result_of(c10::ivalue::Future& future) {
  return future.then(
      [](c10::ivalue::Future& ended) {
        auto result = c10d::WorkResult::SUCCESS;
        try {
          if (ended.hasError()) std::rethrow_exception(ended.exception_ptr());
        } catch (const PythonError& error) {
          result = error.is_timeout() ? c10d::WorkResult::TIMEOUT : c10d::WorkResult::COMM_ERROR;
        } catch (...) {
          result = c10d::WorkResult::COMM_ERROR;
        }
        return c10::IValue(static_cast<int64_t>(result));
      },
      c10::IntType::get());
}

void throw_wait_timeout(std::chrono::milliseconds timeout) {
  translated([&]() -> void {
    throw TransportError(Failure::kTimeout, "Work.wait: not done after " +
                                                std::to_string(timeout.count()) +
                                                " ms; the operation goes on");
  });
  std::abort();
}

Work::Work(c10d::OpType type, std::vector<at::Tensor> outputs, std::shared_ptr<Callbacks> callbacks)
    : c10d::Work(-1, type), outputs_(std::move(outputs)), callbacks_(std::move(callbacks)) {}

bool Work::wait(std::chrono::milliseconds timeout) {
  std::unique_lock<std::mutex> lock(mutex_);
  auto done = [&] { return completed_; };
  if (timeout == kNoTimeout) {
    wait_with_signals(cv_, lock, done);
  } else if (!cv_.wait_for(lock, timeout, done)) {
    lock.unlock();
    throw_wait_timeout(timeout);
  }
  const auto future = future_;
  lock.unlock();
  if (future) future->wait();  // a moment at most: it is on its way
  if (exception_) std::rethrow_exception(exception_);
  return true;
}

void Work::abort() { TORCH_CHECK(false, "abort the process group, not one of its works"); }

c10::intrusive_ptr<c10::ivalue::Future> Work::getFuture() {
  std::unique_lock<std::mutex> lock(mutex_);
  if (future_) return future_;
  future_ = new_future();
  if (!completed_) return future_;
  const auto future = future_;
  lock.unlock();
  if (exception_) {
    future->setError(exception_);
  } else {
    future->markCompleted(c10::IValue(outputs_));
  }
  return future;
}

c10::intrusive_ptr<c10::ivalue::Future> Work::getFutureResult() { return result_of(*getFuture()); }

void Work::complete(std::exception_ptr error) {
  std::unique_lock<std::mutex> lock(mutex_);
  completed_ = true;
  exception_ = error;
  const auto future = future_;  // one made from now on is completed by getFuture()
  lock.unlock();
  cv_.notify_all();
  if (!future) return;
  callbacks_->run([future, error, outputs = outputs_] {
    if (error) {
      future->setError(error);
    } else {
      future->markCompleted(c10::IValue(outputs));
    }
  });
}

WorkBatch::WorkBatch(std::vector<c10::intrusive_ptr<c10d::Work>> works)
    : c10d::Work(-1, c10d::OpType::COALESCED), works_(std::move(works)) {}

bool WorkBatch::isCompleted() {
  for (const auto& work : works_) {
    if (!work->isCompleted()) return false;
  }
  return true;
}

bool WorkBatch::isSuccess() const {
  for (const auto& work : works_) {
    if (!work->isSuccess()) return false;
  }
  return true;
}

std::exception_ptr WorkBatch::exception() const {
  for (const auto& work : works_) {
    if (auto error = work->exception()) return error;
  }
  return nullptr;
}

bool WorkBatch::wait(std::chrono::milliseconds timeout) {
  for (const auto& work : works_) work->wait(timeout);
  return true;
}

std::vector<at::Tensor> WorkBatch::result() {
  std::vector<at::Tensor> tensors;
  for (const auto& work : works_) {
    for (auto& tensor : work->result()) tensors.push_back(tensor);
  }
  return tensors;
}

c10::intrusive_ptr<c10::ivalue::Future> WorkBatch::getFuture() {
  struct Pending {
    std::atomic<size_t> num_left;
    std::atomic<bool> failed{false};
  };
  auto pending = std::make_shared<Pending>();
  pending->num_left = works_.size();
  auto future = new_future();
  if (works_.empty()) future->markCompleted(c10::IValue(std::vector<at::Tensor>{}));
  for (const auto& work : works_) {
    work->getFuture()->addCallback(
        [pending, future, tensors = result()](c10::ivalue::Future& part) {
          if (part.hasError()) {
            if (!pending->failed.exchange(true)) future->setError(part.exception_ptr());
          }
          if (pending->num_left.fetch_sub(1) == 1 && !pending->failed) {
            future->markCompleted(c10::IValue(tensors));
          }
        });
  }
  return future;
}

c10::intrusive_ptr<c10::ivalue::Future> WorkBatch::getFutureResult() {
  return result_of(*getFuture());
}

void WorkQueue::run_async(c10::intrusive_ptr<Work> work, Job job) {
  const Site* site = this_site();
  std::unique_lock<std::mutex> lock(mutex_);
  if (stopping_) throw TransportError(Failure::kOther, "the process group is destroyed");
  entries_.push_back({std::move(work), std::move(job), site});
  if (!thread_.joinable()) thread_ = std::thread([this] { loop(); });
  changed_.notify_all();
}

void WorkQueue::run_sync(const Job& job) {
  std::unique_lock<std::mutex> lock(mutex_);
  // Entries that are queued now go first: collectives keep the order of their calls.
  wait_with_signals(changed_, lock, [&] { return stopping_ || (!busy_ && entries_.empty()); });
  if (stopping_) throw TransportError(Failure::kOther, "the process group is destroyed");
  busy_ = true;
  lock.unlock();
  struct Release {
    WorkQueue& queue;
    ~Release() {
      std::lock_guard<std::mutex> lock(queue.mutex_);
      queue.busy_ = false;
      queue.changed_.notify_all();
    }
  } release{*this};
  job();
}

bool WorkQueue::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return !busy_ && entries_.empty();
}

void WorkQueue::stop() {
  std::deque<Entry> dropped;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    dropped.swap(entries_);
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
  for (Entry& entry : dropped) {
    try {
      throw TransportError(Failure::kOther, "the process group was destroyed before this ran");
    } catch (...) {
      entry.work->complete(current_python_error());
    }
  }
}

void WorkQueue::loop() {
  pthread_setname_np(pthread_self(), "primitives");
  const at::NoGradGuard no_grad;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    changed_.wait(lock, [&] { return stopping_ || (!busy_ && !entries_.empty()); });
    if (stopping_) return;
    busy_ = true;
    run_queued(lock);
    busy_ = false;
    changed_.notify_all();
  }
}

void WorkQueue::run_queued(std::unique_lock<std::mutex>& lock) {
  while (!stopping_ && !entries_.empty()) {
    Entry entry = std::move(entries_.front());
    entries_.pop_front();
    lock.unlock();
    std::exception_ptr error;
    try {
      const SiteScope site(entry.site);
      entry.job();
    } catch (...) {
      error = current_python_error();
    }
    entry.job = nullptr;  // lets the tensors go before the caller wakes
    entry.work->complete(error);
    entry.work.reset();
    lock.lock();
  }
}

}  // namespace primitives
