// The table of this instruction set's kernels. See [Note: anonymous namespaces] in
// canonical/portable.hpp.
#pragma once

#include "vocab_entropy/backward.hpp"
#include "vocab_entropy/forward.hpp"
#include "vocab_entropy/limits.hpp"

namespace primitives::vocab_entropy {
namespace {

constexpr Kernels make_table() {
  return {.forward = forward,
          .finish = finish,
          .backward = backward,
          .read_words = read_words,
          .flip_words = flip_words};
}

}  // namespace
}  // namespace primitives::vocab_entropy
