// The CPU kernels as the host code sees them: one table of functions per instruction set.
#pragma once

#include "../problem.h"

namespace dino_d2 {

// The samples of one (query, head) are prepared in blocks of so many, the last one padded: a whole
// number of vectors of any instruction set.
constexpr int kBlock = 16;

// An integer as wide as T: vectors of both have as many lanes.
template <typename T>
struct IntegerAs;
template <>
struct IntegerAs<float> {
  typedef int32_t type;
};
template <>
struct IntegerAs<double> {
  typedef int64_t type;
};

template <typename T>
struct Block {
  typedef typename IntegerAs<T>::type Integer;
  Integer level[kBlock];                  // the last one where padded
  Integer height[kBlock], width[kBlock];  // of the level; 0 where padded
  Integer start[kBlock];                  // the level's first row in memory
  Integer pitch[kBlock];                  // rows of memory from one row of the map to the next
  T origin_x[kBlock], origin_y[kBlock], scale_x[kBlock], scale_y[kBlock];  // Frame of the query
  T offset_x[kBlock], offset_y[kBlock];
  T attention[kBlock];
  T from_left[kBlock], from_top[kBlock];
  T weight[4][kBlock];                   // bilinear
  T coefficient[4][kBlock];              // attention * weight; 0 where the corner is off the map
  Integer on_map[4][kBlock];             // -1 or 0
  Integer inside[kBlock];                // -1 or 0
  Integer upper[kBlock], lower[kBlock];  // rows of memory of the two left corners
  T dot[kBlock][4][4];                   // <gradient of the output, value at the corner> in 4 parts
  T grad_attention[kBlock], grad_x[kBlock], grad_y[kBlock];  // of the weight and of the pixel
  T grad_offset[2 * kBlock];                                 // (x, y)
};

template <typename T>
struct Arguments {
  const Problem* problem;
  const int32_t* order;  // the order in which an image's queries are visited
  const T *value, *reference, *offsets, *logits;
};

template <typename T>
struct Gradients {
  const T* of_output;
  T *value, *offsets, *logits;
  T* reference;  // (batch, queries, heads, levels, coordinates), or nullptr where not wanted
};

// What one thread works on: of one head of one image, the queries [begin, end) of the order and the
// levels [first_level, last_level).
struct Share {
  int64_t image, head, begin, end;
  int32_t first_level, last_level;
};

// Where a head is worked on as a copy, its rows lie side by side, `heads` times denser in the
// cache, and every map has a margin of zeros: one row above, one below, and one number between the
// end of a row and the start of the next. No corner of a sample that takes part needs a question.
inline int64_t padded_start(const Levels& levels, int32_t level) {
  int64_t start = 0;
  for (int32_t l = 0; l < level; ++l)
    start += (int64_t(levels.height[l]) + 2) * (int64_t(levels.width[l]) + 1) + 1;
  return start;
}
inline int64_t padded_rows(const Levels& levels) { return padded_start(levels, levels.count); }

// Copying pays where most of the tokens are sampled several times.
inline bool copies(const Problem& problem) { return problem.queries >= problem.tokens; }

// One thread's memory, aligned to cache lines: its blocks, then rows of `channels` numbers.
template <typename T>
struct Scratch {
  Block<T>* blocks;
  T* rows;

  static int64_t block_count(const Problem& problem) {
    return (problem.samples() + kBlock - 1) / kBlock;
  }
};

template <typename T>
struct KernelsOf {
  // A share has all levels. Scratch: padded_rows(), or 1 row where nothing is copied.
  void (*forward)(const Arguments<T>&, T* output, const Share&, Scratch<T>);
  // Every share is given to one thread only, so that the value gradient needs no atomics and its
  // order of addition is fixed. A share of some levels leaves in gradients.logits the gradients of
  // the weights. Scratch: 2 * padded_rows().
  void (*backward)(const Arguments<T>&, const Gradients<T>&, const Share&, Scratch<T>);
  // From gradients of the weights to those of the logits: queries [begin, end) over all images.
  void (*softmax_backward)(const Arguments<T>&, const Gradients<T>&, int64_t begin, int64_t end,
                           Scratch<T>);
};

struct Kernels {
  KernelsOf<float> of_float;
  KernelsOf<double> of_double;
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
