#include "bindings/bindings.hpp"
#include "isa.hpp"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native half of primitives: transport, collectives and canonical kernels.";
  m.def(
      "active_isa", [] { return primitives::isa_name(primitives::active_isa()); },
      "Instruction set in use: avx512, avx2 or scalar (PRIMITIVES_ISA overrides).");
  primitives::bind_devices(m);
  primitives::bind_canonical(m);
  primitives::bind_vocab_entropy(m);
  primitives::bind_transport(m);
  primitives::bind_communicator(m);
  primitives::bind_call_sites(m);
  primitives::bind_flight(m);
  primitives::bind_symmetric_memory(m);
}
