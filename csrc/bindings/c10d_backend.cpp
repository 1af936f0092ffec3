// The life of a backend: meeting, queueing, splitting, leaving. The collectives are in
// c10d_collectives.cpp.
#include "bindings/c10d_backend.hpp"

#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <mutex>

#include "bindings/c10d_errors.hpp"
#include "bindings/make_transport.hpp"

namespace primitives {
namespace {

std::vector<int> members_of(const std::vector<uint64_t>& global_ranks) {
  return {global_ranks.begin(), global_ranks.end()};
}

std::mutex backends_mutex;
std::vector<Backend*>& backends() {
  static auto* all = new std::vector<Backend*>;  // oldest first; outlives every backend
  return *all;
}

}  // namespace

Backend::Backend(const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
                 c10::intrusive_ptr<Options> options, const std::vector<std::string>& host_of_rank,
                 const c10::intrusive_ptr<c10d::Backend>& wire)
    : c10d::Backend(rank, world_size), store_(store), options_(std::move(options)) {
  std::string name = options_->group_desc.empty() || options_->group_desc == "undefined"
                         ? options_->group_name
                         : options_->group_desc;
  transport_ = make_transport(store,
                              {rank, world_size, name, options_->shm_dir, options_->timeout,
                               members_of(options_->global_ranks_in_group)},
                              host_of_rank, wire);
  group_ = &transport_->group();
  init();
  std::lock_guard<std::mutex> lock(backends_mutex);
  backends().push_back(this);
}

Backend::~Backend() {
  {
    std::lock_guard<std::mutex> lock(backends_mutex);
    std::erase(backends(), this);
  }
  close(Milliseconds(30000));
  if (!group_->forked()) return;
  // The threads stayed in the parent: here they can be neither joined nor detached.
  static_cast<void>(device_.release());
  static_cast<void>(transport_.release());
  static_cast<void>(queue_.release());
}

void Backend::close(Milliseconds limit) {
  if (group_->forked()) return;
  // The queue's thread may need the GIL to end a callback.
  std::optional<pybind11::gil_scoped_release> no_gil;
  if (Py_IsInitialized() && PyGILState_Check()) no_gil.emplace();
  std::lock_guard<std::mutex> lock(close_mutex_);
  const auto end = Clock::now() + limit;
  auto idle = [&] { return queue_->idle() && transport_->idle() && callbacks_->idle(); };
  while (!group_->failed() && !idle()) {
    if (Clock::now() >= end) group_->abort("it left with operations unfinished");
    std::this_thread::sleep_for(Milliseconds(1));
  }
  callbacks_->stop();
  queue_->stop();
  if (device_) device_->drain();
  transport_->close();
  if (device_) device_->close();
}

std::shared_ptr<SymmetricHeap> heap_of_world() {
  std::lock_guard<std::mutex> lock(backends_mutex);
  if (backends().empty()) {
    throw TransportError(Failure::kOther, "symmetric memory needs a primitives process group");
  }
  return backends().front()->heap();
}

void close_all_backends(Milliseconds limit) {
  std::vector<Backend*> all;
  {
    std::lock_guard<std::mutex> lock(backends_mutex);
    all = backends();
  }
  const auto end = Clock::now() + limit;
  for (Backend* backend : all) {
    const auto left = std::chrono::duration_cast<Milliseconds>(end - Clock::now());
    backend->close(std::max(left, Milliseconds(0)));
  }
}

Backend::WorkPtr Backend::run(c10d::OpType type, bool async, const at::Tensor& like,
                              Tensors outputs, Job job) {
  return translated([&]() -> WorkPtr {
    group_->check();
    if (like.defined() && !like.device().is_cpu()) {
      return run_on_stream(type, like.device(), std::move(outputs), job);
    }
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

c10::intrusive_ptr<Backend::Options> Backend::options_of(
    const c10d::Backend::Options& options) const {
  auto copy = c10::make_intrusive<Options>(*options_);
  copy->timeout = options.timeout;
  copy->group_name = options.group_name;
  copy->group_desc = options.group_desc;
  copy->global_ranks_in_group = options.global_ranks_in_group;
  return copy;
}

c10::intrusive_ptr<c10d::Backend> Backend::create(const c10::intrusive_ptr<c10d::Store>& store,
                                                  int rank, int world_size,
                                                  const c10::intrusive_ptr<Options>& options) {
  const pybind11::gil_scoped_acquire gil;  // Python knows which ranks are on which host
  return pybind11::module_::import("primitives.backend")
      .attr("create")(store, rank, world_size, options)
      .cast<c10::intrusive_ptr<Backend>>();
}

// torch asks once for each kind of device, with one store; one backend serves them all.
c10::intrusive_ptr<c10d::Backend> Backend::made_for(
    const c10::intrusive_ptr<c10d::Store>& store,
    const std::function<c10::intrusive_ptr<c10d::Backend>()>& make) {
  if (last_made_ && last_made_->first == store) {
    if (auto backend = last_made_->second.lock()) return backend;
  }
  auto backend = make();
  last_made_.emplace(store, backend);
  return backend;
}

c10::intrusive_ptr<c10d::Backend> Backend::split(
    const c10::intrusive_ptr<c10d::Store>& store, const std::vector<int>& ranks,
    const c10::intrusive_ptr<c10d::Backend::Options>& options) {
  const auto mine = std::find(ranks.begin(), ranks.end(), getRank());
  if (mine == ranks.end()) return nullptr;
  return made_for(store, [&] {
    return create(store, static_cast<int>(mine - ranks.begin()), static_cast<int>(ranks.size()),
                  options_of(*options));
  });
}

c10::intrusive_ptr<c10d::Backend> Backend::merge(
    const c10::intrusive_ptr<c10d::Store>& store,
    const c10::intrusive_ptr<c10d::Backend::Options>& options, const int& rank,
    const int& world_size) {
  return made_for(store, [&] { return create(store, rank, world_size, options_of(*options)); });
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
    case Failure::kOtherHost:
    case Failure::kOther:
      return c10d::ErrorType::COMM_ERROR;
  }
  return c10d::ErrorType::COMM_ERROR;
}

void Backend::abort() { group_->abort("abort() was called"); }

}  // namespace primitives
