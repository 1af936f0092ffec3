#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "collectives/reduce.hpp"

#pragma GCC push_options
#pragma GCC target("avx2,f16c,avx512f,avx512bw,avx512dq,avx512vl")

#define ISA avx512
#define ISA_LEVEL 2
#include "collectives/reduce_kernels.hpp"

#pragma GCC pop_options
