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

// What says where samples lie and how much they weigh.
enum class Form : int32_t {
  kLocations,  // the published operator: locations in [0, 1] and weights
  kPoints,     // fused: offsets in pixels from a reference point, and logits
  kBoxes,      // fused: offsets in parts of a reference box (cx, cy, w, h), and logits
};

// value (batch, tokens, heads, channels), output (batch, queries, heads * channels),
// reference (batch, queries, levels, coordinates); there is none for kLocations,
// offsets (batch, queries, heads, levels, points, 2): for kLocations the locations,
// logits (batch, queries, heads, levels, points): for kLocations the weights.
struct Problem {
  int64_t batch, tokens, heads, channels, queries, points;
  Form form;
  Levels levels;

  DINO_D2_INLINE int64_t samples() const { return levels.count * points; }
  DINO_D2_INLINE int64_t coordinates() const {
    return form == Form::kLocations ? 0 : form == Form::kPoints ? 2 : 4;
  }
  DINO_D2_INLINE bool has_softmax() const { return form != Form::kLocations; }
};

// Pixel = origin + offset * scale, the same for all samples of a query on one level. A location or
// reference point r in [0, 1] is pixel r * size - 0.5 (align_corners=False).
template <typename A>
struct Frame {
  A origin_x, origin_y, scale_x, scale_y;
};

template <typename A>
DINO_D2_INLINE Frame<A> make_frame(Form form, const A* reference, int64_t points, int32_t height,
                                   int32_t width) {
  const A w = static_cast<A>(width), h = static_cast<A>(height);
  if (form == Form::kLocations) return {A(-0.5), A(-0.5), w, h};
  const A x = reference[0] * w - A(0.5), y = reference[1] * h - A(0.5);
  if (form == Form::kPoints) return {x, y, A(1), A(1)};
  const A part = A(0.5) / static_cast<A>(points);
  return {x, y, reference[2] * part * w, reference[3] * part * h};
}

// What the functions below calculate with: single numbers here, vectors in the CPU kernels.
template <typename A>
struct Single {
  typedef A Scalar;
  typedef A Number;
  typedef int32_t Integer;
  typedef bool Mask;
  static DINO_D2_INLINE Integer truncate(Number x) { return static_cast<Integer>(x); }
  static DINO_D2_INLINE Number widen(Integer i) { return static_cast<Number>(i); }
  template <typename X>
  static DINO_D2_INLINE X select(Mask mask, X yes, X no) {
    return mask ? yes : no;
  }
};

// floor() of a value that fits an integer.
template <typename Math>
DINO_D2_INLINE typename Math::Integer round_down(typename Math::Number x) {
  const typename Math::Integer whole = Math::truncate(x);
  return Math::select(x < Math::widen(whole), whole - 1, whole);
}

// One bilinear sample: its four corners in the order (y,x) (y,x+1) (y+1,x) (y+1,x+1).
template <typename Math>
struct Sample {
  typename Math::Integer x, y;                // of the first corner; -1 at most off the map
  typename Math::Number from_left, from_top;  // fractional position between the corners
  typename Math::Number weight[4];            // bilinear weights
  typename Math::Mask on_map[4];              // of the corners
  typename Math::Mask inside;                 // false: no corner is on the map
};

// What lies at pixel (x, y) of a height x width map. A sample takes part only if it lies strictly
// inside (-1, width) x (-1, height); the comparison is written so that NaN fails it. Corners off
// the map must not be read and contribute exactly 0.
template <typename Math>
DINO_D2_INLINE Sample<Math> locate(typename Math::Number x, typename Math::Number y,
                                   typename Math::Integer height, typename Math::Integer width) {
  typedef typename Math::Scalar Scalar;
  typedef typename Math::Number Number;
  typedef typename Math::Mask Mask;
  Sample<Math> sample;
  sample.inside =
      (x > Scalar(-1)) & (y > Scalar(-1)) & (x < Math::widen(width)) & (y < Math::widen(height));
  x = Math::select(sample.inside, x, Number{});
  y = Math::select(sample.inside, y, Number{});
  sample.x = round_down<Math>(x);
  sample.y = round_down<Math>(y);
  const Mask left = sample.inside & (sample.x >= 0), right = sample.inside & (sample.x + 1 < width);
  const Mask top = sample.y >= 0, bottom = sample.y + 1 < height;
  sample.on_map[0] = top & left, sample.on_map[1] = top & right;
  sample.on_map[2] = bottom & left, sample.on_map[3] = bottom & right;
  sample.from_left = x - Math::widen(sample.x);
  sample.from_top = y - Math::widen(sample.y);
  const Number to_right = Scalar(1) - sample.from_left, to_bottom = Scalar(1) - sample.from_top;
  sample.weight[0] = to_bottom * to_right, sample.weight[1] = to_bottom * sample.from_left;
  sample.weight[2] = sample.from_top * to_right,
  sample.weight[3] = sample.from_top * sample.from_left;
  return sample;
}

// Gradients of one sample that is inside, with respect to its attention weight and its pixel.
template <typename Math>
struct SampleGradient {
  typename Math::Number attention, x, y;
};

// From dot[k] = <gradient of the output, value at corner k>, 0 where the corner is off the map.
template <typename Math>
DINO_D2_INLINE SampleGradient<Math> differentiate(const typename Math::Number weight[4],
                                                  const typename Math::Number dot[4],
                                                  typename Math::Number from_left,
                                                  typename Math::Number from_top,
                                                  typename Math::Number attention) {
  typedef typename Math::Scalar Scalar;
  typedef typename Math::Number Number;
  const Number to_right = Scalar(1) - from_left, to_bottom = Scalar(1) - from_top;
  SampleGradient<Math> gradient;
  gradient.attention =
      weight[0] * dot[0] + weight[1] * dot[1] + weight[2] * dot[2] + weight[3] * dot[3];
  gradient.x = attention * (to_bottom * (dot[1] - dot[0]) + from_top * (dot[3] - dot[2]));
  gradient.y = attention * (to_right * (dot[2] - dot[0]) + from_left * (dot[3] - dot[1]));
  return gradient;
}

}  // namespace dino_d2
