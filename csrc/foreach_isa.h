// Compiles the file named by QUERYMASK_ISA_SOURCE (relative to csrc/) once for every instruction set worth having, each
// time with QUERYMASK_ISA naming the namespace for it. A binary built anywhere so runs well everywhere:
// QUERYMASK_BY_ISA picks among the copies at run time. The file must hold loops over plain pointers only: whatever it
// includes would be compiled for the wrong machine.

#include "isa.h"

#define QUERYMASK_ISA baseline
#include QUERYMASK_ISA_SOURCE
#undef QUERYMASK_ISA

#if QUERYMASK_X86_ISAS

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define QUERYMASK_ISA avx2
#include QUERYMASK_ISA_SOURCE
#undef QUERYMASK_ISA
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#ifdef __clang__
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
#endif
#define QUERYMASK_ISA avx512
#include QUERYMASK_ISA_SOURCE
#undef QUERYMASK_ISA
#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif // QUERYMASK_X86_ISAS

#undef QUERYMASK_ISA_SOURCE
