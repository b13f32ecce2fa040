// Compiles what follows, up to end_target.h, for the instruction set of the LHOPT_VEC_* macro that
// the including unit has defined. Only that may use these instructions: library code that a unit
// shares with others through the linker must stay runnable everywhere, so units include no header
// but ours after this one.
#include <immintrin.h>
#include <math.h>

#if defined(LHOPT_VEC_AVX512)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c"))), apply_to = function)
#else
// False alarms within the intrinsics of GCC 12.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,f16c")
#endif
#elif defined(LHOPT_VEC_AVX2)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#else
#error "define LHOPT_VEC_AVX512 or LHOPT_VEC_AVX2 before begin_target.h"
#endif
