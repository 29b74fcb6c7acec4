// x86-64 processors with AVX2; the host code asks the processor before it calls this.
#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx2,fma")
#endif
#define DINO_D2_ISA avx2
#define DINO_D2_VECTOR_BYTES 32
#include "kernel.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
