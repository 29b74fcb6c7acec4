// CUDA kernels. A group of kLanes threads works on one query of one head: for the preparation its
// lanes are points, for reading values they are channels, kVector neighbouring ones each (16 bytes
// where the layout allows). What is known of a point travels from one to the other through shared
// memory of the group; groups never wait for other warps. A block works on 64 queries of one head,
// 8 x 8 neighbours on the map where queries are tokens, so that they read overlapping rows.
//
// T: stored type; A: type of coordinates and accumulation; O: stored type of the offsets.
//
// tests/ops/emulation compiles this file for the host.
#pragma once

#include <cmath>

#include "../problem.h"

// Loops over small arrays, which then live in registers.
#if defined(__CUDACC__)
#define DINO_D2_UNROLL _Pragma("unroll")
#else
#define DINO_D2_UNROLL
#endif

namespace dino_d2 {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr int kThreads = 256;
constexpr int kTile = 8;      // queries along each side of a tile
constexpr int kQueries = 64;  // of a block
constexpr int kChunk = 16;    // points prepared at a time
constexpr unsigned kAll = 0xffffffffu;

// Which queries a block works on.
struct Schedule {
  int32_t tiles;
  bool on_maps;                    // tiles are 8 x 8 queries of a map; else 64 in sequence
  int32_t first_tile[kMaxLevels];  // of every level
};

inline Schedule make_schedule(const Problem& problem) {
  Schedule schedule = {};
  schedule.on_maps = problem.queries == problem.tokens;
  for (int32_t level = 0; schedule.on_maps && level < problem.levels.count; ++level) {
    schedule.first_tile[level] = schedule.tiles;
    schedule.tiles += ((problem.levels.height[level] - 1) / kTile + 1) *
                      ((problem.levels.width[level] - 1) / kTile + 1);
  }
  if (!schedule.on_maps)
    schedule.tiles = static_cast<int32_t>((problem.queries + kQueries - 1) / kQueries);
  return schedule;
}

// The query in place `slot` of a tile, or -1 where the tile reaches over the end.
__device__ __forceinline__ int64_t find_query(const Problem& problem, const Schedule& schedule,
                                              int32_t tile, int slot) {
  if (!schedule.on_maps) {
    const int64_t query = int64_t(tile) * kQueries + slot;
    return query < problem.queries ? query : -1;
  }
  int level = 0;
  while (level + 1 < problem.levels.count && tile >= schedule.first_tile[level + 1]) ++level;
  const int32_t height = problem.levels.height[level], width = problem.levels.width[level];
  const int32_t across = (width - 1) / kTile + 1, index = tile - schedule.first_tile[level];
  const int32_t y = index / across * kTile + slot / kTile;
  const int32_t x = index % across * kTile + slot % kTile;
  return y < height && x < width ? problem.levels.start[level] + y * width + x : -1;
}

template <typename T, typename A, typename O>
struct Inputs {
  const T* __restrict__ value;
  const A* __restrict__ reference;
  const O* __restrict__ offsets;
  const T* __restrict__ logits;
};

// ---- One (query, head) as its group sees it ----

// Neighbouring numbers that are loaded and stored in one instruction.
template <typename T, int kVector>
struct alignas(sizeof(T) * kVector) Pack {
  T at[kVector];
};

template <int kLanes, typename A>
__device__ __forceinline__ A sum_over_group(A value) {
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kAll, value, offset);
  return value;
}

// The group's sums of four numbers: lane kLanes / 4 * k and those after it get that of dot[k].
// Every step halves what a lane still answers for, so that 4 shuffles do for 8 lanes.
template <int kLanes, typename A>
__device__ __forceinline__ A sum_four_over_group(const A (&dot)[4], int lane) {
  const bool second_half = lane & (kLanes / 2), second_quarter = lane & (kLanes / 4);
  A pair[2];
  DINO_D2_UNROLL
  for (int k = 0; k < 2; ++k) {
    const A given = second_half ? dot[k] : dot[k + 2];
    pair[k] = (second_half ? dot[k + 2] : dot[k]) + __shfl_xor_sync(kAll, given, kLanes / 2);
  }
  const A given = second_quarter ? pair[0] : pair[1];
  A sum = (second_quarter ? pair[1] : pair[0]) + __shfl_xor_sync(kAll, given, kLanes / 4);
  for (int offset = kLanes / 8; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAll, sum, offset);
  return sum;
}

// Attention weight = exp(logit - shift) * factor, or the logit itself in the published form.
template <typename A>
struct Softmax {
  A shift, factor;

