// A function with a stack of its own that can be left and entered again.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <functional>
#include <memory>

namespace emulator {

class Fiber {
 public:
  Fiber() : stack_(new char[kStackNbytes]) {}
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Another function from its beginning; what ran before is forgotten where it stands.
  void begin(std::function<void()> body) {
    body_ = std::move(body);
    getcontext(&first_);
    first_.uc_stack.ss_sp = stack_.get();
    first_.uc_stack.ss_size = kStackNbytes;
    first_.uc_link = nullptr;
    const auto self = reinterpret_cast<size_t>(this);
    makecontext(&first_, reinterpret_cast<void (*)()>(&Fiber::enter), 2,
                static_cast<unsigned>(self >> 32), static_cast<unsigned>(self));
    begun_ = false;
  }

  // Runs until the body suspends or ends.
  __attribute__((noinline)) void resume() {
    if (_setjmp(outside_) != 0) return;
    if (begun_) _longjmp(inside_, 1);
    begun_ = true;
    setcontext(&first_);
  }

  // Called by the body.
  __attribute__((noinline)) void suspend() {
    if (_setjmp(inside_) == 0) _longjmp(outside_, 1);
  }

 private:
  static constexpr size_t kStackNbytes = 64 << 10;

  static void enter(unsigned high, unsigned low) {
    auto* self = reinterpret_cast<Fiber*>(static_cast<size_t>(high) << 32 | low);
    self->body_();
    _longjmp(self->outside_, 1);
  }

  std::unique_ptr<char[]> stack_;
  std::function<void()> body_;
  ucontext_t first_;
  jmp_buf outside_, inside_;
  bool begun_ = false;
};

}  // namespace emulator
