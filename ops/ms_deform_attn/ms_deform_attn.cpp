// Host side of multi-scale deformable attention: checks the arguments, allocates the results, calls
// the kernels of the tensors' device and registers both under the schemas that
// dino_d2/ops/ms_deform_attn.py defines.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/kernels.h"
#if defined(DINO_D2_WITH_CUDA)
#include "cuda/launch.h"
#endif

namespace dino_d2 {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = torch::headeronly::HeaderOnlyArrayRef<int64_t>;

std::string text(Sizes sizes) {
  std::string result = "(";
  for (size_t i = 0; i < sizes.size(); ++i) result += (i ? ", " : "") + std::to_string(sizes[i]);
  return result + ")";
}

void check_size(const char* name, const Tensor& tensor, std::vector<int64_t> expected) {
  const Sizes sizes = tensor.sizes(), wanted(expected.data(), expected.size());
  bool equal = sizes.size() == wanted.size();
  for (size_t i = 0; equal && i < sizes.size(); ++i) equal = sizes[i] == wanted[i];
  STD_TORCH_CHECK(equal, "ms_deform_attn: ", name, " must have shape ", text(wanted),
                  " to fit the other arguments, but has ", text(sizes));
}

void check_like(const char* name, const Tensor& tensor, const Tensor& value, ScalarType type) {
  STD_TORCH_CHECK(tensor.is_cuda() == value.is_cuda() && tensor.is_cpu() == value.is_cpu() &&
                      tensor.get_device_index() == value.get_device_index(),
                  "ms_deform_attn: ", name, " must be on the device of value");
  STD_TORCH_CHECK(tensor.scalar_type() == type, "ms_deform_attn: ", name,
                  " has the wrong dtype for this value");
}

// float, or double where value is double.
ScalarType accumulation_type(const Tensor& value) {
  return value.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Every relation between the arguments that a kernel relies on. dino_d2.ops repeats these checks in
// Python with the same errors on every backend; here they keep a direct call of the operator safe.
Problem check(const Tensor& value, Sizes spatial_shapes, const Tensor& locations,
              const Tensor& attention) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be (B, S, H, C), but has shape ",
                  text(value.sizes()));
  STD_TORCH_CHECK(locations.dim() == 6,
                  "ms_deform_attn: sampling_locations must be (B, Q, H, L, P, 2), but has shape ",
                  text(locations.sizes()));
  STD_TORCH_CHECK(spatial_shapes.size() % 2 == 0 && spatial_shapes.size() / 2 <= kMaxLevels,
                  "ms_deform_attn: spatial_shapes must be (height, width) of at most ", kMaxLevels,
                  " levels, but holds ", spatial_shapes.size(), " numbers");
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::Half || type == ScalarType::BFloat16,
                  "ms_deform_attn: value must be float64, float32, float16 or bfloat16");
  check_like("sampling_locations", locations, value, accumulation_type(value));
  check_like("attention_weights", attention, value, type);

  Problem problem;
  problem.batch = value.size(0);
  problem.tokens = value.size(1);
  problem.heads = value.size(2);
  problem.channels = value.size(3);
  problem.queries = locations.size(1);
  problem.points = locations.size(4);
  problem.levels.count = static_cast<int32_t>(spatial_shapes.size() / 2);
  int64_t tokens = 0;
  for (int32_t level = 0; level < problem.levels.count; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(0 < height && height <= INT32_MAX && 0 < width && width <= INT32_MAX,
                    "ms_deform_attn: spatial_shapes[", level, "] = (", height, ", ", width,
                    ") must be positive and below 2**31");
    problem.levels.height[level] = static_cast<int32_t>(height);
    problem.levels.width[level] = static_cast<int32_t>(width);
    problem.levels.start[level] = static_cast<int32_t>(tokens);
    tokens += height * width;  // at most 2**31 + (2**31 - 1)**2: no overflow before the next check
    STD_TORCH_CHECK(tokens <= INT32_MAX,
                    "ms_deform_attn: spatial_shapes hold 2**31 tokens or more");
  }
  STD_TORCH_CHECK(tokens == problem.tokens, "ms_deform_attn: spatial_shapes hold ", tokens,
                  " tokens, but value has ", problem.tokens);
  check_size(
      "sampling_locations", locations,
      {problem.batch, problem.queries, problem.heads, problem.levels.count, problem.points, 2});
  check_size("attention_weights", attention,
             {problem.batch, problem.queries, problem.heads, problem.levels.count, problem.points});
  return problem;
}

void check_gradient(const Tensor& grad_output, const Tensor& value, const Problem& problem) {
  check_like("grad_output", grad_output, value, value.scalar_type());
  check_size("grad_output", grad_output,
             {problem.batch, problem.queries, problem.heads * problem.channels});
}

