// The CUDA kernels as the host code sees them: raw pointers, no PyTorch and no CUDA headers.
#pragma once

#include "../problem.h"

namespace dino_d2 {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// Locations and everything accumulated are float, or double where the storage is double.
// Each launches on `stream` (a cudaStream_t) and returns the launch's error text, or nullptr.
const char* launch_forward(Storage storage, const Problem& problem, const void* value,
                           const void* locations, const void* attention, void* output,
                           void* stream);
// grad_value starts at zero.
const char* launch_backward(Storage storage, const Problem& problem, const void* grad_output,
                            const void* value, const void* locations, const void* attention,
                            void* grad_value, void* grad_locations, void* grad_attention,
                            void* stream);

}  // namespace dino_d2
