#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "collectives/reduce.hpp"

#define ISA scalar
#define ISA_LEVEL 0
#include "collectives/reduce_kernels.hpp"
