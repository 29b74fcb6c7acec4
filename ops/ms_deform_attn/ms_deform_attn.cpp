// Host side of multi-scale deformable attention: checks the arguments, allocates the results, calls
// the kernels of the tensors' device and registers both under the schemas that
// dino_d2/ops/ms_deform_attn.py defines.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
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

Levels read_levels(Sizes spatial_shapes, int64_t tokens_of_value) {
  STD_TORCH_CHECK(spatial_shapes.size() % 2 == 0 && spatial_shapes.size() / 2 <= kMaxLevels,
                  "ms_deform_attn: spatial_shapes must be (height, width) of at most ", kMaxLevels,
                  " levels, but holds ", spatial_shapes.size(), " numbers");
  Levels levels = {};
  levels.count = static_cast<int32_t>(spatial_shapes.size() / 2);
  int64_t tokens = 0;
  for (int32_t level = 0; level < levels.count; ++level) {
    const int64_t height = spatial_shapes[2 * level], width = spatial_shapes[2 * level + 1];
    STD_TORCH_CHECK(0 < height && height <= INT32_MAX && 0 < width && width <= INT32_MAX,
                    "ms_deform_attn: spatial_shapes[", level, "] = (", height, ", ", width,
                    ") must be positive and below 2**31");
    levels.height[level] = static_cast<int32_t>(height);
    levels.width[level] = static_cast<int32_t>(width);
    levels.start[level] = static_cast<int32_t>(tokens);
    tokens += height * width;  // at most 2**31 + (2**31 - 1)**2: no overflow before the next check
    STD_TORCH_CHECK(tokens <= INT32_MAX,
                    "ms_deform_attn: spatial_shapes hold 2**31 tokens or more");
  }
  STD_TORCH_CHECK(tokens == tokens_of_value, "ms_deform_attn: spatial_shapes hold ", tokens,
                  " tokens, but value has ", tokens_of_value);
  return levels;
}

// The tensors of one call. For Form::kLocations offsets and logits are the sampling locations and
// attention weights, and reference is any tensor, which nobody reads.
struct Call {
  Problem problem;
  Tensor value, reference, offsets, logits;
};

// What the errors call them.
struct Names {
  const char *offsets, *logits;
};
constexpr Names kPlain = {"sampling_locations", "attention_weights"};
constexpr Names kFused = {"sampling_offsets", "attention_logits"};

// Every relation between the arguments that a kernel relies on. dino_d2.ops repeats these checks in
// Python with the same errors on every backend; here they keep a direct call of the operator safe.
Problem check(const Names& names, const Tensor& value, Sizes spatial_shapes, const Tensor& offsets,
              const Tensor& logits) {
  STD_TORCH_CHECK(value.dim() == 4, "ms_deform_attn: value must be (B, S, H, C), but has shape ",
                  text(value.sizes()));
  STD_TORCH_CHECK(offsets.dim() == 6, "ms_deform_attn: ", names.offsets,
                  " must be (B, Q, H, L, P, 2), but has shape ", text(offsets.sizes()));
  const ScalarType type = value.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double ||
                      type == ScalarType::Half || type == ScalarType::BFloat16,
                  "ms_deform_attn: value must be float64, float32, float16 or bfloat16");
  check_like(names.logits, logits, value, type);
  Problem problem = {};
  problem.batch = value.size(0);
  problem.tokens = value.size(1);
  problem.heads = value.size(2);
  problem.channels = value.size(3);
  problem.queries = offsets.size(1);
  problem.points = offsets.size(4);
  problem.levels = read_levels(spatial_shapes, problem.tokens);
  STD_TORCH_CHECK(problem.points <= INT32_MAX / kMaxLevels, "ms_deform_attn: ", names.offsets,
                  " have too many points: ", problem.points);
  STD_TORCH_CHECK(problem.heads <= INT32_MAX / std::max<int64_t>(problem.batch, 1),
                  "ms_deform_attn: value has too many heads: ", problem.heads);
  check_size(
      names.offsets, offsets,
      {problem.batch, problem.queries, problem.heads, problem.levels.count, problem.points, 2});
  check_size(names.logits, logits,
             {problem.batch, problem.queries, problem.heads, problem.levels.count, problem.points});
  return problem;
}

Call plain_call(const Tensor& value, Sizes spatial_shapes, const Tensor& locations,
                const Tensor& weights) {
  const Problem problem = check(kPlain, value, spatial_shapes, locations, weights);
  check_like(kPlain.offsets, locations, value, accumulation_type(value));
  return {problem, value, value, locations, weights};
}

