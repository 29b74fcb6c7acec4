// Runs the CUDA kernels of multi-scale deformable attention on the host.
// stdin:  14 int64 (batch, tokens, heads, channels, queries, points, levels, form, stored type as
//         in `kernels`, lanes, vector, seed, rows of the grid, whether to aggregate),
//         (height, width) per level as int64, then value, reference, offsets, logits, grad_output
//         in float, or in double for that type.
// stdout: output, grad_value, grad_reference, grad_offsets, grad_logits, likewise; then as int64,
//         how often the backward called atomicAdd.
#include "cuda_on_host.h"
// first the emulation
#include <cstdio>

#include "../../../ops/ms_deform_attn/cuda/kernels.cuh"

using namespace dino_d2;

// The upper half of a float, cut off.
struct BFloat16 {
  uint16_t bits;

  BFloat16() = default;
  explicit BFloat16(float number) {
    uint32_t whole;
    std::memcpy(&whole, &number, sizeof(whole));
    bits = static_cast<uint16_t>(whole >> 16);
  }
  explicit operator float() const {
    const uint32_t whole = uint32_t(bits) << 16;
    float number;
    std::memcpy(&number, &whole, sizeof(number));
    return number;
  }
};

// In memory that begins at a multiple of 16, as the kernels demand.
template <typename T>
struct Array {
  std::unique_ptr<char[]> memory;
  T* start;
  size_t count;

  explicit Array(size_t count) : memory(new char[count * sizeof(T) + 16]), count(count) {
    const size_t past = reinterpret_cast<uintptr_t>(memory.get()) % 16;
    start = reinterpret_cast<T*>(memory.get() + (16 - past) % 16);
    std::fill(start, start + count, T(0.0f));
  }
};

template <typename T, typename A>
Array<T> read(size_t count) {
  Array<T> data(count);
  for (size_t i = 0; i < count; ++i) {
    A number;
    if (std::fread(&number, sizeof(A), 1, stdin) != 1) std::abort();
    data.start[i] = static_cast<T>(number);
  }
  return data;
}

template <typename A, typename T>
void write(const Array<T>& data) {
  for (size_t i = 0; i < data.count; ++i) {
    const A number = static_cast<A>(data.start[i]);
    std::fwrite(&number, sizeof(A), 1, stdout);
  }
}

struct Options {
  unsigned seed, grid_rows;
  bool aggregates;
};

template <typename T, typename A, typename O, int kLanes, int kVector>
void run(const Problem& p, const Options& options) {
  const size_t slots = p.batch * p.queries * p.heads, samples = slots * p.samples();
  const auto value = read<T, A>(p.batch * p.tokens * p.heads * p.channels);
  const auto reference = read<A, A>(p.batch * p.queries * p.levels.count * p.coordinates());
  const auto offsets = read<O, A>(samples * 2);
  const auto logits = read<T, A>(samples);
  const auto grad_output = read<T, A>(slots * p.channels);
  Array<T> output(slots * p.channels);
  Array<A> grad_value(value.count), grad_reference(reference.count), grad_logits(samples);
  Array<O> grad_offsets(samples * 2);
  const cuda::Schedule schedule = cuda::make_schedule(p);
  Index grid = {static_cast<unsigned>(schedule.tiles), options.grid_rows, 1};
  const cuda::Inputs<T, A, O> inputs = {value.start, reference.start, offsets.start, logits.start};
  std::vector<cuda::Softmax<A>> softmax(slots);
  const cuda::Outputs<A, O> outputs = {
      grad_value.start, p.coordinates() > 0 ? grad_reference.start : nullptr, grad_offsets.start,
      grad_logits.start, options.aggregates ? softmax.data() : nullptr};
  emulation::launch(grid, cuda::kThreads, options.seed, [&] {
    cuda::forward_kernel<T, A, O, kLanes, kVector>(p, schedule, inputs, output.start);
  });
  emulation::launch(grid, cuda::kThreads, options.seed, [&] {
    cuda::backward_kernel<T, A, O, kLanes, kVector>(p, schedule, grad_output.start, inputs,
                                                    outputs);
  });
  if constexpr (sizeof(A) == sizeof(float))
    if (options.aggregates) {
      grid.x *= p.levels.count;
      grid.z = static_cast<unsigned>((p.channels - 1) / cuda::kAggregated + 1);
      emulation::launch(grid, cuda::kWarpSize, options.seed, [&] {
        cuda::aggregate_kernel<T, A, O>(p, schedule, grad_output.start, inputs, outputs);
      });
    }
  write<A>(output), write<A>(grad_value), write<A>(grad_reference);
  write<A>(grad_offsets), write<A>(grad_logits);
  std::fwrite(&emulation::additions, sizeof(int64_t), 1, stdout);
}

int main() {
  const auto header = read<int64_t, int64_t>(14);
  const int64_t* numbers = header.start;
  Problem problem = {numbers[0],
                     numbers[1],
                     numbers[2],
                     numbers[3],
                     numbers[4],
                     numbers[5],
                     static_cast<Form>(numbers[7]),
                     {}};
  problem.levels.count = static_cast<int32_t>(numbers[6]);
  int32_t start = 0;
  for (int level = 0; level < problem.levels.count; ++level) {
    const auto size = read<int64_t, int64_t>(2);
    problem.levels.height[level] = static_cast<int32_t>(size.start[0]);
    problem.levels.width[level] = static_cast<int32_t>(size.start[1]);
    problem.levels.start[level] = start;
    start += static_cast<int32_t>(size.start[0] * size.start[1]);
  }
  using Runner = void (*)(const Problem&, const Options&);
  struct Kernel {
    int64_t type, lanes, vector;  // type: 0 float, 1 double, 2 bfloat16, 3 that with float offsets
    Runner runner;
  };
  const Kernel kernels[] = {
      {0, 8, 4, run<float, float, float, 8, 4>},
      {0, 4, 4, run<float, float, float, 4, 4>},
      {0, 8, 1, run<float, float, float, 8, 1>},
      {1, 8, 1, run<double, double, double, 8, 1>},
      {2, 8, 8, run<BFloat16, float, BFloat16, 8, 8>},
      {2, 4, 8, run<BFloat16, float, BFloat16, 4, 8>},
      {3, 4, 8, run<BFloat16, float, float, 4, 8>},
      {2, 8, 1, run<BFloat16, float, BFloat16, 8, 1>},
  };
  for (const Kernel& kernel : kernels)
    if (kernel.type == numbers[8] && kernel.lanes == numbers[9] && kernel.vector == numbers[10]) {
      kernel.runner(problem, {static_cast<unsigned>(numbers[11]),
                              static_cast<unsigned>(numbers[12]), numbers[13] != 0});
      return 0;
    }
  return 1;
}
