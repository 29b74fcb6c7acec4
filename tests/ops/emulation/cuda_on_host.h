// Runs CUDA kernels on the host, one fiber per thread, so that they can be tested without a GPU and
// under sanitizers. Supports what the kernels use: thread and block indices, shared memory, warp
// barriers and shuffles with a full mask, and atomicAdd. Threads of a block run in an order
// shuffled by `seed`: what a kernel reads from shared memory without a barrier is wrong in some
// order. The memory model is not emulated.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)

struct Index {
  unsigned x, y = 0, z = 0;
};
inline Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

constexpr int kWarp = 32;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done = false;
};

struct Warp {
  alignas(8) char slot[kWarp][8];
  int arrived = 0;
  uint64_t generation = 0;
};

inline ucontext_t scheduler;
inline std::vector<Fiber>* fibers;
inline std::vector<Warp>* warps;
inline const std::function<void()>* body;
inline int64_t additions = 0;  // calls of atomicAdd

inline void yield() { swapcontext(&(*fibers)[threadIdx.x].context, &scheduler); }

inline void warp_barrier() {
  Warp& warp = (*warps)[threadIdx.x / kWarp];
  const uint64_t generation = warp.generation;
  if (++warp.arrived == kWarp) {
    warp.arrived = 0;
    ++warp.generation;
  }
  while (warp.generation == generation) yield();
}

template <typename T>
T exchange(T value, int source) {
  Warp& warp = (*warps)[threadIdx.x / kWarp];
  std::memcpy(warp.slot[threadIdx.x % kWarp], &value, sizeof(T));
  warp_barrier();
  T result;
  std::memcpy(&result, warp.slot[source], sizeof(T));
  warp_barrier();
  return result;
}

inline void enter() {
  (*body)();
  (*fibers)[threadIdx.x].done = true;
  yield();
}

// kernel() for every thread of every block.
inline void launch(Index blocks, unsigned threads, unsigned seed,
                   const std::function<void()>& kernel) {
  constexpr size_t kStack = 1 << 16;
  std::mt19937 random(seed);
  body = &kernel;
  gridDim = blocks, blockDim = {threads};
  std::vector<Fiber> block_fibers(threads);
  for (Fiber& fiber : block_fibers) fiber.stack.reset(new char[kStack]);
  for (unsigned block = 0; block < blocks.x * blocks.y * blocks.z; ++block) {
    blockIdx = {block % blocks.x, block / blocks.x % blocks.y, block / blocks.x / blocks.y};
    std::vector<Warp> block_warps(threads / kWarp);
    fibers = &block_fibers, warps = &block_warps;
    for (Fiber& fiber : block_fibers) {
      fiber.done = false;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = &scheduler;
      makecontext(&fiber.context, enter, 0);
    }
    std::vector<unsigned> order(threads);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t running = threads; running > 0;) {
      std::shuffle(order.begin(), order.end(), random);
      running = 0;
      for (unsigned thread : order) {
        if (block_fibers[thread].done) continue;
        threadIdx = {thread};
        swapcontext(&scheduler, &block_fibers[thread].context);
        running += !block_fibers[thread].done;
      }
    }
  }
}

}  // namespace emulation

inline void __syncwarp() { emulation::warp_barrier(); }

template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return emulation::exchange(value, static_cast<int>(threadIdx.x % emulation::kWarp) ^ mask);
}

template <typename T>
void atomicAdd(T* address, T value) {
  *address += value;
  ++emulation::additions;
}
