// Runs the CUDA kernels of multi-scale deformable attention on the host.
// stdin:  10 int64 (batch, tokens, heads, channels, queries, points, levels, double?, seed,
// blocks),
//         (height, width) per level as int64, then value, locations, attention, grad_output.
// stdout: output, grad_value, grad_locations, grad_attention.
#include "cuda_on_host.h"
// first the emulation
#include <cstdio>

#include "../../../ops/ms_deform_attn/cuda/kernels.cuh"

template <typename T>
std::vector<T> read(size_t count) {
  std::vector<T> data(count);
  if (std::fread(data.data(), sizeof(T), count, stdin) != count) std::abort();
  return data;
}

template <typename T>
void write(const std::vector<T>& data) {
  std::fwrite(data.data(), sizeof(T), data.size(), stdout);
}

template <typename T>
void run(const dino_d2::Problem& p, unsigned seed, unsigned blocks) {
  const size_t slots = p.batch * p.queries * p.heads, samples = slots * p.samples();
  const std::vector<T> value = read<T>(p.batch * p.tokens * p.heads * p.channels);
  const std::vector<T> locations = read<T>(samples * 2), attention = read<T>(samples);
  const std::vector<T> grad_output = read<T>(slots * p.channels);
  std::vector<T> output(slots * p.channels, T(-1)), grad_value(value.size(), T(0));
  std::vector<T> grad_locations(samples * 2, T(-1)), grad_attention(samples, T(-1));
  emulation::launch(blocks, 64, seed, [&] {
    dino_d2::cuda::forward_kernel<T, T>(p, value.data(), locations.data(), attention.data(),
                                        output.data());
  });
  emulation::launch(blocks, 64, seed, [&] {
    dino_d2::cuda::backward_kernel<T, T>(p, grad_output.data(), value.data(), locations.data(),
                                         attention.data(), grad_value.data(), grad_locations.data(),
                                         grad_attention.data());
  });
  write(output), write(grad_value), write(grad_locations), write(grad_attention);
}

int main() {
  const std::vector<int64_t> header = read<int64_t>(10);
  dino_d2::Problem problem{header[0], header[1], header[2], header[3], header[4], header[5], {}};
  problem.levels.count = static_cast<int32_t>(header[6]);
  int32_t start = 0;
  for (int level = 0; level < problem.levels.count; ++level) {
    const std::vector<int64_t> size = read<int64_t>(2);
    problem.levels.height[level] = static_cast<int32_t>(size[0]);
    problem.levels.width[level] = static_cast<int32_t>(size[1]);
    problem.levels.start[level] = start;
    start += static_cast<int32_t>(size[0] * size[1]);
  }
  if (header[7])
    run<double>(problem, header[8], header[9]);
  else
    run<float>(problem, header[8], header[9]);
}
