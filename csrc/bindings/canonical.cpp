#include "bindings/bindings.hpp"

namespace primitives {

void bind_canonical(py::module_& m) {}

}  // namespace primitives
