// Which instruction set the CPU kernels use: the best the machine has, or what PRIMITIVES_ISA asks
// for.
//
// Every kernel exists three times (avx512, avx2, scalar) with the same bits; only speed differs.
// avx512_bf16 is avx512 with another product of bfloat16 matrices.
#pragma once

namespace primitives {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };

const char* isa_name(Isa isa);

// Decided once per process. Throws std::invalid_argument when PRIMITIVES_ISA names an instruction
// set that does not exist or that this CPU lacks.
Isa active_isa();

}  // namespace primitives
