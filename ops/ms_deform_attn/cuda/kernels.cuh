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

// A block's queries. Those in sequence are laid out like a map that is kTile wide.
struct Tile {
  int64_t first;
  int32_t width;          // of the map
  int32_t columns, left;  // of the map from `first` on: columns and queries

  // The query in place `slot`, or -1 where the tile reaches over the end.
  __device__ __forceinline__ int64_t query(int slot) const {
    const int64_t further = int64_t(width) * (slot / kTile) + slot % kTile;
    return slot % kTile < columns && further < left ? first + further : -1;
  }
};

__device__ __forceinline__ Tile find_tile(const Problem& problem, const Schedule& schedule,
                                          int32_t tile) {
  if (!schedule.on_maps) {
    const int64_t first = int64_t(tile) * kQueries, left = problem.queries - first;
    return {first, kTile, kTile, static_cast<int32_t>(left < kQueries ? left : kQueries)};
  }
  int level = 0;
  while (level + 1 < problem.levels.count && tile >= schedule.first_tile[level + 1]) ++level;
  const int32_t height = problem.levels.height[level], width = problem.levels.width[level];
  const int32_t across = (width - 1) / kTile + 1, index = tile - schedule.first_tile[level];
  const int32_t y = index / across * kTile, x = index % across * kTile;
  return {problem.levels.start[level] + y * width + x, width, width - x, (height - y) * width - x};
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

// Sample p, on `level`, of the query and head that `own` begins with.
template <typename T, typename A, typename O>
__device__ __forceinline__ Placed<A> place(const Problem& problem, const Inputs<T, A, O>& own,
                                           int level, int p) {
  Placed<A> placed;
  placed.level = level;
  const int32_t height = problem.levels.height[level], width = problem.levels.width[level];
  placed.frame = make_frame<A>(problem.form, own.reference + level * problem.coordinates(),
                               problem.points, height, width);
  const Pack<O, 2> offset = reinterpret_cast<const Pack<O, 2>*>(own.offsets)[p];
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
  int32_t row[4];    // where it begins in value, from the image's and head's first; -1: off the map
  A coefficient[4];  // attention weight times bilinear weight
};

template <typename A>
__device__ __forceinline__ Corners<A> make_corners(const Problem& problem, const Placed<A>& placed,
                                                   A weight) {
  const Sample<Single<A>>& sample = placed.sample;
  const int32_t width = problem.levels.width[placed.level];
  const int32_t token = problem.levels.start[placed.level] + sample.y * width + sample.x;
  const int32_t stride = static_cast<int32_t>(problem.heads * problem.channels);
  Corners<A> corners;
  DINO_D2_UNROLL
  for (int k = 0; k < 4; ++k) {
    corners.row[k] = sample.on_map[k] ? (token + k / 2 * width + k % 2) * stride : -1;
    corners.coefficient[k] = weight * sample.weight[k];
  }
  return corners;
}

// ---- Kernels ----

// One (query, head) of the schedule; `slot` counts them. Without a query, `samples` is -1.
struct Item {
  int64_t image, head, query, slot;
  int samples;
};

__device__ __forceinline__ Item find_item(const Problem& problem, const Tile& tile, int64_t image,
                                          int64_t head, int place) {
  Item item = {image, head, 0, 0, 0};
  const int64_t query = tile.query(place);
  item.samples = query < 0 ? -1 : static_cast<int>(problem.samples());
  item.query = item.image * problem.queries + (query < 0 ? 0 : query);
  item.slot = item.query * problem.heads + item.head;
  return item;
}

// Where in value its image's and head's first row begins.
__device__ __forceinline__ int64_t find_rows(const Problem& problem, const Item& item) {
  return (item.image * problem.tokens * problem.heads + item.head) * problem.channels;
}

// The inputs from the item's first number on.
template <typename T, typename A, typename O>
__device__ __forceinline__ Inputs<T, A, O> inputs_of(const Problem& problem, const Item& item,
                                                     const Inputs<T, A, O>& inputs) {
  const int64_t first = item.slot * problem.samples();
  return {inputs.value + find_rows(problem, item),
          inputs.reference + item.query * problem.levels.count * problem.coordinates(),
          inputs.offsets + first * 2, inputs.logits + first};
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
  const int points = static_cast<int>(problem.points);
  const int64_t channels = problem.channels;
  const uint32_t heads = static_cast<uint32_t>(problem.heads);
  for (uint32_t image_head = blockIdx.y; image_head < problem.batch * problem.heads;
       image_head += gridDim.y) {
    const uint32_t image = image_head / heads, head = image_head % heads;
    for (int32_t round = 0; round < kQueries / kGroups; ++round) {
      const Tile tile = find_tile(problem, schedule, blockIdx.x);
      const Item item = find_item(problem, tile, image, head, round * kGroups + group);
      const Inputs<T, A, O> own = inputs_of(problem, item, inputs);
      const Softmax<A> softmax = find_softmax<A, kLanes>(problem, own.logits, item.samples, lane);
      for (int64_t block = 0; block < channels; block += kLanes * kVector) {
        const int64_t c = block + lane * kVector;
        const T* value = own.value + c;
        A sum[kVector] = {};
        for (int first = 0; first < samples; first += kChunk) {
          const int last = first + kChunk < item.samples ? first + kChunk : item.samples;
          if (block == 0 || samples > kChunk) {  // else they are still those of the block before
            __syncwarp();                        // before the chunk before is overwritten
            for (int p = first + lane; p < last; p += kLanes)
              corners[p - first] = make_corners(problem, place(problem, own, p / points, p),
                                                softmax.weight(problem, own.logits[p]));
            __syncwarp();
          }
          if (c >= channels) continue;
          for (int p = first; p < last; ++p) {
            const Corners<A> corner = corners[p - first];
            DINO_D2_UNROLL
            for (int k = 0; k < 4; ++k) {
              if (corner.row[k] < 0) continue;
              const Pack<T, kVector> row =
                  *reinterpret_cast<const Pack<T, kVector>*>(value + corner.row[k]);
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
  // Of every query and head, for aggregate_kernel; nullptr: backward_kernel adds to value itself.
  Softmax<A>* __restrict__ softmax;
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

// Some channels of a point, read at its corners: `dot` becomes the products of value with the
// gradient of the output; where it `adds`, that of value grows.
template <int kVector, typename T, typename A>
__device__ __forceinline__ void visit_corners(const Corners<A>& corners, const T* value,
                                              const A (&gradient)[kVector], bool adds,
                                              A* grad_value, A (&dot)[4]) {
  DINO_D2_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int32_t begin = corners.row[k];
    if (begin < 0) continue;
    const Pack<T, kVector> row = *reinterpret_cast<const Pack<T, kVector>*>(value + begin);
    DINO_D2_UNROLL
    for (int v = 0; v < kVector; ++v) dot[k] += gradient[v] * static_cast<A>(row.at[v]);
    if (adds) add_atomically<kVector>(grad_value + begin, corners.coefficient[k], gradient);
  }
}

// Value and reference gradients are added with atomics: their order of addition varies. Where
// outputs.softmax is given, the value's gradient is left to aggregate_kernel.
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
  const bool aggregates = outputs.softmax != nullptr;  // elsewhere
  const int samples = static_cast<int>(problem.samples());
  const int points = static_cast<int>(problem.points);
  const int64_t channels = problem.channels;
  const uint32_t heads = static_cast<uint32_t>(problem.heads);
  for (uint32_t image_head = blockIdx.y; image_head < problem.batch * problem.heads;
       image_head += gridDim.y) {
    const uint32_t image = image_head / heads, head = image_head % heads;
    for (int32_t round = 0; round < kQueries / kGroups; ++round) {
      const Tile tile = find_tile(problem, schedule, blockIdx.x);
      const Item item = find_item(problem, tile, image, head, round * kGroups + group);
      const Inputs<T, A, O> own = inputs_of(problem, item, inputs);
      const int64_t reference = item.query * problem.levels.count * problem.coordinates();
      const Softmax<A> softmax = find_softmax<A, kLanes>(problem, own.logits, item.samples, lane);
      if (aggregates && item.samples >= 0 && lane == 0) outputs.softmax[item.slot] = softmax;
      A mean = A(0);  // of the weight gradients, by weight
      for (int first = 0; first < samples; first += kChunk) {
        const int last = first + kChunk < item.samples ? first + kChunk : item.samples;
        __syncwarp();  // before the chunk before is overwritten
        for (int p = first + lane; p < last; p += kLanes) {
          corners[p - first] = make_corners(problem, place(problem, own, p / points, p),
                                            softmax.weight(problem, own.logits[p]));
          dots[p - first] = {};
        }
        __syncwarp();
        for (int64_t block = 0; block < channels; block += kLanes * kVector) {
          const int64_t c = block + lane * kVector;
          const bool reads = item.samples >= 0 && c < channels;
          const T* value = own.value + c;
          A* grad_value = outputs.value + find_rows(problem, item) + c;
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
            if (reads)
              visit_corners(corners[p - first], value, gradient, !aggregates, grad_value, dot);
            const A sum = sum_four_over_group<kLanes>(dot, lane);
            if (lane % (kLanes / 4) == 0) dots[p - first].at[lane / (kLanes / 4)] += sum;
          }
        }
        __syncwarp();
        for (int p = first + lane; p < last; p += kLanes) {
          const Placed<A> placed = place(problem, own, p / points, p);
          const A weight = softmax.weight(problem, own.logits[p]);
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
        gradient = softmax.weight(problem, own.logits[p]) * (gradient - mean);
      }
    }
  }
}

// ---- The gradient of value where queries are tokens ----

// Neighbouring queries add to the same rows, so a block adds up on chip what falls into a window of
// rows, and adds the window to memory at the end; what falls beside goes to memory at once. A block
// is one warp, which owns its window and adds one point at a time: its lanes are the 4 corners, all
// different rows, times 8 vectors of 4 channels. So no number has two writers, and there is no need
// for atomics in shared memory, which for floats would be loops. It is a kernel of its own because
// gathering wants the memory of a multiprocessor as cache, and this wants it for windows.
constexpr int kSide = 12;  // of the window, in rows of value; a multiple of 4
constexpr int kVectors = 8;
constexpr int kAggregated = 4 * kVectors;  // channels of a block
constexpr int kQuads = 8;                  // 4 points each of as many queries, prepared at a time
constexpr int kSpare = 4;                  // rows before the window; what is added there is dropped

// Where on its map a window begins.
struct Origin {
  int32_t x, y;
};

// Where a corner adds its coefficient times the gradient of the output: `slot` is the first vector
// of a row of the window or, beside it, ~the row in memory. Corners off the map, and those of
// points that do not exist, have a spare row each.
template <typename A>
struct alignas(8) Target {
  int32_t slot;
  A coefficient;
};

// On the map where it can be, with `centre` in the middle otherwise.
template <typename A>
__device__ __forceinline__ int32_t begin_window(A centre, int32_t size) {
  const int32_t wanted = static_cast<int32_t>(centre) - (kSide / 2 - 1), last = size - kSide;
  const int32_t begin = wanted < last ? wanted : last;
  return begin > 0 ? begin : 0;
}

// Around the mean of 32 of the tile's samples, one of every second query.
template <typename T, typename A, typename O>
__device__ __forceinline__ Origin find_window(const Problem& problem, const Tile& tile,
                                              int64_t image, int64_t head, int level,
                                              const Inputs<T, A, O>& inputs) {
  const int lane = threadIdx.x, points = static_cast<int>(problem.points);
  const Item item = find_item(problem, tile, image, head, 2 * lane);
  A x = A(0), y = A(0), inside = A(0);
  if (item.samples >= 0) {
    const Inputs<T, A, O> own = inputs_of(problem, item, inputs);
    const Placed<A> placed = place(problem, own, level, level * points + lane % points);
    x = static_cast<A>(placed.sample.x);  // 0 where not inside
    y = static_cast<A>(placed.sample.y);
    inside = placed.sample.inside ? A(1) : A(0);
  }
  inside = sum_over_group<kWarpSize>(inside);
  const A share = inside > A(0) ? A(1) / inside : A(0);
  return {begin_window(sum_over_group<kWarpSize>(x) * share, problem.levels.width[level]),
          begin_window(sum_over_group<kWarpSize>(y) * share, problem.levels.height[level])};
}

template <typename A>
__device__ __forceinline__ Pack<Target<A>, 4> find_targets(const Problem& problem,
                                                           const Placed<A>& placed, A weight,
                                                           const Origin& origin) {
  const Corners<A> corners = make_corners(problem, placed, weight);
  Pack<Target<A>, 4> targets;
  DINO_D2_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int32_t x = placed.sample.x + k % 2 - origin.x, y = placed.sample.y + k / 2 - origin.y;
    const bool in_window = 0 <= x && x < kSide && 0 <= y && y < kSide;
    const int32_t row = corners.row[k] < 0 ? k : kSpare + y * kSide + x;
    targets.at[k].slot = in_window || corners.row[k] < 0 ? row * kVectors : ~corners.row[k];
    targets.at[k].coefficient = corners.coefficient[k];
  }
  return targets;
}

// Adds 4 points of a query. Between two of them the lanes wait: they may share rows.
template <typename A>
__device__ __forceinline__ void add_points(const Pack<Target<A>, 4> targets,
                                           const Pack<A, 4>& gradient, Pack<A, 4>* window,
                                           bool has_channels, A* grad_value) {
  const int spare = threadIdx.x / kVectors * kVectors;
  DINO_D2_UNROLL
  for (int p = 0; p < 4; ++p) {
    const Target<A> target = targets.at[p];
    Pack<A, 4>& slot = window[target.slot < 0 ? spare : target.slot];
    Pack<A, 4> sum = slot;
    DINO_D2_UNROLL
    for (int v = 0; v < 4; ++v) sum.at[v] = fmaf(target.coefficient, gradient.at[v], sum.at[v]);
    slot = sum;
    if (target.slot < 0 && has_channels)
      add_atomically<4>(grad_value + ~target.slot, target.coefficient, gradient.at);
    __syncwarp();
  }
}

// Adds the window to memory and empties it. What is still zero is spared: nothing came there.
template <typename A>
__device__ __forceinline__ void flush(Pack<A, 4>* window, const Origin& origin, int64_t width,
                                      bool has_channels, A* grad_level, int64_t stride) {
  const int corner = threadIdx.x / kVectors;
  A* row = grad_level + (origin.y * width + origin.x + corner) * stride;
  for (int y = 0; y < kSide; ++y, row += width * stride) {
    DINO_D2_UNROLL
    for (int x = 0; x < kSide; x += 4) {
      Pack<A, 4>& slot = window[(kSpare + y * kSide + x + corner) * kVectors];
      const Pack<A, 4> sum = slot;
      slot = {};
      const bool empty = (sum.at[0] == 0) & (sum.at[1] == 0) & (sum.at[2] == 0) & (sum.at[3] == 0);
      if (!empty && has_channels) add_atomically<4>(row + x * stride, A(1), sum.at);
    }
  }
}

template <typename A, typename T>
__device__ __forceinline__ Pack<A, 4> load_gradient(const T* address) {
  const Pack<T, 4> stored = *reinterpret_cast<const Pack<T, 4>*>(address);
  Pack<A, 4> gradient;
  DINO_D2_UNROLL
  for (int v = 0; v < 4; ++v) gradient.at[v] = static_cast<A>(stored.at[v]);
  return gradient;
}

// After backward_kernel; a block per level and tile, image and head, and kAggregated channels.
template <typename T, typename A, typename O>
__global__ void __launch_bounds__(kWarpSize)
    aggregate_kernel(const __grid_constant__ Problem problem,
                     const __grid_constant__ Schedule schedule, const T* __restrict__ grad_output,
                     const Inputs<T, A, O> inputs, const Outputs<A, O> outputs) {
  __shared__ Pack<A, 4> all_windows[kSpare + kSide * kSide][kVectors];
  __shared__ Pack<Target<A>, 4> targets[kQuads][4];  // of the points, by corner
  __shared__ int64_t rows[kQuads];                   // of the queries' gradients
  const int lane = threadIdx.x, corner = lane / kVectors, vector = lane % kVectors;
  const int quad = lane / 4, point = lane % 4;  // that the lane prepares
  const int points = static_cast<int>(problem.points);
  const int64_t channels = problem.channels, stride = problem.heads * channels;
  const int c = blockIdx.z * kAggregated + vector * 4;
  // Lanes without channels work along, and their part of the window is never added to memory.
  const bool has_channels = c < static_cast<int>(channels);
  const T* gradients = grad_output + (has_channels ? c : 0);
  const int level = blockIdx.x % problem.levels.count;
  const Tile tile = find_tile(problem, schedule, blockIdx.x / problem.levels.count);
  const uint32_t heads = static_cast<uint32_t>(problem.heads);
  Pack<A, 4>* window = &all_windows[0][vector];
  for (int row = corner; row < kSpare + kSide * kSide; row += 4) window[row * kVectors] = {};
  for (uint32_t image_head = blockIdx.y; image_head < problem.batch * problem.heads;
       image_head += gridDim.y) {
    const uint32_t image = image_head / heads, head = image_head % heads;
    const Origin origin = find_window(problem, tile, image, head, level, inputs);
    A* grad_value = outputs.value + image * problem.tokens * stride + head * channels + c;
    for (int first_query = 0; first_query < kQueries; first_query += kQuads) {
      const Item item = find_item(problem, tile, image, head, first_query + quad);
      const Inputs<T, A, O> own = inputs_of(problem, item, inputs);
      for (int first = 0; first < points; first += 4) {
        Pack<Target<A>, 4> prepared;
        DINO_D2_UNROLL
        for (int k = 0; k < 4; ++k) prepared.at[k] = {k * kVectors, A(0)};
        if (item.samples >= 0 && first + point < points) {
          const int sample = level * points + first + point;
          const T logit = own.logits[sample];  // loaded before anything waits
          const Softmax<A> softmax = outputs.softmax[item.slot];
          const Placed<A> placed = place(problem, own, level, sample);
          prepared = find_targets(problem, placed, softmax.weight(problem, logit), origin);
        }
        DINO_D2_UNROLL
        for (int k = 0; k < 4; ++k) targets[quad][k].at[point] = prepared.at[k];
        if (point == 0) rows[quad] = item.slot * channels;
        __syncwarp();
        Pack<A, 4> next = load_gradient<A>(gradients + rows[0]);
        for (int q = 0; q < kQuads; ++q) {
          const Pack<A, 4> gradient = next;
          next =
              load_gradient<A>(gradients + rows[(q + 1) % kQuads]);  // while the points are added
          add_points(targets[q][corner], gradient, window, has_channels, grad_value);
        }
      }
    }
    flush(window, origin, problem.levels.width[level], has_channels,
          grad_value + problem.levels.start[level] * stride, stride);
  }
}

}  // namespace cuda
}  // namespace dino_d2
