#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "collectives/reduce.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,f16c")

#define ISA avx2
#define ISA_LEVEL 1
#include "collectives/reduce_kernels.hpp"

#pragma GCC pop_options
