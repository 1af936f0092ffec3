// The life of a backend: meeting, queueing, splitting, leaving. The collectives are in
// c10d_collectives.cpp.
#include "bindings/c10d_backend.hpp"

#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <mutex>
#include <set>

#include "bindings/c10d_errors.hpp"
#include "bindings/store_meeting.hpp"

namespace primitives {
namespace {

std::vector<int> members_of(const std::vector<uint64_t>& global_ranks) {
  return {global_ranks.begin(), global_ranks.end()};
}

std::mutex backends_mutex;
std::set<Backend*>& backends() {
  static auto* all = new std::set<Backend*>;  // outlives every backend
  return *all;
}

}  // namespace

Backend::Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
                 c10::intrusive_ptr<Options> options)
    : c10d::Backend(rank, world_size), options_(std::move(options)) {
  StoreMeeting meeting(store);
  std::string name = options_->group_desc.empty() || options_->group_desc == "undefined"
                         ? options_->group_name
                         : options_->group_desc;
  group_ = translated([&] {
    return std::make_unique<Group>(
        meeting, GroupOptions{rank, world_size, name, options_->shm_dir, options_->timeout,
                              members_of(options_->global_ranks_in_group)});
  });
  mailbox_ = std::make_unique<Mailbox>(*group_);
  init();
  std::lock_guard<std::mutex> lock(backends_mutex);
  backends().insert(this);
}

Backend::~Backend() {
  {
    std::lock_guard<std::mutex> lock(backends_mutex);
    backends().erase(this);
  }
  close(Milliseconds(30000));
  if (!group_->forked()) return;
  // The threads stayed in the parent: here they can be neither joined nor detached.
  static_cast<void>(mailbox_.release());
  static_cast<void>(queue_.release());
}

void Backend::close(Milliseconds limit) {
  if (group_->forked()) return;
  // The queue's thread may need the GIL to end a callback.
  std::optional<pybind11::gil_scoped_release> no_gil;
  if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
  std::lock_guard<std::mutex> lock(close_mutex_);
  const auto end = Clock::now() + limit;
  auto idle = [&] { return queue_->idle() && mailbox_->idle() && callbacks_->idle(); };
  while (!group_->failed() && !idle()) {
    if (Clock::now() >= end) group_->abort("it left with operations unfinished");
    std::this_thread::sleep_for(Milliseconds(1));
  }
  callbacks_->stop();
  queue_->stop();
  mailbox_->stop();
  group_->close();
}

void close_all_backends(Milliseconds limit) {
  std::vector<Backend*> all;
  {
    std::lock_guard<std::mutex> lock(backends_mutex);
    all.assign(backends().begin(), backends().end());
  }
  const auto end = Clock::now() + limit;
  for (Backend* backend : all) {
    const auto left = std::chrono::duration_cast<Milliseconds>(end - Clock::now());
    backend->close(std::max(left, Milliseconds(0)));
  }
}

Backend::WorkPtr Backend::run(c10d::OpType type, bool async, Tensors outputs, Job job) {
  return translated([&]() -> WorkPtr {
    group_->check();
    auto work = c10::make_intrusive<Work>(type, std::move(outputs), callbacks_);
    if (async || coalescing_) {
      queue_->run_async(work, std::move(job));
      if (coalescing_) coalesced_.push_back(work);
    } else {
      queue_->run_sync(job);
      work->complete();
    }
    return work;
  });
}

Milliseconds Backend::resolve(Milliseconds timeout) const {
  return timeout == c10d::kUnsetTimeout || timeout == kNoTimeout ? options_->timeout : timeout;
}

void Backend::startCoalescing() {
  coalescing_ = true;
  coalesced_.clear();
}

Backend::WorkPtr Backend::endCoalescing() {
  coalescing_ = false;
  return c10::make_intrusive<WorkBatch>(std::exchange(coalesced_, {}));
}

c10::intrusive_ptr<c10d::Backend> Backend::split(
    const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
    const c10::intrusive_ptr<c10d::Backend::Options>& options) {
  const auto mine = std::find(ranks.begin(), ranks.end(), getRank());
  if (mine == ranks.end()) return nullptr;
  auto copy = c10::make_intrusive<Options>(*options_);
  copy->timeout = options->timeout;
  copy->group_name = options->group_name;
  copy->group_desc = options->group_desc;
  copy->global_ranks_in_group = options->global_ranks_in_group;
  return c10::make_intrusive<Backend>(store, static_cast<int>(mine - ranks.begin()),
                                      static_cast<int>(ranks.size()), std::move(copy));
}

c10d::ErrorType Backend::getError() {
  switch (group_->failure()) {
    case Failure::kNone:
      return c10d::ErrorType::SUCCESS;
    case Failure::kTimeout:
      return c10d::ErrorType::TIMEOUT;
    case Failure::kPeerLost:
      return c10d::ErrorType::REMOTE_ERROR;
    case Failure::kMismatch:
    case Failure::kOther:
      return c10d::ErrorType::COMM_ERROR;
  }
  return c10d::ErrorType::COMM_ERROR;
}

void Backend::abort() { group_->abort("abort() was called"); }

}  // namespace primitives
