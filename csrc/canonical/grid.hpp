// How many blocks of threads run a kernel.
#pragma once

#include <stdint.h>

namespace primitives::canonical {
namespace {

struct Grid {
  int64_t x;
  int y;
  int64_t shared_nbytes;
};

}  // namespace
}  // namespace primitives::canonical
