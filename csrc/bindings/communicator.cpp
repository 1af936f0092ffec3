// The collectives on the memory of Python objects, without torch.distributed: what
// primitives.communicator.Communicator is made of. No logic: parse, release the GIL, forward.
#include <pybind11/stl.h>

#include <cstdio>
#include <future>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string_view>

#include "bindings/bindings.hpp"
#include "bindings/buffer.hpp"
#include "bindings/c10d_errors.hpp"
#include "bindings/c10d_tensors.hpp"
#include "bindings/device_buffer.hpp"
#include "bindings/make_transport.hpp"

namespace primitives {
namespace {

using Access = Buffer::Access;
using Counts = std::optional<std::vector<int64_t>>;
using StorePtr = c10::intrusive_ptr<c10d::Store>;
// A cudaStream_t as the caller gives it; none: the legacy default stream, and the call waits.
using Stream = std::optional<uintptr_t>;

constexpr uintptr_t kLegacyStream = 1;  // as cudaStreamLegacy, and in DLPack

ReduceOp reduce_op_named(std::string_view name) {
  for (int i = static_cast<int>(ReduceOp::kSum); i <= static_cast<int>(ReduceOp::kBxor); i++) {
    if (name == reduce_op_name(static_cast<ReduceOp>(i))) return static_cast<ReduceOp>(i);
  }
  throw std::invalid_argument(
      "op: expected sum, avg, premul_sum, product, min, max, band, bor or bxor, got '" +
      std::string(name) + "'");
}

// `buffer` in n runs: equal ones, or of `counts` elements.
std::vector<Part> cut(const Buffer& buffer, int n, const Counts& counts, const char* what) {
  std::vector<Part> parts(n);
  size_t total = 0;
  for (int r = 0; r < n; r++) {
    const size_t numel = !counts ? buffer.numel() / n : r < std::ssize(*counts) ? (*counts)[r] : 0;
    parts[r] = {buffer.data() + total * buffer.itemsize(), numel * buffer.itemsize()};
    total += numel;
  }
  const bool bad = counts && (std::ssize(*counts) != n ||
                              std::ranges::any_of(*counts, [](int64_t c) { return c < 0; }));
  if (!bad && total == buffer.numel()) return parts;
  throw std::invalid_argument(std::string(what) + ": expected " +
                              (counts ? std::to_string(n) + " counts that sum to " +
                                            std::to_string(buffer.numel()) + " elements, got " +
                                            c10::str(*counts)
                                      : "a multiple of " + std::to_string(n) + " elements, got " +
                                            std::to_string(buffer.numel())));
}

class Communicator {
 public:
  Communicator(const StorePtr& store, int rank, int world_size, double timeout_s,
               const std::string& name, const std::string& shm_dir,
               const std::vector<std::string>& host_of_rank,
               const c10::intrusive_ptr<c10d::Backend>& wire) {
    if (world_size < 1 || rank < 0 || rank >= world_size) {
      throw PythonError(PyExc_ValueError, "Communicator: expected 0 <= rank < world_size, got " +
                                              std::to_string(rank) + " and " +
                                              std::to_string(world_size));
    }
    timeout_ = Milliseconds(static_cast<int64_t>(timeout_s * 1e3));
    rank_ = rank;
    world_size_ = world_size;
    name_ = name;
    const py::gil_scoped_release no_gil;
    transport_ =
        make_transport(store, {rank, world_size, name, shm_dir, timeout_}, host_of_rank, wire);
  }

  ~Communicator() {
    close();
    if (!transport_->group().forked()) return;
    // Threads stayed in the parent of a fork: here they can be neither joined nor detached.
    static_cast<void>(device_.release());
    static_cast<void>(transport_.release());
  }

  int rank() const { return rank_; }
  int world_size() const { return world_size_; }
  const std::string& name() const { return name_; }
  uint64_t num_zero_copy() const {
    return transport_->group().num_zero_copy() + (device_ ? device_->num_zero_copy() : 0);
  }

