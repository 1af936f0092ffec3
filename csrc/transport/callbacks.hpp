// Threads that complete futures, so that a callback may wait for anything: no thread that moves
// data ever runs one.
#pragma once

#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>

namespace primitives {

// As many threads as callbacks that are blocked at one time; idle ones are kept until stop().
class Callbacks : public std::enable_shared_from_this<Callbacks> {
 public:
  using Task = std::function<void()>;

  void run(Task task);
  // No task is queued or running, but for the one that asks.
  bool idle();
  // Lets the threads end, each after what it is doing.
  void stop();

 private:
  void loop();

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  size_t num_running_ = 0;
  size_t num_waiting_ = 0;  // threads without a task
  bool stopping_ = false;
};

}  // namespace primitives
