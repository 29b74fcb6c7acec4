// The CUDA kernels as the host code sees them: raw pointers, no PyTorch and no CUDA headers.
#pragma once

#include "../problem.h"

namespace dino_d2 {

enum class Storage { kFloat, kDouble, kHalf, kBFloat16 };

// Reference, value gradient, reference gradient and logit gradient are float, or double where the
// storage is double; so are the locations of Form::kLocations and their gradient. All else is
// stored as `storage` says. Every pointer is a multiple of 16.
struct Pointers {
  const void *value, *reference, *offsets, *logits;
};
struct GradientPointers {
  void *value, *reference;  // start at zero; reference: nullptr where not wanted
  void *offsets, *logits;
  void* softmax;  // workspace of 2 numbers per query and head; nullptr: do not aggregate
};

// Whether the gradient of value can be aggregated on chip: where queries are tokens, for channels
// that 16 bytes of float divide.
bool can_aggregate(Storage storage, const Problem& problem);

// Each launches on `stream` (a cudaStream_t) and returns the launch's error text, or nullptr.
const char* launch_forward(Storage storage, const Problem& problem, const Pointers& inputs,
                           void* output, void* stream);
const char* launch_backward(Storage storage, const Problem& problem, const void* grad_output,
                            const Pointers& inputs, const GradientPointers& outputs, void* stream);

}  // namespace dino_d2
