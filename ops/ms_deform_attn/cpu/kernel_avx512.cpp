// x86-64 processors with AVX512; the host code asks the processor before it calls this.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma")
#endif
#define DINO_D2_ISA avx512
#define DINO_D2_VECTOR_BYTES 64
#include "kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
