#include "isa.hpp"

#include <immintrin.h>

#include <bit>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

namespace primitives {
namespace {

// Whether this CPU's vdpbf16ps is what [Note: pairs] in canonical/gemm_pairs.hpp says, on 16384
// pseudo-random pairs: near numbers, the widest exponents (sums overflow), and sums that cancel.
__attribute__((target("avx512f,avx512bf16"))) bool pairs_are_two_fmas() {
  uint64_t state = 1;
  const auto random_below = [&](uint32_t bound) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state >> 32) * bound >> 32);
  };
  const auto widened = [](uint16_t x) { return std::bit_cast<float>(uint32_t{x} << 16); };
  for (int round = 0; round < 1024; round++) {
    const uint32_t num_exponents = round % 2 == 0 ? 4 : 130;  // from 2^-56 on
    alignas(64) uint16_t a[32], b[32];
    for (auto* x : {a, b}) {
      for (int i = 0; i < 32; i++) {
        const uint32_t bits = random_below(2) << 15 | random_below(128);
        x[i] = static_cast<uint16_t>(bits | (71 + random_below(num_exponents)) << 7);
      }
    }
    alignas(64) float chain[16], expected[16], found[16];
    for (int i = 0; i < 16; i++) {
      const float first = widened(a[2 * i + 1]) * widened(b[2 * i + 1]);
      const float second = widened(a[2 * i]) * widened(b[2 * i]);
      const float chains[] = {0.0f, first, -first, -(first + second)};
      chain[i] = chains[round / 2 % 4];
      expected[i] =
          __builtin_fmaf(widened(a[2 * i]), widened(b[2 * i]),
                         __builtin_fmaf(widened(a[2 * i + 1]), widened(b[2 * i + 1]), chain[i]));
    }
    const __m512i words_a = _mm512_load_si512(a), words_b = _mm512_load_si512(b);
    _mm512_store_ps(found,
                    _mm512_dpbf16_ps(_mm512_load_ps(chain), (__m512bh)words_a, (__m512bh)words_b));
    for (int i = 0; i < 16; i++) {
      const bool both_nan = expected[i] != expected[i] && found[i] != found[i];
      if (!both_nan && std::bit_cast<uint32_t>(expected[i]) != std::bit_cast<uint32_t>(found[i])) {
        return false;
      }
    }
  }
  return true;
}

Isa best_isa() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16") && pairs_are_two_fmas()) {
    return Isa::kAvx512Bf16;
  }
  return avx512 ? Isa::kAvx512 : avx2 ? Isa::kAvx2 : Isa::kScalar;
}

Isa choose_isa() {
  const Isa best = best_isa();
  const char* wish = std::getenv("PRIMITIVES_ISA");
  if (wish == nullptr || *wish == '\0') return best;
  for (Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (std::string(wish) != isa_name(isa)) continue;
    if (isa > best) {
      throw std::invalid_argument(std::string("PRIMITIVES_ISA=") + wish +
                                  ", but this CPU has only " + isa_name(best));
    }
    return isa;
  }
  throw std::invalid_argument(std::string("PRIMITIVES_ISA=") + wish +
                              "; expected avx512_bf16, avx512, avx2 or scalar");
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
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "";
}

Isa active_isa() {
  static const Isa isa = choose_isa();
  return isa;
}

}  // namespace primitives