  void close() {
    if (transport_->group().forked()) return;
    const py::gil_scoped_release no_gil;
    if (device_) device_->drain();
    transport_->close();
    if (device_) device_->close();
  }

  void abort(const std::string& why) { transport_->group().abort(why); }

  void all_gather(py::handle out, py::handle shard, const Counts& counts, const Stream& stream) {
    call(stream, [&](Locked lock) {
      const Buffer to(out, Access::kWrite, "all_gather: out", lock.stream());
      const Buffer from(shard, Access::kRead, "all_gather: shard", lock.stream());
      to.check_like(from);
      if (!counts) to.check_numel(from.numel() * world_size());
      const auto parts = cut(to, world_size(), counts, "all_gather: out");
      if (counts) from.check_numel((*counts)[rank()]);
      to.check_apart(from, parts[rank()].data);
      Call call = make_call(Op::kAllGather, from.dtype(), from.numel());
      call.has_counts = counts.has_value();
      lock(from, [&](Transport& on) {
        on.all_gather(call, from.data(), from.nbytes(), parts, timeout_);
      });
    });
  }

  void reduce_scatter(py::handle out, py::handle full, std::string_view op, const Counts& counts,
                      double factor, const Stream& stream) {
    call(stream, [&](Locked lock) {
      const Buffer to(out, Access::kWrite, "reduce_scatter: out", lock.stream());
      const Buffer from(full, Access::kRead, "reduce_scatter: full", lock.stream());
      to.check_like(from);
      if (!counts) from.check_numel(to.numel() * world_size());
      const auto parts = cut(from, world_size(), counts, "reduce_scatter: full");
      if (counts) to.check_numel((*counts)[rank()]);
      // The parts of other ranks are read while this rank's result is written.
      if (to.data() != parts[rank()].data) to.check_apart(from);
      Call call = make_call(Op::kReduceScatter, from.dtype(), from.numel());
      call.has_counts = counts.has_value();
      const Reduction reduction =
          make_reduction(call, from.dtype(), reduce_op_named(op), factor, world_size());
      lock(from,
           [&](Transport& on) { on.reduce_scatter(call, parts, to.data(), reduction, timeout_); });
    });
  }

  void all_reduce(py::handle data, std::string_view op, double factor, const Stream& stream) {
    call(stream, [&](Locked lock) {
      const Buffer buffer(data, Access::kWrite, "all_reduce: data", lock.stream());
      Call call = make_call(Op::kAllReduce, buffer.dtype(), buffer.numel());
      const Reduction reduction =
          make_reduction(call, buffer.dtype(), reduce_op_named(op), factor, world_size());
      lock(buffer, [&](Transport& on) {
        on.all_reduce(call, buffer.data(), buffer.nbytes(), reduction, timeout_);
      });
    });
  }

  void all_to_all(py::handle out, py::handle data, const Counts& out_counts,
                  const Counts& data_counts, const Stream& stream) {
    call(stream, [&](Locked lock) {
      const Buffer to(out, Access::kWrite, "all_to_all: out", lock.stream());
      const Buffer from(data, Access::kRead, "all_to_all: data", lock.stream());
      to.check_like(from);
      to.check_apart(from);
      const auto out_parts = cut(to, world_size(), out_counts, "all_to_all: out");
      const auto in_parts = cut(from, world_size(), data_counts, "all_to_all: data");
      Call call = make_call(Op::kAllToAll, from.dtype(), from.numel());
      call.has_counts = true;  // one rank's counts may be even where another's are not
      lock(from, [&](Transport& on) { on.all_to_all(call, in_parts, out_parts, timeout_); });
    });
  }

