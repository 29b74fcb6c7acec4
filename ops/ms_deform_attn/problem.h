// Sizes of one call of multi-scale deformable attention and the arithmetic that every kernel
// shares. Plain C++ that nvcc and any host compiler accept; no PyTorch.
#pragma once

#include <cstdint>

// Always inlined: the CPU kernels include this file once per instruction set, and a copy that was
// not inlined could be shared between them.
#if defined(__CUDACC__)
#define DINO_D2_INLINE __host__ __device__ __forceinline__
#else
#define DINO_D2_INLINE inline __attribute__((always_inline))
#endif

namespace dino_d2 {

constexpr int kMaxLevels = 16;

// Feature map sizes, by value so that they travel as a kernel argument.
struct Levels {
  int32_t count;
  int32_t height[kMaxLevels];
  int32_t width[kMaxLevels];
  int32_t start[kMaxLevels];  // index of the level's first token
};

// value (batch, tokens, heads, channels), locations (batch, queries, heads, levels, points, 2),
// attention (batch, queries, heads, levels, points), output (batch, queries, heads * channels).
struct Problem {
  int64_t batch, tokens, heads, channels, queries, points;
  Levels levels;

  DINO_D2_INLINE int64_t samples() const { return levels.count * points; }
};

// floor() of a value that fits an int; unlike std::floor it vectorises on every instruction set.
template <typename A>
DINO_D2_INLINE int32_t round_down(A x) {
  const int32_t truncated = static_cast<int32_t>(x);
  return truncated - (x < static_cast<A>(truncated) ? 1 : 0);
}

// One bilinear sample: its four corners in the order (y0,x0) (y0,x1) (y1,x0) (y1,x1).
template <typename A>
struct Sample {
  int32_t token[4];       // token index inside the image; -1 where the corner is off the map
  A weight[4];            // bilinear weight; 0 where the corner is off the map
  A from_left, from_top;  // fractional position between the corners
  bool inside;            // false: no corner is on the map
};

// Where location (x, y) in [0,1] of a height x width map samples. The pixel coordinate is
// location * size - 0.5 (align_corners=False). A sample takes part only if it lies strictly
// inside (-1, width) x (-1, height); the comparison is written so that NaN fails it. A sample
// outside has four corners off the map: it reads nothing and contributes exactly 0.
template <typename A>
DINO_D2_INLINE Sample<A> locate(A location_x, A location_y, int32_t height, int32_t width,
                                int32_t start) {
  const A w = static_cast<A>(width), h = static_cast<A>(height);
  A x = location_x * w - A(0.5), y = location_y * h - A(0.5);
  const bool inside = (x > A(-1)) & (y > A(-1)) & (x < w) & (y < h);
  x = inside ? x : A(0);
  y = inside ? y : A(0);
  const int32_t x0 = round_down(x), y0 = round_down(y);
  const A right = x - static_cast<A>(x0), bottom = y - static_cast<A>(y0);
  const A left = A(1) - right, top = A(1) - bottom;
  const bool has_left = inside & (x0 >= 0), has_right = inside & (x0 + 1 < width);
  const bool has_top = y0 >= 0, has_bottom = y0 + 1 < height;
  const int32_t token = start + y0 * width + x0;
  Sample<A> sample;
  sample.token[0] = has_top & has_left ? token : -1;
  sample.token[1] = has_top & has_right ? token + 1 : -1;
  sample.token[2] = has_bottom & has_left ? token + width : -1;
  sample.token[3] = has_bottom & has_right ? token + width + 1 : -1;
  sample.weight[0] = has_top & has_left ? top * left : A(0);
  sample.weight[1] = has_top & has_right ? top * right : A(0);
  sample.weight[2] = has_bottom & has_left ? bottom * left : A(0);
  sample.weight[3] = has_bottom & has_right ? bottom * right : A(0);
  sample.from_left = right;
  sample.from_top = bottom;
  sample.inside = inside;
  return sample;
}

// Gradients of one sample that is inside.
template <typename A>
struct SampleGradient {
  A attention, location_x, location_y;
};

// From dot[k] = <gradient of the output, value at corner k>, 0 where the corner is off the map.
template <typename A>
DINO_D2_INLINE SampleGradient<A> differentiate(const A weight[4], const A dot[4], A from_left,
                                               A from_top, A attention, int32_t height,
                                               int32_t width) {
  const A to_right = A(1) - from_left, to_bottom = A(1) - from_top;
  SampleGradient<A> gradient;
  gradient.attention =
      weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3];
  gradient.location_x = attention * static_cast<A>(width) *
                        (to_bottom * (dot[1] - dot[0]) + from_top * (dot[3] - dot[2]));
  gradient.location_y = attention * static_cast<A>(height) *
                        (to_right * (dot[2] - dot[0]) + from_left * (dot[3] - dot[1]));
  return gradient;
}

}  // namespace dino_d2