// The widest instruction set that the processor has; DINO_D2_ISA=baseline|avx2 asks for less.
Kernels choose_kernels() {
#if defined(__x86_64__)
  const char* wish = std::getenv("DINO_D2_ISA");
  const std::string most = wish == nullptr ? "avx512" : wish;
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && most == "avx512") return avx512::kernels();
  if (has_avx2 && most != "baseline") return avx2::kernels();
#endif
  return baseline::kernels();
}

const Kernels& kernels() {
  static const Kernels chosen = choose_kernels();
  return chosen;
}

// Where one query stands for one token (the encoder), neighbours on the map sample neighbouring
// rows of value; square tiles of queries keep those rows in the cache.
std::vector<int32_t> visiting_order(const Problem& problem) {
  constexpr int32_t kTile = 16;
  std::vector<int32_t> order;
  order.reserve(problem.queries);
  if (problem.queries != problem.tokens) {
    for (int64_t query = 0; query < problem.queries; ++query) order.push_back(query);
    return order;
  }
  for (int32_t level = 0; level < problem.levels.count; ++level) {
    const int32_t height = problem.levels.height[level], width = problem.levels.width[level];
    for (int32_t top = 0; top < height; top += kTile)
      for (int32_t left = 0; left < width; left += kTile)
        for (int32_t y = top; y < std::min(top + kTile, height); ++y)
          for (int32_t x = left; x < std::min(left + kTile, width); ++x)
            order.push_back(problem.levels.start[level] + y * width + x);
  }
  return order;
}

// Height, width and first token of every point's level.
struct PointArrays {
  std::vector<int32_t> height, width, start;

  explicit PointArrays(const Problem& problem) {
    for (int32_t level = 0; level < problem.levels.count; ++level) {
      height.insert(height.end(), problem.points, problem.levels.height[level]);
      width.insert(width.end(), problem.points, problem.levels.width[level]);
      start.insert(start.end(), problem.points, problem.levels.start[level]);
    }
  }

  PointTable table() const { return {height.data(), width.data(), start.data()}; }
};

template <typename T>
void run_forward(const Problem& problem, const Tensor& value, const Tensor& locations,
                 const Tensor& attention, Tensor& output,
                 void (*kernel)(const ForwardArguments<T>&, int64_t, int64_t, void*)) {
  const PointArrays points(problem);
  const PointTable table = points.table();
  const std::vector<int32_t> order = visiting_order(problem);
  const ForwardArguments<T> arguments = {&problem,
                                         &table,
                                         order.data(),
                                         value.const_data_ptr<T>(),
                                         locations.const_data_ptr<T>(),
                                         attention.const_data_ptr<T>(),
                                         output.mutable_data_ptr<T>()};
  torch::stable::parallel_for(0, problem.batch * problem.queries, 16,
                              [&](int64_t begin, int64_t end) {
                                std::vector<char> scratch(scratch_bytes<T>(problem.samples()));
                                kernel(arguments, begin, end, scratch.data());
                              });
}

template <typename T>
void run_backward(const Problem& problem, const Tensor& grad_output, const Tensor& value,
                  const Tensor& locations, const Tensor& attention, Tensor& grad_value,
                  Tensor& grad_locations, Tensor& grad_attention,
                  void (*kernel)(const BackwardArguments<T>&, int64_t, int64_t, int64_t, int64_t,
                                 void*)) {
  const PointArrays points(problem);
  const PointTable table = points.table();
  const std::vector<int32_t> order = visiting_order(problem);
  const BackwardArguments<T> arguments = {&problem,
                                          &table,
                                          order.data(),
                                          grad_output.const_data_ptr<T>(),
                                          value.const_data_ptr<T>(),
                                          locations.const_data_ptr<T>(),
                                          attention.const_data_ptr<T>(),
                                          grad_value.mutable_data_ptr<T>(),
                                          grad_locations.mutable_data_ptr<T>(),
                                          grad_attention.mutable_data_ptr<T>()};
  // One task owns a head of an image, or one level of it where there are more threads than heads.
  const int64_t owners = problem.batch * problem.heads;
  const bool split = owners < static_cast<int64_t>(torch::stable::get_num_threads());
  const int64_t parts = split ? problem.levels.count : 1;
  torch::stable::parallel_for(0, owners * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<char> scratch(scratch_bytes<T>(problem.samples()));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t owner = task / parts, part = task % parts;
      kernel(arguments, owner / problem.heads, owner % problem.heads, split ? part : 0,
             split ? part + 1 : problem.levels.count, scratch.data());
    }
  });
}