  template <typename T>
  __device__ __forceinline__ A weight(const Problem& problem, T logit) const {
    const A x = static_cast<A>(logit);
    return problem.has_softmax() ? static_cast<A>(exp(x - shift)) * factor : x;
  }
};

// Of the group's logits; a group without a query has 0 of them.
template <typename A, int kLanes, typename T>
__device__ __forceinline__ Softmax<A> find_softmax(const Problem& problem, const T* logits,
                                                   int samples, int lane) {
  if (!problem.has_softmax()) return {A(0), A(1)};  // the same for all threads
  A most = -static_cast<A>(INFINITY), sum = A(0);
  for (int p = lane; p < samples; p += kLanes) {
    const A logit = static_cast<A>(logits[p]);
    most = logit > most ? logit : most;
  }
  for (int offset = kLanes / 2; offset > 0; offset /= 2) {
    const A other = __shfl_xor_sync(kAll, most, offset);
    most = other > most ? other : most;
  }
  for (int p = lane; p < samples; p += kLanes)
    sum += static_cast<A>(exp(static_cast<A>(logits[p]) - most));
  return {most, A(1) / sum_over_group<kLanes>(sum)};
}

template <typename A>
struct Placed {
  Sample<Single<A>> sample;
  Frame<A> frame;
  A offset_x, offset_y;
  int level;
};

// Sample p of a query; `references` and `offsets` are the query's, and its head's.
template <typename A, typename O>
__device__ __forceinline__ Placed<A> place(const Problem& problem, const A* references,
                                           const O* offsets, int p) {
  Placed<A> placed;
  placed.level = p / static_cast<int>(problem.points);
  const int32_t height = problem.levels.height[placed.level];
  const int32_t width = problem.levels.width[placed.level];
  placed.frame = make_frame<A>(problem.form, references + placed.level * problem.coordinates(),
                               problem.points, height, width);
  const Pack<O, 2> offset = reinterpret_cast<const Pack<O, 2>*>(offsets)[p];
  placed.offset_x = static_cast<A>(offset.at[0]);
  placed.offset_y = static_cast<A>(offset.at[1]);
  const A x = placed.frame.origin_x + placed.offset_x * placed.frame.scale_x;
  const A y = placed.frame.origin_y + placed.offset_y * placed.frame.scale_y;
  placed.sample = locate<Single<A>>(x, y, height, width);
  return placed;
}

// What the channel lanes need to know of a point.
template <typename A>
struct alignas(16) Corners {
  int32_t token[4];  // -1 where the corner is off the map
  A coefficient[4];  // attention weight times bilinear weight
};

template <typename A>
__device__ __forceinline__ Corners<A> make_corners(const Problem& problem, const Placed<A>& placed,
                                                   A weight) {
  const Sample<Single<A>>& sample = placed.sample;
  const int32_t width = problem.levels.width[placed.level];
  const int32_t token = problem.levels.start[placed.level] + sample.y * width + sample.x;
  Corners<A> corners;
  DINO_D2_UNROLL
  for (int k = 0; k < 4; ++k) {
    corners.token[k] = sample.on_map[k] ? token + k / 2 * width + k % 2 : -1;
    corners.coefficient[k] = weight * sample.weight[k];
  }
  return corners;
}

// ---- Kernels ----

// One (query, head) of the schedule; `slot` counts them. Without a query, `samples` is 0.
struct Item {
  int64_t image, head, query, slot;
  int samples;
};

__device__ __forceinline__ Item find_item(const Problem& problem, const Schedule& schedule,
                                          uint32_t image_head, int32_t tile, int place) {
  const uint32_t heads = static_cast<uint32_t>(problem.heads);
  Item item = {image_head / heads, image_head % heads, 0, 0, 0};
  const int64_t query = find_query(problem, schedule, tile, place);
  item.samples = query < 0 ? -1 : static_cast<int>(problem.samples());
  item.query = item.image * problem.queries + (query < 0 ? 0 : query);
  item.slot = item.query * problem.heads + item.head;
  return item;
}

