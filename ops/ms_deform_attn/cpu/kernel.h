// CPU kernels, compiled once per instruction set: kernel_<set>.cpp defines DINO_D2_ISA and
// DINO_D2_VECTOR_BYTES and includes this file. Nothing here may be shared between the copies (the
// linker would keep one of them for every machine), so it uses no standard library templates and
// lives in a namespace of its instruction set.
#pragma once

#include "kernels.h"

namespace dino_d2 {
namespace DINO_D2_ISA {
namespace {

// A vector of the machine's native width; loads and stores may be unaligned.
template <typename T, int kLanes>
struct Vector {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T>
struct Vector<T, 1> {
  typedef T type;
};

template <typename T>
constexpr int native_lanes = DINO_D2_VECTOR_BYTES / sizeof(T);

// The samples of one (query, head), ready for use: structure of arrays over points.
template <typename T>
struct Prepared {
  int32_t* token[4];
  T* weight[4];
  T* from_left;
  T* from_top;

  Prepared(void* scratch, int64_t samples) {
    T* numbers = static_cast<T*>(scratch);
    for (int k = 0; k < 4; ++k) weight[k] = numbers + k * samples;
    from_left = numbers + 4 * samples;
    from_top = numbers + 5 * samples;
    int32_t* tokens = reinterpret_cast<int32_t*>(numbers + 6 * samples);
    for (int k = 0; k < 4; ++k) token[k] = tokens + k * samples;
  }
};

template <typename T>
void prepare(const PointTable& table, const T* __restrict locations, int64_t first, int64_t last,
             Prepared<T> prepared) {
  const int32_t* __restrict height = table.height;
  const int32_t* __restrict width = table.width;
  const int32_t* __restrict start = table.start;
  T *__restrict w0 = prepared.weight[0], *__restrict w1 = prepared.weight[1],
                *__restrict w2 = prepared.weight[2], *__restrict w3 = prepared.weight[3];
  int32_t *__restrict t0 = prepared.token[0], *__restrict t1 = prepared.token[1],
                      *__restrict t2 = prepared.token[2], *__restrict t3 = prepared.token[3];
  T* __restrict from_left = prepared.from_left, * __restrict from_top = prepared.from_top;
  for (int64_t p = first; p < last; ++p) {
    const Sample<T> sample =
        locate<T>(locations[2 * p], locations[2 * p + 1], height[p], width[p], start[p]);
    t0[p] = sample.token[0], t1[p] = sample.token[1];
    t2[p] = sample.token[2], t3[p] = sample.token[3];
    w0[p] = sample.weight[0], w1[p] = sample.weight[1];
    w2[p] = sample.weight[2], w3[p] = sample.weight[3];
    from_left[p] = sample.from_left, from_top[p] = sample.from_top;
  }
}

// output[0 : kVectors * kLanes] = weighted sum of the samples over a block of channels.
template <typename T, int kLanes, int kVectors>
void gather(const T* value, int64_t token_stride, const T* attention, int64_t samples,
            const Prepared<T>& prepared, T* output) {
  typedef typename Vector<T, kLanes>::type V;
  V sum[kVectors] = {};
  for (int64_t p = 0; p < samples; ++p) {
    for (int k = 0; k < 4; ++k) {
      const int32_t token = prepared.token[k][p];
      if (token < 0) continue;
      const T weight = attention[p] * prepared.weight[k][p];
      const T* row = value + token * token_stride;
      for (int v = 0; v < kVectors; ++v)
        sum[v] += weight * *reinterpret_cast<const V*>(row + v * kLanes);
    }
  }
  for (int v = 0; v < kVectors; ++v) *reinterpret_cast<V*>(output + v * kLanes) = sum[v];
}

// One (query, head): all channels, in blocks of as many registers as fit.
template <typename T>
void gather_channels(const T* value, int64_t channels, int64_t token_stride, const T* attention,
                     int64_t samples, const Prepared<T>& prepared, T* output) {
  constexpr int kLanes = native_lanes<T>;
  int64_t c = 0;
  for (; channels - c >= 8 * kLanes; c += 8 * kLanes)
    gather<T, kLanes, 8>(value + c, token_stride, attention, samples, prepared, output + c);
  for (; channels - c >= 4 * kLanes; c += 4 * kLanes)
    gather<T, kLanes, 4>(value + c, token_stride, attention, samples, prepared, output + c);
  for (; channels - c >= 2 * kLanes; c += 2 * kLanes)
    gather<T, kLanes, 2>(value + c, token_stride, attention, samples, prepared, output + c);
  for (; channels - c >= kLanes; c += kLanes)
    gather<T, kLanes, 1>(value + c, token_stride, attention, samples, prepared, output + c);
  for (; c < channels; ++c)
    gather<T, 1, 1>(value + c, token_stride, attention, samples, prepared, output + c);
}

template <typename T>
void forward(const ForwardArguments<T>& arguments, int64_t begin, int64_t end, void* scratch) {
  const Problem& problem = *arguments.problem;
  const int64_t samples = problem.samples(), channels = problem.channels;
  const int64_t token_stride = problem.heads * channels;
  const Prepared<T> prepared(scratch, samples);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t image = item / problem.queries;
    const int64_t query = image * problem.queries + arguments.order[item % problem.queries];
    const T* value = arguments.value + image * problem.tokens * token_stride;
    for (int64_t head = 0; head < problem.heads; ++head) {
      const int64_t slot = query * problem.heads + head;
      prepare<T>(*arguments.table, arguments.locations + slot * samples * 2, 0, samples, prepared);
      gather_channels<T>(value + head * channels, channels, token_stride,
                         arguments.attention + slot * samples, samples, prepared,
                         arguments.output + slot * channels);
    }
  }
}

template <typename T, typename V>
T sum_lanes(V vector) {
  T sum = 0;
  for (unsigned lane = 0; lane < sizeof(V) / sizeof(T); ++lane) sum += vector[lane];
  return sum;
}

// A block of channels of one sample: adds to the value gradient of its corners and returns in
// dot[k] the product of the output gradient with the value at corner k.
template <typename T, int kLanes, int kVectors>
void scatter(const T* value, T* grad_value, int64_t token_stride, const T* grad_output,
             const int32_t token[4], const T coefficient[4], T dot[4]) {
  typedef typename Vector<T, kLanes>::type V;
  V gradient[kVectors];
  for (int v = 0; v < kVectors; ++v)
    gradient[v] = *reinterpret_cast<const V*>(grad_output + v * kLanes);
  for (int k = 0; k < 4; ++k) {
    if (token[k] < 0) continue;
    const int64_t offset = token[k] * token_stride;
    V product = {};
    for (int v = 0; v < kVectors; ++v) {
      product += gradient[v] * *reinterpret_cast<const V*>(value + offset + v * kLanes);
      *reinterpret_cast<V*>(grad_value + offset + v * kLanes) += coefficient[k] * gradient[v];
    }
    dot[k] += sum_lanes<T>(product);
  }
}

template <typename T>
void scatter_scalar(const T* value, T* grad_value, int64_t token_stride, T grad_output,
                    const int32_t token[4], const T coefficient[4], T dot[4]) {
  for (int k = 0; k < 4; ++k) {
    if (token[k] < 0) continue;
    const int64_t offset = token[k] * token_stride;
    dot[k] += grad_output * value[offset];
    grad_value[offset] += coefficient[k] * grad_output;
  }
}

template <typename T>
void scatter_channels(const T* value, T* grad_value, int64_t channels, int64_t token_stride,
                      const T* grad_output, const int32_t token[4], const T coefficient[4],
                      T dot[4]) {
  constexpr int kLanes = native_lanes<T>;
  int64_t c = 0;
  for (; channels - c >= 4 * kLanes; c += 4 * kLanes)
    scatter<T, kLanes, 4>(value + c, grad_value + c, token_stride, grad_output + c, token,
                          coefficient, dot);
  for (; channels - c >= 2 * kLanes; c += 2 * kLanes)
    scatter<T, kLanes, 2>(value + c, grad_value + c, token_stride, grad_output + c, token,
                          coefficient, dot);
  for (; channels - c >= kLanes; c += kLanes)
    scatter<T, kLanes, 1>(value + c, grad_value + c, token_stride, grad_output + c, token,
                          coefficient, dot);
  for (; c < channels; ++c)
    scatter_scalar<T>(value + c, grad_value + c, token_stride, grad_output[c], token, coefficient,
                      dot);
}

// The levels [first_level, last_level) of one head of one image. The caller gives every such range
// to one thread only, so the value gradient needs no atomics and its order of addition is fixed.
template <typename T>
void backward(const BackwardArguments<T>& arguments, int64_t image, int64_t head,
              int64_t first_level, int64_t last_level, void* scratch) {
  const Problem& problem = *arguments.problem;
  const PointTable& table = *arguments.table;
  const int64_t samples = problem.samples(), channels = problem.channels;
  const int64_t token_stride = problem.heads * channels;
  const int64_t first = first_level * problem.points, last = last_level * problem.points;
  const int64_t origin = image * problem.tokens * token_stride + head * channels;
  const T* value = arguments.value + origin;
  T* grad_value = arguments.grad_value + origin;
  const Prepared<T> prepared(scratch, samples);
  for (int64_t i = 0; i < problem.queries; ++i) {
    const int64_t slot = (image * problem.queries + arguments.order[i]) * problem.heads + head;
    const T* attention = arguments.attention + slot * samples;
    T* grad_attention = arguments.grad_attention + slot * samples;
    T* grad_locations = arguments.grad_locations + slot * samples * 2;
    prepare<T>(table, arguments.locations + slot * samples * 2, first, last, prepared);
    for (int64_t p = first; p < last; ++p) {
      int32_t token[4];
      T weight[4], coefficient[4], dot[4] = {0, 0, 0, 0};
      bool inside = false;
      for (int k = 0; k < 4; ++k) {
        token[k] = prepared.token[k][p];
        weight[k] = prepared.weight[k][p];
        coefficient[k] = attention[p] * weight[k];
        inside |= token[k] >= 0;
      }
      SampleGradient<T> gradient = {0, 0, 0};
      if (inside) {
        scatter_channels<T>(value, grad_value, channels, token_stride,
                            arguments.grad_output + slot * channels, token, coefficient, dot);
        gradient = differentiate<T>(weight, dot, prepared.from_left[p], prepared.from_top[p],
                                    attention[p], table.height[p], table.width[p]);
      }
      grad_attention[p] = gradient.attention;
      grad_locations[2 * p] = gradient.location_x;
      grad_locations[2 * p + 1] = gradient.location_y;
    }
  }
}

}  // namespace

Kernels kernels() { return {forward<float>, forward<double>, backward<float>, backward<double>}; }

}  // namespace DINO_D2_ISA
}  // namespace dino_d2
