#include <pybind11/chrono.h>
#include <pybind11/stl.h>

#include "bindings/bindings.hpp"
#include "bindings/c10d_backend.hpp"
#include "bindings/c10d_errors.hpp"
#include "collectives/chunks.hpp"
#include "transport/segment.hpp"

namespace primitives {

void bind_transport(py::module_& m) {
  py::module_::import("torch.distributed");  // registers the base classes with pybind11
  register_errors(m);
  py::class_<Backend, c10::intrusive_ptr<Backend>, c10d::Backend> backend(m, "Backend");
  py::class_<Backend::Options, c10::intrusive_ptr<Backend::Options>, c10d::Backend::Options>(
      backend, "Options")
      .def(py::init([](std::chrono::milliseconds timeout) {
             return c10::make_intrusive<Backend::Options>(timeout);
           }),
           py::arg("timeout"))
      .def_readwrite("shm_dir", &Backend::Options::shm_dir)
      .def("__deepcopy__", [](const Backend::Options& self, const py::dict&) {
        return c10::make_intrusive<Backend::Options>(self);
      });
  backend
      .def(py::init([](const c10::intrusive_ptr<c10d::Store>& store, int rank, int world_size,
                       const c10::intrusive_ptr<Backend::Options>& options,
                       const std::vector<std::string>& host_of_rank,
                       const c10::intrusive_ptr<c10d::Backend>& wire) {
             // Not a call_guard: pybind11 registers the new object inside the guarded call, and its
             // table of objects is only safe under the GIL.
             const py::gil_scoped_release no_gil;
             return c10::make_intrusive<Backend>(store, rank, world_size, options, host_of_rank,
                                                 wire);
           }),
           py::arg("store"), py::arg("rank"), py::arg("world_size"), py::arg("options"),
           py::arg("host_of_rank") = std::vector<std::string>{}, py::arg("wire") = py::none())
      .def("all_gather_many", &Backend::all_gather_many, py::arg("shards"), py::arg("fulls"),
           py::arg("numels"), py::arg("async_op"), py::call_guard<py::gil_scoped_release>())
      .def("reduce_scatter_many", &Backend::reduce_scatter_many, py::arg("fulls"),
           py::arg("shards"), py::arg("numels"), py::arg("factor"), py::arg("accumulate"),
           py::arg("squares"), py::arg("async_op"), py::call_guard<py::gil_scoped_release>())
      .def(
          "empty",
          [](Backend& self, const std::vector<int64_t>& shape, at::ScalarType dtype,
             std::optional<at::Device> device) {
            return self.empty(shape, dtype, device.value_or(at::kCPU));
          },
          py::arg("shape"), py::arg("dtype"), py::arg("device") = py::none(),
          py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("num_zero_copy", &Backend::num_zero_copy,
                             "Collectives of this group so far that went without staging.")
      .def_property_readonly("options", [](Backend& self) { return self.getBackendOptions(); });
  m.def(
      "close_all_backends",
      [](double limit_s) { close_all_backends(Milliseconds(static_cast<int64_t>(limit_s * 1e3))); },
      py::arg("limit_s"), py::call_guard<py::gil_scoped_release>(),
      "Leave every process group of this process; peers that wait for it get PeerLost.");
  m.def(
      "copy_bytes",
      [](const py::buffer& out, const py::buffer& in, bool stream) {
        const py::buffer_info to = out.request(/*writable=*/true), from = in.request();
        const auto nbytes = static_cast<size_t>(from.size * from.itemsize);
        if (to.size * to.itemsize != from.size * from.itemsize) {
          throw py::value_error("copy_bytes: expected as many bytes in the output, got " +
                                std::to_string(to.size * to.itemsize) + " and " +
                                std::to_string(nbytes));
        }
        const py::gil_scoped_release no_gil;
        copy(to.ptr, from.ptr, nbytes, stream);
        if (stream) stream_fence();
      },
      py::arg("out"), py::arg("in"), py::arg("stream"),
      "What the collectives move bytes with: through the caches, or (stream) around them.");
  m.def("sweep_segments", &sweep_segments, py::arg("folder"),
        "Remove shared memory whose owner has ended; how many pieces.");
}

}  // namespace primitives