Call fused_call(const Tensor& value, Sizes spatial_shapes, const Tensor& reference,
                const Tensor& offsets, const Tensor& logits) {
  Problem problem = check(kFused, value, spatial_shapes, offsets, logits);
  check_like(kFused.offsets, offsets, value, value.scalar_type());
  check_like("reference", reference, value, accumulation_type(value));
  const int64_t coordinates = reference.dim() == 4 ? reference.size(3) : 0;
  STD_TORCH_CHECK(coordinates == 2 || coordinates == 4,
                  "ms_deform_attn: reference must be (B, Q, L, 2 or 4), but has shape ",
                  text(reference.sizes()));
  check_size("reference", reference,
             {problem.batch, problem.queries, problem.levels.count, coordinates});
  problem.form = coordinates == 2 ? Form::kPoints : Form::kBoxes;
  return {problem, value, reference, offsets, logits};
}

void check_gradient(const Tensor& grad_output, const Call& call) {
  const Problem& problem = call.problem;
  check_like("grad_output", grad_output, call.value, call.value.scalar_type());
  check_size("grad_output", grad_output,
             {problem.batch, problem.queries, problem.heads * problem.channels});
}

// The reference's is undefined where it was not asked for.
struct CallGradients {
  Tensor value, reference, offsets, logits;
};

Tensor new_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
  return torch::stable::new_empty(like, Sizes(sizes.data(), sizes.size()), type);
}

// (batch, queries, heads, levels, coordinates), or no numbers where the gradient is not wanted.
Tensor new_reference_gradient(const Call& call, bool wanted) {
  const Problem& p = call.problem;
  const int64_t heads = wanted ? p.heads : 0;
  return new_tensor(call.value, {p.batch, p.queries, heads, p.levels.count, p.coordinates()},
                    accumulation_type(call.value));
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

// One thread's scratch memory.
template <typename T>
class Memory {
 public:
  Memory(const Problem& problem, int64_t rows)
      : blocks_(Scratch<T>::block_count(problem)),
        bytes_(sizeof(Block<T>) * blocks_ + sizeof(T) * rows * problem.channels + kLine),
        memory_(new char[bytes_]) {}

  Scratch<T> scratch() const {
    void* start = memory_.get();
    size_t space = bytes_;
    Block<T>* blocks = static_cast<Block<T>*>(std::align(kLine, 1, start, space));
    return {blocks, reinterpret_cast<T*>(blocks + blocks_)};
  }

 private:
  static constexpr size_t kLine = 64;
  int64_t blocks_;
  size_t bytes_;
  std::unique_ptr<char[]> memory_;
};

// The call with all tensors contiguous and in the type of the accumulation.
Call widen(const Call& call) {
  const ScalarType type = accumulation_type(call.value);
  const auto wide = [type](const Tensor& tensor) {
    return torch::stable::contiguous(torch::stable::to(tensor, type));
  };
  const bool fused = call.problem.has_softmax();
  const Tensor value = wide(call.value);
  return {call.problem, value, fused ? wide(call.reference) : value, wide(call.offsets),
          wide(call.logits)};
}

template <typename T>
Arguments<T> arguments_of(const Call& call, const std::vector<int32_t>& order) {
  return {&call.problem,
          order.data(),
          call.value.const_data_ptr<T>(),
          call.reference.const_data_ptr<T>(),
          call.offsets.const_data_ptr<T>(),
          call.logits.const_data_ptr<T>()};
}

int64_t threads_per_task(int64_t tasks) {
  const int64_t threads = torch::stable::get_num_threads();
  return tasks < threads && tasks > 0 ? (threads + tasks - 1) / tasks : 1;
}

// How many tasks of a head one thread should take at least: waking another costs microseconds.
int64_t grain(const Problem& problem) {
  constexpr int64_t kWorthWaking = int64_t(1) << 17;  // multiplications
  return 1 + kWorthWaking / (1 + problem.queries * problem.samples() * problem.channels);
}

template <typename T>
void run_forward(const Call& call, Tensor& output, const KernelsOf<T>& kernels) {
  const Problem& problem = call.problem;
  const std::vector<int32_t> order = visiting_order(problem);
  const Arguments<T> arguments = arguments_of<T>(call, order);
  T* result = output.mutable_data_ptr<T>();
  const int64_t rows = copies(problem) ? padded_rows(problem.levels) : 1;
  // One task has a head of an image, or some queries of it where there are more threads than heads.
  const int64_t owners = problem.batch * problem.heads, parts = threads_per_task(owners);
  torch::stable::parallel_for(0, owners * parts, grain(problem), [&](int64_t begin, int64_t end) {
    const Memory<T> memory(problem, rows);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t owner = task / parts, part = task % parts;
      const Share share = {owner / problem.heads,
                           owner % problem.heads,
                           problem.queries * part / parts,
                           problem.queries * (part + 1) / parts,
                           0,
                           problem.levels.count};
      kernels.forward(arguments, result, share, memory.scratch());
    }
  });
}

