// Any processor: 16-byte vectors (SSE2, NEON, ...).
#define DINO_D2_ISA baseline
#define DINO_D2_VECTOR_BYTES 16
#include "kernel.h"