template <typename T, typename A, typename O, int kLanes, int kVector>
__global__ void __launch_bounds__(kThreads, 3)
    forward_kernel(const __grid_constant__ Problem problem,
                   const __grid_constant__ Schedule schedule, const Inputs<T, A, O> inputs,
                   T* __restrict__ output) {
  constexpr int kGroups = kThreads / kLanes;
  __shared__ Corners<A> all_corners[kGroups][kChunk];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  Corners<A>* corners = all_corners[group];
  const int samples = static_cast<int>(problem.samples());
  const int64_t channels = problem.channels, stride = problem.heads * channels;
  for (uint32_t image_head = blockIdx.y; image_head < problem.batch * problem.heads;
       image_head += gridDim.y) {
    for (int32_t round = 0; round < kQueries / kGroups; ++round) {
      const Item item =
          find_item(problem, schedule, image_head, blockIdx.x, round * kGroups + group);
      const T* logits = inputs.logits + item.slot * samples;
      const O* offsets = inputs.offsets + item.slot * samples * 2;
      const A* references =
          inputs.reference + item.query * problem.levels.count * problem.coordinates();
      const T* value = inputs.value + item.image * problem.tokens * stride + item.head * channels;
      const Softmax<A> softmax = find_softmax<A, kLanes>(problem, logits, item.samples, lane);
      for (int64_t block = 0; block < channels; block += kLanes * kVector) {
        const int64_t c = block + lane * kVector;
        A sum[kVector] = {};
        for (int first = 0; first < samples; first += kChunk) {
          const int last = first + kChunk < item.samples ? first + kChunk : item.samples;
          __syncwarp();  // before the chunk before is overwritten
          for (int p = first + lane; p < last; p += kLanes)
            corners[p - first] = make_corners(problem, place<A>(problem, references, offsets, p),
                                              softmax.weight(problem, logits[p]));
          __syncwarp();
          if (c >= channels) continue;
          for (int p = first; p < last; ++p) {
            const Corners<A> corner = corners[p - first];
            DINO_D2_UNROLL
            for (int k = 0; k < 4; ++k) {
              if (corner.token[k] < 0) continue;
              const Pack<T, kVector> row =
                  *reinterpret_cast<const Pack<T, kVector>*>(value + corner.token[k] * stride + c);
              DINO_D2_UNROLL
              for (int v = 0; v < kVector; ++v)
                sum[v] += corner.coefficient[k] * static_cast<A>(row.at[v]);
            }
          }
        }
        if (item.samples < 0 || c >= channels) continue;
        Pack<T, kVector> result;
        DINO_D2_UNROLL
        for (int v = 0; v < kVector; ++v) result.at[v] = static_cast<T>(sum[v]);
        *reinterpret_cast<Pack<T, kVector>*>(output + item.slot * channels + c) = result;
      }
    }
  }
}

template <typename A, typename O>
struct Outputs {
  A* __restrict__ value;      // starts at zero
  A* __restrict__ reference;  // starts at zero; nullptr where not wanted
  O* __restrict__ offsets;
  A* __restrict__ logits;
};

// Adds to neighbouring numbers, four in one instruction where the architecture has it.
template <int kVector, typename A>
__device__ __forceinline__ void add_atomically(A* address, A factor, const A (&numbers)[kVector]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kVector % 4 == 0 && sizeof(A) == sizeof(float)) {
    DINO_D2_UNROLL
    for (int v = 0; v < kVector; v += 4)
      atomicAdd(reinterpret_cast<float4*>(address + v),
                make_float4(factor * numbers[v], factor * numbers[v + 1], factor * numbers[v + 2],
                            factor * numbers[v + 3]));
  } else
#endif
    DINO_D2_UNROLL
  for (int v = 0; v < kVector; ++v) atomicAdd(address + v, factor * numbers[v]);
}

// Gradient of a query's reference from one sample.
template <typename A>
__device__ __forceinline__ void add_to_reference(const Problem& problem, const Placed<A>& placed,
                                                 const SampleGradient<Single<A>>& gradient,
                                                 A* references) {
  const A x = gradient.x * static_cast<A>(problem.levels.width[placed.level]);
  const A y = gradient.y * static_cast<A>(problem.levels.height[placed.level]);
  A* reference = references + placed.level * problem.coordinates();
  atomicAdd(reference, x);
  atomicAdd(reference + 1, y);
  if (problem.form != Form::kBoxes) return;
  const A part = A(0.5) / static_cast<A>(problem.points);
  atomicAdd(reference + 2, x * placed.offset_x * part);
  atomicAdd(reference + 3, y * placed.offset_y * part);
}

