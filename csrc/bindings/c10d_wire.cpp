#include "bindings/c10d_wire.hpp"

#include <ATen/ATen.h>

#include <algorithm>
#include <string>

#include "transport/mailbox.hpp"

namespace primitives {

class C10dWire::Message final : public Wire::Pending {
 public:
  Message(C10dWire& wire, WorkPtr work) : wire_(wire), work_(std::move(work)) {}

  int wait(Clock::time_point deadline) override {
    const auto left = std::chrono::duration_cast<Milliseconds>(deadline - Clock::now());
    {
      const std::lock_guard<std::mutex> lock(wire_.mutex_);
      if (wire_.aborted_) throw WireError("aborted");
      wire_.waited_for_.insert(work_.get());
    }
    std::string error;
    try {
      if (!work_->wait(std::max(left, Milliseconds(1)))) error = "aborted";
    } catch (const std::exception& broken) {
      error = broken.what();
      error = error.substr(0, error.find('\n'));  // without torch's stack
    }
    {
      const std::lock_guard<std::mutex> lock(wire_.mutex_);
      wire_.waited_for_.erase(work_.get());
    }
    if (!error.empty()) throw WireError(error);
    return work_->retrieveOpType() == c10d::OpType::SEND ? -1 : work_->sourceRank();
  }

 private:
  C10dWire& wire_;
  WorkPtr work_;
};

template <class Post>
Wire::PendingPtr C10dWire::post(void* data, size_t nbytes, Post&& post) {
  c10::intrusive_ptr<c10d::Backend> engine;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (aborted_ || !engine_) throw WireError("aborted");
    engine = engine_;
  }
  std::vector<at::Tensor> bytes{at::from_blob(data, {static_cast<int64_t>(nbytes)}, at::kByte)};
  try {
    return std::make_unique<Message>(*this, post(*engine, bytes));
  } catch (const std::exception& broken) {
    const std::string text = broken.what();
    throw WireError(text.substr(0, text.find('\n')));
  }
}

Wire::PendingPtr C10dWire::send(const void* data, size_t nbytes, int dst, int tag) {
  return post(const_cast<void*>(data), nbytes,
              [&](c10d::Backend& engine, auto& bytes) { return engine.send(bytes, dst, tag); });
}

Wire::PendingPtr C10dWire::recv(void* data, size_t nbytes, int src, int tag) {
  return post(data, nbytes, [&](c10d::Backend& engine, auto& bytes) {
    return src == kAnySource ? engine.recvAnysource(bytes, tag) : engine.recv(bytes, src, tag);
  });
}

void C10dWire::abort() {
  const std::lock_guard<std::mutex> lock(mutex_);
  aborted_ = true;
  for (c10d::Work* work : waited_for_) work->abort();
}

void C10dWire::close() {
  c10::intrusive_ptr<c10d::Backend> engine;
  const std::lock_guard<std::mutex> lock(mutex_);
  engine.swap(engine_);
}

}  // namespace primitives