  void broadcast(py::handle data, int root, const Stream& stream) {
    call(stream, [&](Locked lock) {
      check_rank(root, "broadcast: root");
      const Buffer buffer(data, rank() == root ? Access::kRead : Access::kWrite, "broadcast: data",
                          lock.stream());
      const Call call = make_call(Op::kBroadcast, buffer.dtype(), buffer.numel(), root);
      lock(buffer,
           [&](Transport& on) { on.broadcast(call, buffer.data(), buffer.nbytes(), timeout_); });
    });
  }

  void reduce(py::handle data, int root, std::string_view op, double factor, const Stream& stream) {
    call(stream, [&](Locked lock) {
      check_rank(root, "reduce: root");
      const Buffer buffer(data, rank() == root ? Access::kWrite : Access::kRead, "reduce: data",
                          lock.stream());
      Call call = make_call(Op::kReduce, buffer.dtype(), buffer.numel(), root);
      const Reduction reduction =
          make_reduction(call, buffer.dtype(), reduce_op_named(op), factor, world_size());
      lock(buffer, [&](Transport& on) {
        on.reduce(call, buffer.data(), buffer.nbytes(), reduction, timeout_);
      });
    });
  }

  void gather(py::object out, py::handle shard, int root, const Stream& stream) {
    call(stream, [&](Locked lock) {
      check_rank(root, "gather: root");
      const Buffer from(shard, Access::kRead, "gather: shard", lock.stream());
      std::optional<Buffer> to;
      std::vector<Part> parts;
      if (rank() == root) {
        to.emplace(out, Access::kWrite, "gather: out", lock.stream());
        to->check_like(from);
        to->check_numel(from.numel() * world_size());
        parts = cut(*to, world_size(), {}, "gather: out");
        to->check_apart(from, parts[rank()].data);
      }
      const Call call = make_call(Op::kGather, from.dtype(), from.numel(), root);
      lock(from,
           [&](Transport& on) { on.gather(call, from.data(), from.nbytes(), parts, timeout_); });
    });
  }

  void scatter(py::handle out, py::object full, int root, const Stream& stream) {
    call(stream, [&](Locked lock) {
      check_rank(root, "scatter: root");
      const Buffer to(out, Access::kWrite, "scatter: out", lock.stream());
      std::optional<Buffer> from;
      std::vector<Part> parts;
      if (rank() == root) {
        from.emplace(full, Access::kRead, "scatter: full", lock.stream());
        to.check_like(*from);
        from->check_numel(to.numel() * world_size());
        parts = cut(*from, world_size(), {}, "scatter: full");
        if (to.data() != parts[rank()].data) to.check_apart(*from);
      }
      const Call call = make_call(Op::kScatter, to.dtype(), to.numel(), root);
      lock(to, [&](Transport& on) { on.scatter(call, parts, to.data(), to.nbytes(), timeout_); });
    });
  }

  at::Tensor empty(const std::vector<int64_t>& shape, at::ScalarType dtype) {
    void* data = nullptr;
    call({}, [&](Locked lock) {
      const Call call = make_call(Op::kEmpty, dtype, numel_of(shape));
      lock([&] { data = transport_->empty(call, call.numel * call.itemsize, timeout_); });
    });
    return in_heap(transport_->group().heap(), data, shape, dtype);
  }

  // `index`: -1 is the thread's current device.
  at::Tensor empty_on_device(const std::vector<int64_t>& shape, at::ScalarType dtype, int index,
                             const Stream& stream) {
    std::shared_ptr<void> data;
    const KeepCurrentDevice current;
    if (index < 0) index = current.device();
    call(stream, [&](Locked lock) {
      const Call call = make_call(Op::kEmpty, dtype, numel_of(shape));
      lock([&] {
        StreamTransport& device = on_device(index, lock.stream());
        data = allocate_on_all(*transport_, world_size(), device, call, timeout_);
      });
    });
    return tensor_in(std::move(data), shape, dtype,
                     at::Device(at::kCUDA, static_cast<at::DeviceIndex>(index)));
  }