template <typename T>
void run_backward(const Call& call, const Tensor& grad_output, CallGradients& results,
                  const KernelsOf<T>& kernels) {
  const Problem& problem = call.problem;
  const std::vector<int32_t> order = visiting_order(problem);
  const Arguments<T> arguments = arguments_of<T>(call, order);
  const bool with_reference = results.reference.numel() > 0;
  const Gradients<T> gradients = {
      grad_output.const_data_ptr<T>(), results.value.mutable_data_ptr<T>(),
      results.offsets.mutable_data_ptr<T>(), results.logits.mutable_data_ptr<T>(),
      with_reference ? results.reference.mutable_data_ptr<T>() : nullptr};
  // One task owns a head of an image, or one level of it where there are more threads than heads.
  const int64_t owners = problem.batch * problem.heads;
  const bool split = threads_per_task(owners) > 1;
  const int64_t parts = split ? problem.levels.count : 1;
  torch::stable::parallel_for(0, owners * parts, grain(problem), [&](int64_t begin, int64_t end) {
    const Memory<T> memory(problem, 2 * padded_rows(problem.levels));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t owner = task / parts;
      const int32_t part = static_cast<int32_t>(task % parts);
      const Share share = {
          owner / problem.heads, owner % problem.heads, 0,
          problem.queries,       split ? part : 0,      split ? part + 1 : problem.levels.count};
      kernels.backward(arguments, gradients, share, memory.scratch());
    }
  });
  if (parts < 2 || !problem.has_softmax()) return;
  torch::stable::parallel_for(
      0, problem.batch * problem.queries, 16, [&](int64_t begin, int64_t end) {
        const Memory<T> memory(problem, 0);
        kernels.softmax_backward(arguments, gradients, begin, end, memory.scratch());
      });
}

Tensor forward_cpu(const Call& given) {
  const Call call = widen(given);
  const Problem& problem = call.problem;
  Tensor output =
      new_tensor(call.value, {problem.batch, problem.queries, problem.heads * problem.channels},
                 call.value.scalar_type());
  if (call.value.scalar_type() == ScalarType::Double)
    run_forward<double>(call, output, kernels().of_double);
  else
    run_forward<float>(call, output, kernels().of_float);
  return torch::stable::to(output, given.value.scalar_type());
}

