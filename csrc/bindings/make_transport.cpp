#include "bindings/make_transport.hpp"

#include <pybind11/pybind11.h>

#include <stdexcept>
#include <utility>

#include "bindings/c10d_errors.hpp"
#include "bindings/c10d_wire.hpp"
#include "collectives/several_hosts.hpp"

namespace primitives {
namespace {

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

}  // namespace

std::unique_ptr<Transport> make_transport(const c10::intrusive_ptr<c10d::Store>& store,
                                          GroupOptions options,
                                          const std::vector<std::string>& host_of_rank,
                                          const c10::intrusive_ptr<c10d::Backend>& wire) {
  return translated([&]() -> std::unique_ptr<Transport> {
    auto meeting = std::make_unique<StoreMeeting>(store);
    if (!wire) return std::make_unique<OneHost>(*meeting, std::move(options));
    return std::make_unique<SeveralHosts>(std::move(meeting), std::move(options), host_of_rank,
                                          std::make_unique<C10dWire>(wire));
  });
}

std::unique_ptr<StreamTransport> make_device_transport(Transport& host,
                                                       const StreamTransportOptions& options) {
#ifdef PRIMITIVES_CUDA
  return make_stream_transport(host, options);
#else
  static_cast<void>(host), static_cast<void>(options);
  throw std::invalid_argument(
      "collectives on cuda: this build of primitives has no CUDA kernels (there was no nvcc)");
#endif
}

void warn(const std::string& text) {
  const pybind11::gil_scoped_acquire gil;
  if (PyErr_WarnEx(PyExc_RuntimeWarning, text.c_str(), 1) != 0) throw pybind11::error_already_set();
}

}  // namespace primitives