// Value and reference gradients are added with atomics: their order of addition varies.
template <typename T, typename A, typename O, int kLanes, int kVector>
__global__ void __launch_bounds__(kThreads, 3)
    backward_kernel(const __grid_constant__ Problem problem,
                    const __grid_constant__ Schedule schedule, const T* __restrict__ grad_output,
                    const Inputs<T, A, O> inputs, const Outputs<A, O> outputs) {
  constexpr int kGroups = kThreads / kLanes;
  __shared__ Corners<A> all_corners[kGroups][kChunk];
  __shared__ Pack<A, 4> all_dots[kGroups][kChunk];
  const int lane = threadIdx.x % kLanes, group = threadIdx.x / kLanes;
  Corners<A>* corners = all_corners[group];
  Pack<A, 4>* dots = all_dots[group];
  const int samples = static_cast<int>(problem.samples());
  const int64_t channels = problem.channels, stride = problem.heads * channels;
  for (uint32_t image_head = blockIdx.y; image_head < problem.batch * problem.heads;
       image_head += gridDim.y) {
    for (int32_t round = 0; round < kQueries / kGroups; ++round) {
      const Item item =
          find_item(problem, schedule, image_head, blockIdx.x, round * kGroups + group);
      const T* logits = inputs.logits + item.slot * samples;
      const O* offsets = inputs.offsets + item.slot * samples * 2;
      const int64_t reference = item.query * problem.levels.count * problem.coordinates();
      const int64_t origin = item.image * problem.tokens * stride + item.head * channels;
      const Softmax<A> softmax = find_softmax<A, kLanes>(problem, logits, item.samples, lane);
      A mean = A(0);  // of the weight gradients, by weight
      for (int first = 0; first < samples; first += kChunk) {
        const int last = first + kChunk < item.samples ? first + kChunk : item.samples;
        __syncwarp();  // before the chunk before is overwritten
        for (int p = first + lane; p < last; p += kLanes) {
          corners[p - first] =
              make_corners(problem, place<A>(problem, inputs.reference + reference, offsets, p),
                           softmax.weight(problem, logits[p]));
          dots[p - first] = {};
        }
        __syncwarp();
        for (int64_t block = 0; block < channels; block += kLanes * kVector) {
          const int64_t c = block + lane * kVector;
          const bool reads = item.samples >= 0 && c < channels;
          A gradient[kVector] = {};
          if (reads) {
            const Pack<T, kVector> row =
                *reinterpret_cast<const Pack<T, kVector>*>(grad_output + item.slot * channels + c);
            DINO_D2_UNROLL
            for (int v = 0; v < kVector; ++v) gradient[v] = static_cast<A>(row.at[v]);
          }
          const int end = first + kChunk < samples ? first + kChunk : samples;
          for (int p = first; p < end; ++p) {  // as often in all groups of the warp: it shuffles
            A dot[4] = {};
            DINO_D2_UNROLL
            for (int k = 0; k < 4; ++k) {
              const int32_t token = corners[p - first].token[k];
              if (token < 0 || !reads) continue;
              const int64_t row_start = origin + token * stride + c;
              const Pack<T, kVector> row =
                  *reinterpret_cast<const Pack<T, kVector>*>(inputs.value + row_start);
              DINO_D2_UNROLL
              for (int v = 0; v < kVector; ++v) dot[k] += gradient[v] * static_cast<A>(row.at[v]);
              add_atomically<kVector>(outputs.value + row_start, corners[p - first].coefficient[k],
                                      gradient);
            }
            const A sum = sum_four_over_group<kLanes>(dot, lane);
            if (lane % (kLanes / 4) == 0) dots[p - first].at[lane / (kLanes / 4)] += sum;
          }
        }
        __syncwarp();
        for (int p = first + lane; p < last; p += kLanes) {
          const Placed<A> placed = place<A>(problem, inputs.reference + reference, offsets, p);
          const A weight = softmax.weight(problem, logits[p]);
          SampleGradient<Single<A>> result = {};
          if (placed.sample.inside)
            result =
                differentiate<Single<A>>(placed.sample.weight, dots[p - first].at,
                                         placed.sample.from_left, placed.sample.from_top, weight);
          Pack<O, 2> offset = {};
          if (placed.sample.inside)
            offset = {static_cast<O>(result.x * placed.frame.scale_x),
                      static_cast<O>(result.y * placed.frame.scale_y)};
          reinterpret_cast<Pack<O, 2>*>(outputs.offsets)[item.slot * samples + p] = offset;
          outputs.logits[item.slot * samples + p] = result.attention;
          mean += weight * result.attention;
          if (outputs.reference && placed.sample.inside)
            add_to_reference(problem, placed, result, outputs.reference + reference);
        }
      }
      if (!problem.has_softmax()) continue;
      mean = sum_over_group<kLanes>(mean);
      for (int p = lane; p < item.samples; p += kLanes) {  // each lane rereads what it wrote
        A& gradient = outputs.logits[item.slot * samples + p];
        gradient = softmax.weight(problem, logits[p]) * (gradient - mean);
      }
    }
  }
}

}  // namespace cuda
}  // namespace dino_d2
