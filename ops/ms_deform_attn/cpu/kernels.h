// The CPU kernels as the host code sees them: one table of functions per instruction set.
#pragma once

#include "../problem.h"

namespace dino_d2 {

// Height, width and first token of the level of every point: arrays of problem.samples().
struct PointTable {
  const int32_t *height, *width, *start;
};

template <typename T>
struct ForwardArguments {
  const Problem* problem;
  const PointTable* table;
  const int32_t* order;  // the order in which an image's queries are visited
  const T *value, *locations, *attention;
  T* output;
};

template <typename T>
struct BackwardArguments {
  const Problem* problem;
  const PointTable* table;
  const int32_t* order;
  const T *grad_output, *value, *locations, *attention;
  T *grad_value, *grad_locations, *grad_attention;  // grad_value starts at zero
};

// Bytes of scratch memory that one thread needs for a (query, head).
template <typename T>
constexpr int64_t scratch_bytes(int64_t samples) {
  return samples * (6 * sizeof(T) + 4 * sizeof(int32_t));
}

struct Kernels {
  // Queries [begin, end) counted over all images.
  void (*forward_float)(const ForwardArguments<float>&, int64_t begin, int64_t end, void* scratch);
  void (*forward_double)(const ForwardArguments<double>&, int64_t, int64_t, void*);
  // One head of one image, levels [first_level, last_level).
  void (*backward_float)(const BackwardArguments<float>&, int64_t image, int64_t head,
                         int64_t first_level, int64_t last_level, void* scratch);
  void (*backward_double)(const BackwardArguments<double>&, int64_t, int64_t, int64_t, int64_t,
                          void*);
};

namespace baseline {
Kernels kernels();
}
namespace avx2 {
Kernels kernels();
}
namespace avx512 {
Kernels kernels();
}

}  // namespace dino_d2