Tensor forward_cpu(const Tensor& value, Sizes spatial_shapes, const Tensor& sampling_locations,
                   const Tensor& attention_weights) {
  const Problem problem = check(value, spatial_shapes, sampling_locations, attention_weights);
  const ScalarType type = accumulation_type(value);
  const Tensor wide = torch::stable::contiguous(torch::stable::to(value, type));
  const Tensor locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(torch::stable::to(attention_weights, type));
  Tensor output = torch::stable::new_empty(
      wide, {problem.batch, problem.queries, problem.heads * problem.channels});
  if (type == ScalarType::Double)
    run_forward<double>(problem, wide, locations, attention, output, kernels().forward_double);
  else
    run_forward<float>(problem, wide, locations, attention, output, kernels().forward_float);
  return torch::stable::to(output, value.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor> backward_cpu(const Tensor& grad_output, const Tensor& value,
                                                Sizes spatial_shapes,
                                                const Tensor& sampling_locations,
                                                const Tensor& attention_weights) {
  const Problem problem = check(value, spatial_shapes, sampling_locations, attention_weights);
  check_gradient(grad_output, value, problem);
  const ScalarType type = accumulation_type(value), stored = value.scalar_type();
  const Tensor gradient = torch::stable::contiguous(torch::stable::to(grad_output, type));
  const Tensor wide = torch::stable::contiguous(torch::stable::to(value, type));
  const Tensor locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(torch::stable::to(attention_weights, type));
  Tensor grad_value = torch::stable::new_zeros(wide, wide.sizes());
  Tensor grad_locations = torch::stable::empty_like(locations);
  Tensor grad_attention = torch::stable::empty_like(attention);
  if (type == ScalarType::Double)
    run_backward<double>(problem, gradient, wide, locations, attention, grad_value, grad_locations,
                         grad_attention, kernels().backward_double);
  else
    run_backward<float>(problem, gradient, wide, locations, attention, grad_value, grad_locations,
                        grad_attention, kernels().backward_float);
  return {torch::stable::to(grad_value, stored), grad_locations,
          torch::stable::to(grad_attention, stored)};
}

#if defined(DINO_D2_WITH_CUDA)
Storage storage(const Tensor& value) {
  switch (value.scalar_type()) {
    case ScalarType::Double:
      return Storage::kDouble;
    case ScalarType::Half:
      return Storage::kHalf;
    case ScalarType::BFloat16:
      return Storage::kBFloat16;
    default:
      return Storage::kFloat;
  }
}

void* current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return stream;
}

Tensor forward_cuda(const Tensor& value, Sizes spatial_shapes, const Tensor& sampling_locations,
                    const Tensor& attention_weights) {
  const Problem problem = check(value, spatial_shapes, sampling_locations, attention_weights);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor stored = torch::stable::contiguous(value);
  const Tensor locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(attention_weights);
  Tensor output = torch::stable::new_empty(
      stored, {problem.batch, problem.queries, problem.heads * problem.channels});
  if (output.numel() == 0) return output;
  const char* error =
      launch_forward(storage(value), problem, stored.const_data_ptr(), locations.const_data_ptr(),
                     attention.const_data_ptr(), output.mutable_data_ptr(), current_stream(value));
  STD_TORCH_CHECK(error == nullptr, "ms_deform_attn: the CUDA kernel could not start: ", error);
  return output;
}

std::tuple<Tensor, Tensor, Tensor> backward_cuda(const Tensor& grad_output, const Tensor& value,
                                                 Sizes spatial_shapes,
                                                 const Tensor& sampling_locations,
                                                 const Tensor& attention_weights) {
  const Problem problem = check(value, spatial_shapes, sampling_locations, attention_weights);
  check_gradient(grad_output, value, problem);
  const torch::stable::accelerator::DeviceGuard guard(value.get_device_index());
  const Tensor gradient = torch::stable::contiguous(grad_output);
  const Tensor stored = torch::stable::contiguous(value);
  const Tensor locations = torch::stable::contiguous(sampling_locations);
  const Tensor attention = torch::stable::contiguous(attention_weights);
  Tensor grad_value = torch::stable::new_zeros(stored, stored.sizes(), accumulation_type(value));
  Tensor grad_locations = torch::stable::empty_like(locations);
  Tensor grad_attention = torch::stable::empty_like(attention);
  if (problem.batch * problem.queries * problem.heads > 0) {
    const char* error =
        launch_backward(storage(value), problem, gradient.const_data_ptr(), stored.const_data_ptr(),
                        locations.const_data_ptr(), attention.const_data_ptr(),
                        grad_value.mutable_data_ptr(), grad_locations.mutable_data_ptr(),
                        grad_attention.mutable_data_ptr(), current_stream(value));
    STD_TORCH_CHECK(error == nullptr, "ms_deform_attn: the CUDA kernel could not start: ", error);
  }
  return {torch::stable::to(grad_value, value.scalar_type()), grad_locations, grad_attention};
}
#endif

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cpu));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cpu));
}

#if defined(DINO_D2_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(dino_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&forward_cuda));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&backward_cuda));
}
#endif

}  // namespace dino_d2
