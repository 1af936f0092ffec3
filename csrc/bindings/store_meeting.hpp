// A c10d Store as the place where the ranks of a group meet.
#pragma once

#include <string>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <utility>

#include "transport/group.hpp"

namespace primitives {

class StoreMeeting : public Meeting {
 public:
  explicit StoreMeeting(c10::intrusive_ptr<c10d::Store> store) : store_(std::move(store)) {}
  void set(const std::string& key, const std::string& value) override { store_->set(key, value); }
  std::string get(const std::string& key) override { return store_->get_to_str(key); }
  bool has(const std::string& key) override { return store_->check({key}); }
  int64_t add(const std::string& key, int64_t value) override { return store_->add(key, value); }

 private:
  c10::intrusive_ptr<c10d::Store> store_;
};

}  // namespace primitives