  void barrier() {
    call({}, [&](Locked lock) {
      lock([&] {
        if (device_) device_->drain();
        transport_->barrier(timeout_);
      });
    });
  }

  void send(py::handle data, int dst, int tag, const Stream& stream) {
    call(stream, [&](Locked lock) {
      check_rank(dst, "send: dst");
      const Buffer buffer(data, Access::kRead, "send: data", lock.stream());
      std::vector<char> copy;
      const void* sent = buffer.data();
      if (buffer.device() >= 0) {
        copy.resize(buffer.nbytes());
        sent = copy.data();
        lock.copy(buffer, copy.data(), buffer.data());
      }
      wait_for([&](Mailbox::Done done) {
        transport_->send(sent, envelope_of(buffer, tag), dst, timeout_, std::move(done));
      });
    });
  }

  int recv(py::handle data, std::optional<int> src, int tag, const Stream& stream) {
    int from = -1;
    call(stream, [&](Locked lock) {
      if (src) check_rank(*src, "recv: src");
      const Buffer buffer(data, Access::kWrite, "recv: data", lock.stream());
      std::vector<char> copy(buffer.device() >= 0 ? buffer.nbytes() : 0);
      void* received = buffer.device() >= 0 ? copy.data() : buffer.data();
      from = wait_for([&](Mailbox::Done done) {
        transport_->recv(received, envelope_of(buffer, tag), src.value_or(kAnySource), timeout_,
                         std::move(done));
      });
      if (buffer.device() >= 0) lock.copy(buffer, buffer.data(), copy.data());
    });
    return from;
  }

 private:
  // Runs a collective without the GIL, one at a time.
  struct Locked {
    Communicator& of;
    const Stream given;

    // For the memory of devices.
    uintptr_t stream() const { return given ? *given : kLegacyStream; }

    template <class F>
    void operator()(F&& collective) const {
      py::gil_scoped_release no_gil;
      const std::lock_guard<std::mutex> lock(of.mutex_);
      collective();
    }
    // ... on the transport for `buffer`; without a stream of the caller, until the result is there.
    template <class F>
    void operator()(const Buffer& buffer, F&& collective) const {
      (*this)([&] {
        if (buffer.device() < 0) return collective(*of.transport_);
        const KeepCurrentDevice current;
        StreamTransport& device = of.on_device(buffer.device(), stream());
        device.check();
        collective(device);
        if (given) return;
        device.drain();
        device.check();
      });
    }
    // Between the host and the device of `buffer`, in the order of the stream; waits for it.
    void copy(const Buffer& buffer, void* to, const void* from) const {
      py::gil_scoped_release no_gil;
      copy_on_stream(buffer.device(), to, from, buffer.nbytes(), stream());
    }
  };

  template <class F>
  void call(const Stream& stream, F&& body) {
    translated([&]() -> void {
      body(Locked{*this, stream == Stream(0) ? Stream(kLegacyStream) : stream});
    });
  }

  // The first call on a device is a meeting of all ranks.
  StreamTransport& on_device(int device, uintptr_t stream) {
    stream_ = reinterpret_cast<void*>(stream);
    if (!device_) {
      device_ = make_device_transport(
          *transport_, {rank_, world_size_, device, [this] { return stream_; }, timeout_, warn});
      device_index_ = device;
    }
    if (device == device_index_) return *device_;
    throw std::invalid_argument("expected memory on cuda:" + std::to_string(device_index_) +
                                ", the device of this communicator's first call, got memory on "
                                "cuda:" +
                                std::to_string(device));
  }

  // Posts a message and waits until it is there; the rank it came from.
  template <class F>
  int wait_for(F&& post) {
    py::gil_scoped_release no_gil;
    auto arrived = std::make_shared<std::promise<int>>();
    auto source = arrived->get_future();
    post([arrived](std::exception_ptr error, int src) {
      error ? arrived->set_exception(error) : arrived->set_value(src);
    });
    return source.get();
  }

