// One function per area, called once from module.cpp. Bindings check and forward; beyond that they
// hold what needs torch: Works of c10d, and operators.
#pragma once

#include <torch/csrc/utils/pybind.h>

namespace primitives {

void bind_canonical(py::module_& m);
void bind_transport(py::module_& m);
void bind_communicator(py::module_& m);
void bind_call_sites(py::module_& m);
void bind_flight(py::module_& m);
void bind_symmetric_memory(py::module_& m);
void bind_devices(py::module_& m);
void bind_vocab_entropy(py::module_& m);

}  // namespace primitives
