#include "bindings/bindings.hpp"

namespace primitives {

void bind_transport(py::module_& m) {}

}  // namespace primitives
