// Another c10d backend, as gloo, as the wire between hosts.
#pragma once

#include <memory>
#include <mutex>
#include <set>
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include "collectives/wire.hpp"

namespace primitives {

class C10dWire final : public Wire {
 public:
  // `engine`: of all ranks of the group; any backend with send and recv.
  explicit C10dWire(c10::intrusive_ptr<c10d::Backend> engine) : engine_(std::move(engine)) {}

  PendingPtr send(const void* data, size_t nbytes, int dst, int tag) override;
  PendingPtr recv(void* data, size_t nbytes, int src, int tag) override;
  void abort() override;
  void close() override;

 private:
  class Message;
  using WorkPtr = c10::intrusive_ptr<c10d::Work>;

  template <class Post>
  PendingPtr post(void* data, size_t nbytes, Post&& post);

  std::mutex mutex_;
  c10::intrusive_ptr<c10d::Backend> engine_;
  std::set<c10d::Work*> waited_for_;
  bool aborted_ = false;
};

}  // namespace primitives
