// Bindings that exist only in a build with CUDA; called by bind_devices.
#pragma once

#include "bindings/bindings.hpp"

namespace primitives {

void bind_vocab_entropy_cuda(py::module_& m);

}  // namespace primitives
