#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "kernels.cuh"
#include "launch.h"

namespace dino_d2 {
namespace {

// A block per tile and (image, head), the latter slowest: blocks that run together share rows of
// value. The kernels stride over images and heads beyond the grid's limit.
dim3 grid(const Problem& problem, const cuda::Schedule& schedule) {
  const int64_t heads = problem.batch * problem.heads, most = 65535;
  return dim3(schedule.tiles, static_cast<unsigned>(heads < most ? heads : most));
}

// One kernel's types and shape.
template <typename T, typename A, typename O, int kLanes, int kVector>
struct Launch {
  static cuda::Inputs<T, A, O> typed(const Pointers& inputs) {
    return {static_cast<const T*>(inputs.value), static_cast<const A*>(inputs.reference),
            static_cast<const O*>(inputs.offsets), static_cast<const T*>(inputs.logits)};
  }

  static void run(const Problem& problem, const Pointers& inputs, void* output,
                  cudaStream_t stream) {
    const cuda::Schedule schedule = cuda::make_schedule(problem);
    cuda::forward_kernel<T, A, O, kLanes, kVector>
        <<<grid(problem, schedule), cuda::kThreads, 0, stream>>>(problem, schedule, typed(inputs),
                                                                 static_cast<T*>(output));
  }

  static void run(const Problem& problem, const void* grad_output, const Pointers& inputs,
                  const GradientPointers& outputs, cudaStream_t stream) {
    const cuda::Schedule schedule = cuda::make_schedule(problem);
    const cuda::Outputs<A, O> results = {
        static_cast<A*>(outputs.value), static_cast<A*>(outputs.reference),
        static_cast<O*>(outputs.offsets), static_cast<A*>(outputs.logits),
        static_cast<cuda::Softmax<A>*>(outputs.softmax)};
    const T* gradient = static_cast<const T*>(grad_output);
    cuda::backward_kernel<T, A, O, kLanes, kVector>
        <<<grid(problem, schedule), cuda::kThreads, 0, stream>>>(problem, schedule, gradient,
                                                                 typed(inputs), results);
    if constexpr (sizeof(A) == sizeof(float))
      if (outputs.softmax != nullptr) {
        const auto aggregate = cuda::aggregate_kernel<T, A, O>;
        // A hint: as many windows as fit, for the kernel reads little that a cache would keep.
        cudaFuncSetAttribute(aggregate, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared);
        dim3 blocks = grid(problem, schedule);
        blocks.x *= problem.levels.count;
        blocks.z = static_cast<unsigned>((problem.channels - 1) / cuda::kAggregated + 1);
        aggregate<<<blocks, cuda::kWarpSize, 0, stream>>>(problem, schedule, gradient,
                                                          typed(inputs), results);
      }
  }
};

// Lanes of 16 bytes where rows allow it, 8 lanes where there are channels for them; otherwise one
// channel per lane.
template <typename T, typename A, typename O, typename... Arguments>
void choose_lanes(const Problem& problem, const Arguments&... arguments) {
  if constexpr (sizeof(T) <= sizeof(float)) {
    constexpr int kVector = 16 / sizeof(T);
    if (problem.channels % kVector == 0) {
      if (problem.channels > 4 * kVector)
        Launch<T, A, O, 8, kVector>::run(problem, arguments...);
      else
        Launch<T, A, O, 4, kVector>::run(problem, arguments...);
      return;
    }
  }
  Launch<T, A, O, 8, 1>::run(problem, arguments...);
}

template <typename... Arguments>
const char* choose_types(Storage storage, const Problem& problem, const Arguments&... arguments) {
  if (problem.tokens * problem.heads > INT32_MAX / (problem.channels > 0 ? problem.channels : 1))
    return "one image of value has 2**31 numbers or more";  // rows are addressed by 32 bits
  const bool fused = problem.has_softmax();
  if (storage == Storage::kFloat)
    choose_lanes<float, float, float>(problem, arguments...);
  else if (storage == Storage::kDouble)
    choose_lanes<double, double, double>(problem, arguments...);
  else if (storage == Storage::kHalf && fused)
    choose_lanes<__half, float, __half>(problem, arguments...);
  else if (storage == Storage::kHalf)
    choose_lanes<__half, float, float>(problem, arguments...);
  else if (fused)
    choose_lanes<__nv_bfloat16, float, __nv_bfloat16>(problem, arguments...);
  else
    choose_lanes<__nv_bfloat16, float, float>(problem, arguments...);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

bool can_aggregate(Storage storage, const Problem& problem) {
  constexpr int64_t kMostChannels = 1024;  // far below the grid's limit
  return storage != Storage::kDouble && problem.queries == problem.tokens && problem.points > 0 &&
         problem.channels % 4 == 0 && 0 < problem.channels && problem.channels <= kMostChannels;
}

const char* launch_forward(Storage storage, const Problem& problem, const Pointers& inputs,
                           void* output, void* stream) {
  return choose_types(storage, problem, inputs, output, static_cast<cudaStream_t>(stream));
}

const char* launch_backward(Storage storage, const Problem& problem, const void* grad_output,
                            const Pointers& inputs, const GradientPointers& outputs, void* stream) {
  return choose_types(storage, problem, grad_output, inputs, outputs,
                      static_cast<cudaStream_t>(stream));
}

}  // namespace dino_d2