  static Envelope envelope_of(const Buffer& buffer, int tag) {
    Envelope envelope{};
    envelope.nbytes = buffer.nbytes();
    envelope.numel = buffer.numel();
    envelope.tag = tag;
    const Call call = make_call(Op::kSend, buffer.dtype(), buffer.numel());
    std::snprintf(envelope.dtype, sizeof envelope.dtype, "%s", call.dtype);
    return envelope;
  }

  void check_rank(int rank, const char* what) const {
    if (rank >= 0 && rank < world_size()) return;
    throw std::invalid_argument(std::string(what) + ": expected a rank in [0, " +
                                std::to_string(world_size()) + "), got " + std::to_string(rank));
  }

  Milliseconds timeout_;
  int rank_, world_size_;
  std::string name_;
  std::unique_ptr<Transport> transport_;
  std::mutex mutex_;
  std::unique_ptr<StreamTransport> device_;  // after the first call on a CUDA device
  int device_index_ = -1;
  void* stream_ = nullptr;  // of the call that runs on it
};

}  // namespace

void bind_communicator(py::module_& m) {
  using namespace py::literals;
  py::class_<Communicator>(m, "Communicator")
      .def(py::init<const StorePtr&, int, int, double, const std::string&, const std::string&,
                    const std::vector<std::string>&, const c10::intrusive_ptr<c10d::Backend>&>(),
           "store"_a, "rank"_a, "world_size"_a, "timeout_s"_a, "name"_a, "shm_dir"_a,
           "host_of_rank"_a = std::vector<std::string>{}, "wire"_a = py::none())
      .def_property_readonly("rank", &Communicator::rank)
      .def_property_readonly("world_size", &Communicator::world_size)
      .def_property_readonly("name", &Communicator::name)
      .def_property_readonly("num_zero_copy", &Communicator::num_zero_copy)
      .def("all_gather", &Communicator::all_gather, "out"_a, "shard"_a, "counts"_a = py::none(),
           "stream"_a = py::none())
      .def("reduce_scatter", &Communicator::reduce_scatter, "out"_a, "full"_a, "op"_a = "sum",
           "counts"_a = py::none(), "factor"_a = 1.0, "stream"_a = py::none())
      .def("all_reduce", &Communicator::all_reduce, "data"_a, "op"_a = "sum", "factor"_a = 1.0,
           "stream"_a = py::none())
      .def("all_to_all", &Communicator::all_to_all, "out"_a, "data"_a, "out_counts"_a = py::none(),
           "data_counts"_a = py::none(), "stream"_a = py::none())
      .def("broadcast", &Communicator::broadcast, "data"_a, "root"_a = 0, "stream"_a = py::none())
      .def("reduce", &Communicator::reduce, "data"_a, "root"_a = 0, "op"_a = "sum",
           "factor"_a = 1.0, "stream"_a = py::none())
      .def("gather", &Communicator::gather, "out"_a, "shard"_a, "root"_a = 0,
           "stream"_a = py::none())
      .def("scatter", &Communicator::scatter, "out"_a, "full"_a, "root"_a = 0,
           "stream"_a = py::none())
      .def("empty", &Communicator::empty, "shape"_a, "dtype"_a)
      .def("empty_on_device", &Communicator::empty_on_device, "shape"_a, "dtype"_a, "index"_a,
           "stream"_a = py::none())
      .def("barrier", &Communicator::barrier)
      .def("send", &Communicator::send, "data"_a, "dst"_a, "tag"_a = 0, "stream"_a = py::none())
      .def("recv", &Communicator::recv, "data"_a, "src"_a = py::none(), "tag"_a = 0,
           "stream"_a = py::none())
      .def("abort", &Communicator::abort, "why"_a = "abort() was called")
      .def("close", &Communicator::close);
}

}  // namespace primitives