CallGradients backward_cpu(const Tensor& grad_output, const Call& given, bool with_reference) {
  check_gradient(grad_output, given);
  const Call call = widen(given);
  const ScalarType wide = call.value.scalar_type(), stored = given.value.scalar_type();
  const Tensor gradient = torch::stable::contiguous(torch::stable::to(grad_output, wide));
  CallGradients results = {
      torch::stable::empty_like(call.value), new_reference_gradient(call, with_reference),
      torch::stable::empty_like(call.offsets), torch::stable::empty_like(call.logits)};
  if (wide == ScalarType::Double)
    run_backward<double>(call, gradient, results, kernels().of_double);
  else
    run_backward<float>(call, gradient, results, kernels().of_float);
  results.value = torch::stable::to(results.value, stored);
  results.offsets = torch::stable::to(results.offsets, given.offsets.scalar_type());
  results.logits = torch::stable::to(results.logits, stored);
  return results;
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

// Contiguous from a multiple of 16 on, as the kernels' vectors want it; a slice may start anywhere.
Tensor align(const Tensor& tensor) {
  const Tensor dense = torch::stable::contiguous(tensor);
  const bool aligned = reinterpret_cast<uintptr_t>(dense.const_data_ptr()) % 16 == 0;
  return aligned ? dense : torch::stable::clone(dense);
}

Call align(const Call& call) {
  return {call.problem, align(call.value), align(call.reference), align(call.offsets),
          align(call.logits)};
}

Pointers pointers(const Call& call) {
  return {call.value.const_data_ptr(), call.reference.const_data_ptr(),
          call.offsets.const_data_ptr(), call.logits.const_data_ptr()};
}

// Wherever it can be, unless DINO_D2_CUDA_BACKWARD=direct; read at every call, to compare both.
bool aggregates(const Call& call) {
  const char* wish = std::getenv("DINO_D2_CUDA_BACKWARD");
  const std::string way = wish == nullptr ? "aggregated" : wish;
  STD_TORCH_CHECK(way == "aggregated" || way == "direct",
                  "ms_deform_attn: DINO_D2_CUDA_BACKWARD must be aggregated or direct, but is ",
                  way);
  return way == "aggregated" && can_aggregate(storage(call.value), call.problem);
}

void check_launch(const char* error) {
  STD_TORCH_CHECK(error == nullptr, "ms_deform_attn: the CUDA kernel could not start: ", error);
}

Tensor forward_cuda(const Call& given) {
  const torch::stable::accelerator::DeviceGuard guard(given.value.get_device_index());
  const Call call = align(given);
  const Problem& problem = call.problem;
  Tensor output =
      new_tensor(call.value, {problem.batch, problem.queries, problem.heads * problem.channels},
                 call.value.scalar_type());
  if (output.numel() > 0)
    check_launch(launch_forward(storage(call.value), problem, pointers(call),
                                output.mutable_data_ptr(), current_stream(call.value)));
  return output;
}

CallGradients backward_cuda(const Tensor& grad_output, const Call& given, bool with_reference) {
  check_gradient(grad_output, given);
  const torch::stable::accelerator::DeviceGuard guard(given.value.get_device_index());
  const Call call = align(given);
  const Problem& problem = call.problem;
  const Tensor gradient = align(grad_output);
  const ScalarType stored = call.value.scalar_type(), wide = accumulation_type(call.value);
  const std::vector<int64_t> reference = {problem.batch, problem.queries, 1, problem.levels.count,
                                          problem.coordinates()};
  CallGradients results = {
      torch::stable::new_zeros(call.value, call.value.sizes(), wide),
      torch::stable::new_zeros(call.value, Sizes(reference.data(), reference.size()), wide),
      torch::stable::empty_like(call.offsets),
      torch::stable::new_empty(call.logits, call.logits.sizes(), wide)};
  const bool aggregated = aggregates(call);
  Tensor softmax = new_tensor(
      call.value, {aggregated ? problem.batch * problem.queries * problem.heads : 0, 2}, wide);
  const GradientPointers outputs = {results.value.mutable_data_ptr(),
                                    with_reference ? results.reference.mutable_data_ptr() : nullptr,
                                    results.offsets.mutable_data_ptr(),
                                    results.logits.mutable_data_ptr(),
                                    aggregated ? softmax.mutable_data_ptr() : nullptr};
  if (problem.batch * problem.queries * problem.heads > 0)
    check_launch(launch_backward(storage(call.value), problem, gradient.const_data_ptr(),
                                 pointers(call), outputs, current_stream(call.value)));
  results.value = torch::stable::to(results.value, stored);
  results.logits = torch::stable::to(results.logits, stored);
  return results;
}
#endif

// ---- The operators' signatures, the same on every device ----

using Forward = Tensor (*)(const Call&);
using Backward = CallGradients (*)(const Tensor&, const Call&, bool);

template <Forward kForward>
Tensor plain(const Tensor& value, Sizes spatial_shapes, const Tensor& sampling_locations,
             const Tensor& attention_weights) {
  return kForward(plain_call(value, spatial_shapes, sampling_locations, attention_weights));
}

template <Backward kBackward>
std::tuple<Tensor, Tensor, Tensor> plain_backward(const Tensor& grad_output, const Tensor& value,
                                                  Sizes spatial_shapes,
                                                  const Tensor& sampling_locations,
                                                  const Tensor& attention_weights) {
  const Call call = plain_call(value, spatial_shapes, sampling_locations, attention_weights);
  const CallGradients gradients = kBackward(grad_output, call, false);
  return {gradients.value, gradients.offsets, gradients.logits};
}

template <Forward kForward>
Tensor fused(const Tensor& value, Sizes spatial_shapes, const Tensor& reference,
             const Tensor& sampling_offsets, const Tensor& attention_logits) {
  return kForward(fused_call(value, spatial_shapes, reference, sampling_offsets, attention_logits));
}

template <Backward kBackward>
std::tuple<Tensor, Tensor, Tensor, Tensor> fused_backward(
    const Tensor& grad_output, const Tensor& value, Sizes spatial_shapes, const Tensor& reference,
    const Tensor& sampling_offsets, const Tensor& attention_logits, bool with_reference) {
  const Call call =
      fused_call(value, spatial_shapes, reference, sampling_offsets, attention_logits);
  const CallGradients gradients = kBackward(grad_output, call, with_reference);
  const int64_t heads = 2;
  return {gradients.value, torch::stable::sum(gradients.reference, Sizes(&heads, 1)),
          gradients.offsets, gradients.logits};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(dino_d2, CPU, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&plain<forward_cpu>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&plain_backward<backward_cpu>));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&fused<forward_cpu>));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&fused_backward<backward_cpu>));
}

#if defined(DINO_D2_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(dino_d2, CUDA, m) {
  m.impl("ms_deform_attn", TORCH_BOX(&plain<forward_cuda>));
  m.impl("ms_deform_attn_backward", TORCH_BOX(&plain_backward<backward_cuda>));
  m.impl("ms_deform_attn_fused", TORCH_BOX(&fused<forward_cuda>));
  m.impl("ms_deform_attn_fused_backward", TORCH_BOX(&fused_backward<backward_cuda>));
}
#endif

}  // namespace dino_d2
