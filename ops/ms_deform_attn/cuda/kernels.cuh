// CUDA kernels: one warp works on one (query, head). For the preparation its lanes are points: each
// lane locates one of up to 32 samples. For the gathering its lanes are channels: neighbouring
// lanes read neighbouring channels, and the prepared samples travel by shuffle. No shared memory,
// any number of channels and points.
//
// tests/ops/emulation compiles this file for the host.
#pragma once

#include "../problem.h"

namespace dino_d2 {
namespace cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kFullMask = 0xffffffffu;

// Locates the sample that this lane prepares; a lane without a point gets a sample outside.
template <typename A>
__device__ __forceinline__ Sample<A> locate_point(const Problem& problem, const A* locations,
                                                  int64_t point) {
  if (point >= problem.samples()) return locate<A>(A(-9), A(-9), 1, 1, 0);
  const int level = static_cast<int>(point / problem.points);
  return locate<A>(locations[2 * point], locations[2 * point + 1], problem.levels.height[level],
                   problem.levels.width[level], problem.levels.start[level]);
}

template <typename A>
__device__ __forceinline__ A sum_over_warp(A value) {
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
    value += __shfl_xor_sync(kFullMask, value, offset);
  return value;
}

// T: stored type; A: type of coordinates and accumulation.
template <typename T, typename A>
__global__ void forward_kernel(const Problem problem, const T* __restrict__ value,
                               const A* __restrict__ locations, const T* __restrict__ attention,
                               T* __restrict__ output) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps_per_block = blockDim.x / kWarpSize;
  const int64_t items = problem.batch * problem.queries * problem.heads;
  const int64_t samples = problem.samples(), channels = problem.channels;
  const int64_t token_stride = problem.heads * channels;
  for (int64_t item = blockIdx.x * warps_per_block + threadIdx.x / kWarpSize; item < items;
       item += gridDim.x * warps_per_block) {
    const int64_t image = item / (problem.queries * problem.heads), head = item % problem.heads;
    const T* image_value = value + image * problem.tokens * token_stride + head * channels;
    for (int64_t first_channel = 0; first_channel < channels; first_channel += kWarpSize) {
      const int64_t channel = first_channel + lane;
      A sum = A(0);
      for (int64_t first = 0; first < samples; first += kWarpSize) {
        const int64_t mine = first + lane;
        const Sample<A> sample = locate_point<A>(problem, locations + item * samples * 2, mine);
        const A weight = mine < samples ? static_cast<A>(attention[item * samples + mine]) : A(0);
        const int64_t remaining = samples - first;
        const int count = remaining < kWarpSize ? static_cast<int>(remaining) : kWarpSize;
        for (int p = 0; p < count; ++p) {
          for (int k = 0; k < 4; ++k) {
            const int32_t token = __shfl_sync(kFullMask, sample.token[k], p);
            const A coefficient = __shfl_sync(kFullMask, weight * sample.weight[k], p);
            if (token >= 0 && channel < channels)
              sum += coefficient * static_cast<A>(image_value[token * token_stride + channel]);
          }
        }
      }
      if (channel < channels) output[item * channels + channel] = static_cast<T>(sum);
    }
  }
}

// grad_value is accumulated with atomics: its order of addition, and so its last bits, vary.
template <typename T, typename A>
__global__ void backward_kernel(const Problem problem, const T* __restrict__ grad_output,
                                const T* __restrict__ value, const A* __restrict__ locations,
                                const T* __restrict__ attention, A* __restrict__ grad_value,
                                A* __restrict__ grad_locations, T* __restrict__ grad_attention) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t warps_per_block = blockDim.x / kWarpSize;
  const int64_t items = problem.batch * problem.queries * problem.heads;
  const int64_t samples = problem.samples(), channels = problem.channels;
  const int64_t token_stride = problem.heads * channels;
  for (int64_t item = blockIdx.x * warps_per_block + threadIdx.x / kWarpSize; item < items;
       item += gridDim.x * warps_per_block) {
    const int64_t image = item / (problem.queries * problem.heads), head = item % problem.heads;
    const int64_t origin = image * problem.tokens * token_stride + head * channels;
    const T* gradient = grad_output + item * channels;
    for (int64_t first = 0; first < samples; first += kWarpSize) {
      const int64_t mine = first + lane;
      const Sample<A> sample = locate_point<A>(problem, locations + item * samples * 2, mine);
      const A weight = mine < samples ? static_cast<A>(attention[item * samples + mine]) : A(0);
      A dot[4] = {A(0), A(0), A(0), A(0)};  // of the sample that this lane prepared
      const int64_t remaining = samples - first;
      const int count = remaining < kWarpSize ? static_cast<int>(remaining) : kWarpSize;
      for (int p = 0; p < count; ++p) {
        for (int k = 0; k < 4; ++k) {
          const int32_t token = __shfl_sync(kFullMask, sample.token[k], p);
          const A coefficient = __shfl_sync(kFullMask, weight * sample.weight[k], p);
          if (token < 0) continue;  // the same for every lane
          A product = A(0);
          for (int64_t channel = lane; channel < channels; channel += kWarpSize) {
            const int64_t offset = origin + token * token_stride + channel;
            const A g = static_cast<A>(gradient[channel]);
            product += g * static_cast<A>(value[offset]);
            atomicAdd(grad_value + offset, coefficient * g);
          }
          product = sum_over_warp(product);
          if (lane == p) dot[k] = product;
        }
      }
      if (mine >= samples) continue;
      SampleGradient<A> result = {A(0), A(0), A(0)};
      const int level = static_cast<int>(mine / problem.points);
      if (sample.inside)
        result = differentiate<A>(sample.weight, dot, sample.from_left, sample.from_top, weight,
                                  problem.levels.height[level], problem.levels.width[level]);
      grad_attention[item * samples + mine] = static_cast<T>(result.attention);
      grad_locations[(item * samples + mine) * 2] = result.location_x;
      grad_locations[(item * samples + mine) * 2 + 1] = result.location_y;
    }
  }
}

}  // namespace cuda
}  // namespace dino_d2
