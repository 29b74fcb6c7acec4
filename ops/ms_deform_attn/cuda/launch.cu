#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.cuh"
#include "launch.h"

namespace dino_d2 {
namespace {

constexpr int kThreads = 256;

// The kernels stride over their items, so a bounded grid covers any number of them.
unsigned blocks(const Problem& problem) {
  const int64_t warps = problem.batch * problem.queries * problem.heads;
  const int64_t per_block = kThreads / cuda::kWarpSize;
  const int64_t wanted = (warps + per_block - 1) / per_block, most = int64_t(1) << 20;
  return static_cast<unsigned>(wanted < most ? wanted : most);
}

template <typename T, typename A>
void forward(const Problem& problem, const void* value, const void* locations,
             const void* attention, void* output, cudaStream_t stream) {
  cuda::forward_kernel<T, A><<<blocks(problem), kThreads, 0, stream>>>(
      problem, static_cast<const T*>(value), static_cast<const A*>(locations),
      static_cast<const T*>(attention), static_cast<T*>(output));
}

template <typename T, typename A>
void backward(const Problem& problem, const void* grad_output, const void* value,
              const void* locations, const void* attention, void* grad_value, void* grad_locations,
              void* grad_attention, cudaStream_t stream) {
  cuda::backward_kernel<T, A><<<blocks(problem), kThreads, 0, stream>>>(
      problem, static_cast<const T*>(grad_output), static_cast<const T*>(value),
      static_cast<const A*>(locations), static_cast<const T*>(attention),
      static_cast<A*>(grad_value), static_cast<A*>(grad_locations),
      static_cast<T*>(grad_attention));
}

const char* launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_forward(Storage storage, const Problem& problem, const void* value,
                           const void* locations, const void* attention, void* output,
                           void* stream) {
  auto launch = storage == Storage::kFloat    ? forward<float, float>
                : storage == Storage::kDouble ? forward<double, double>
                : storage == Storage::kHalf   ? forward<__half, float>
                                              : forward<__nv_bfloat16, float>;
  launch(problem, value, locations, attention, output, static_cast<cudaStream_t>(stream));
  return launch_error();
}

const char* launch_backward(Storage storage, const Problem& problem, const void* grad_output,
                            const void* value, const void* locations, const void* attention,
                            void* grad_value, void* grad_locations, void* grad_attention,
                            void* stream) {
  auto launch = storage == Storage::kFloat    ? backward<float, float>
                : storage == Storage::kDouble ? backward<double, double>
                : storage == Storage::kHalf   ? backward<__half, float>
                                              : backward<__nv_bfloat16, float>;
  launch(problem, grad_output, value, locations, attention, grad_value, grad_locations,
         grad_attention, static_cast<cudaStream_t>(stream));
  return launch_error();
}

}  // namespace dino_d2
