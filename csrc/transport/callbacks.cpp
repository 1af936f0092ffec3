#include "transport/callbacks.hpp"

#include <pthread.h>

#include <thread>

namespace primitives {
namespace {

thread_local const Callbacks* running_for = nullptr;

}  // namespace

void Callbacks::run(Task task) {
  std::lock_guard<std::mutex> lock(mutex_);
  tasks_.push_back(std::move(task));
  if (tasks_.size() <= num_waiting_) {
    changed_.notify_one();
  } else {  // each thread keeps this object alive: it may outlive the backend
    std::thread([self = shared_from_this()] { self->loop(); }).detach();
  }
}

bool Callbacks::idle() {
  std::lock_guard<std::mutex> lock(mutex_);
  return tasks_.empty() && num_running_ == (running_for == this ? 1 : 0);
}

void Callbacks::stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  stopping_ = true;
  changed_.notify_all();
}

void Callbacks::loop() {
  pthread_setname_np(pthread_self(), "primitives-then");
  running_for = this;
  std::unique_lock<std::mutex> lock(mutex_);
  for (;;) {
    num_waiting_++;
    changed_.wait(lock, [&] { return stopping_ || !tasks_.empty(); });
    num_waiting_--;
    if (tasks_.empty()) return;
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    num_running_++;
    lock.unlock();
    task();
    task = nullptr;  // lets the tensors go before anybody sees this thread idle
    lock.lock();
    num_running_--;
  }
}

}  // namespace primitives
