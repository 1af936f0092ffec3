#include "isa.hpp"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace primitives {
namespace {

Isa best_isa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("PRIMITIVES_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (std::string(wish) != isa_name(isa)) continue;
    if (isa > best) {
      throw std::invalid_argument(std::string("PRIMITIVES_ISA=") + wish +
                                  ", but this CPU has only " + isa_name(best));
    }
    return isa;
  }
  throw std::invalid_argument(std::string("PRIMITIVES_ISA=") + wish +
                              "; expected avx512, avx2 or scalar");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kScalar:
      return "scalar";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
  }
  return "";
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace primitives
