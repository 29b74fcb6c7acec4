// CPU kernels, compiled once per instruction set: kernel_<set>.cpp defines DINO_D2_ISA and
// DINO_D2_VECTOR_BYTES and includes this file. Nothing here may be shared between the copies (the
// linker would keep one of them for every machine), so it uses no standard library templates and
// lives in a namespace of its instruction set.
//
// Two kinds of loops are written with vectors: over samples of a block (one lane per sample) and
// over channels (one lane per channel).
#pragma once

#include "kernels.h"

namespace dino_d2 {
namespace DINO_D2_ISA {
namespace {

// A vector of at most the machine's native width; loads and stores may be unaligned.
template <typename T, int kLanes>
struct Vector {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T)), aligned(alignof(T)), may_alias));
};
template <typename T>
struct Vector<T, 1> {
  typedef T type;
};

template <typename T>
constexpr int native_lanes = DINO_D2_VECTOR_BYTES / sizeof(T);

#if defined(__clang__)
#define DINO_D2_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define DINO_D2_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Integer{__VA_ARGS__})
#endif

// The halves of a vector, one upon the other.
template <typename T, typename V>
struct Halves {
  typedef typename Vector<T, sizeof(V) / sizeof(T) / 2>::type Half;
  Half low, high;
  explicit DINO_D2_INLINE Halves(V vector) { __builtin_memcpy(this, &vector, sizeof(V)); }
};

template <typename T, typename V>
DINO_D2_INLINE T sum_of(V vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return vector;
  } else {
    const Halves<T, V> halves(vector);
    return sum_of<T>(halves.low + halves.high);
  }
}

template <typename T, typename V>
DINO_D2_INLINE T most_of(V vector) {
  if constexpr (sizeof(V) == sizeof(T)) {
    return vector;
  } else {
    const Halves<T, V> halves(vector);
    return most_of<T>(halves.low > halves.high ? halves.low : halves.high);
  }
}

// Arithmetic for problem.h with a native vector of samples.
template <typename T>
struct Lanes {
  static constexpr int kLanes = native_lanes<T>;
  typedef T Scalar;
  typedef typename Vector<T, kLanes>::type Number;
  typedef typename Vector<typename IntegerAs<T>::type, kLanes>::type Integer;
  typedef Integer Mask;

  static DINO_D2_INLINE Integer truncate(Number x) { return __builtin_convertvector(x, Integer); }
  static DINO_D2_INLINE Number widen(Integer i) { return __builtin_convertvector(i, Number); }
  template <typename V>
  static DINO_D2_INLINE V select(Mask mask, V yes, V no) {
    return mask ? yes : no;
  }
  static DINO_D2_INLINE Number all(T x) { return x - Number{}; }

  static DINO_D2_INLINE Number& at(T* numbers) { return *reinterpret_cast<Number*>(numbers); }
  static DINO_D2_INLINE Number at(const T* numbers) {
    return *reinterpret_cast<const Number*>(numbers);
  }
  static DINO_D2_INLINE Integer& at(typename IntegerAs<T>::type* integers) {
    return *reinterpret_cast<Integer*>(integers);
  }

  // (a0 a1 a2 ...), (b0 b1 b2 ...) -> (a0 a2 ... b0 b2 ...), (a1 a3 ... b1 b3 ...)
  static DINO_D2_INLINE void deinterleave(Number a, Number b, Number& even, Number& odd) {
    if constexpr (kLanes == 2) {
      even = DINO_D2_SHUFFLE(a, b, 0, 2);
      odd = DINO_D2_SHUFFLE(a, b, 1, 3);
    } else if constexpr (kLanes == 4) {
      even = DINO_D2_SHUFFLE(a, b, 0, 2, 4, 6);
      odd = DINO_D2_SHUFFLE(a, b, 1, 3, 5, 7);
    } else if constexpr (kLanes == 8) {
      even = DINO_D2_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
      odd = DINO_D2_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
    } else {
      static_assert(kLanes == 16, "no other width");
      even = DINO_D2_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      odd = DINO_D2_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
    }
  }

  // (a0 a1 ...), (b0 b1 ...) -> (a0 b0 a1 b1 ...)
  static DINO_D2_INLINE void interleave(Number a, Number b, Number& low, Number& high) {
    if constexpr (kLanes == 2) {
      low = DINO_D2_SHUFFLE(a, b, 0, 2);
      high = DINO_D2_SHUFFLE(a, b, 1, 3);
    } else if constexpr (kLanes == 4) {
      low = DINO_D2_SHUFFLE(a, b, 0, 4, 1, 5);
      high = DINO_D2_SHUFFLE(a, b, 2, 6, 3, 7);
    } else if constexpr (kLanes == 8) {
      low = DINO_D2_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
      high = DINO_D2_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
    } else {
      low = DINO_D2_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      high = DINO_D2_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
  }

  // (a0 a1 a2 ...), (b0 b1 b2 ...) -> (a0 + a1, a2 + a3, ..., b0 + b1, ...)
  static DINO_D2_INLINE Number add_pairs(Number a, Number b) {
    Number even, odd;
    deinterleave(a, b, even, odd);
    return even + odd;
  }
};

// ---- Preparation: where the samples of one (query, head) lie and what they weigh ----

template <typename T>
void set_levels(const Problem& problem, bool copied, Block<T>* blocks) {
  const int64_t samples = problem.samples();
  for (int64_t p = 0; p < Scratch<T>::block_count(problem) * kBlock; ++p) {
    Block<T>& block = blocks[p / kBlock];
    const int64_t i = p % kBlock;
    block.height[i] = block.width[i] = block.start[i] = block.pitch[i] = 0;
    block.level[i] = problem.levels.count - 1;
    block.origin_x[i] = block.origin_y[i] = block.scale_x[i] = block.scale_y[i] = 0;
    block.offset_x[i] = block.offset_y[i] = 0;
    if (p >= samples) continue;
    const int32_t level = static_cast<int32_t>(p / problem.points);
    block.level[i] = level;
    block.height[i] = problem.levels.height[level];
    block.width[i] = problem.levels.width[level];
    block.start[i] = copied ? padded_start(problem.levels, level) : problem.levels.start[level];
    block.pitch[i] = block.width[i] + (copied ? 1 : 0);
  }
}

// By vectors: a vector that is read soon after its numbers were stored one by one must wait for all
// stores before.
template <typename T>
void set_frames(const Problem& problem, const T* reference, Block<T>* blocks) {
  typedef Lanes<T> Math;
  typedef typename Math::Number Number;
  Frame<T> frames[kMaxLevels];
  for (int32_t level = 0; level < problem.levels.count; ++level)
    frames[level] =
        make_frame<T>(problem.form, reference + level * problem.coordinates(), problem.points,
                      problem.levels.height[level], problem.levels.width[level]);
  for (int64_t p = 0; p < problem.samples(); p += Math::kLanes) {
    Block<T>& block = blocks[static_cast<uint64_t>(p) / kBlock];
    const int i = static_cast<uint64_t>(p) % kBlock;
    Number origin_x = {}, origin_y = {}, scale_x = {}, scale_y = {};
    for (auto level = block.level[i]; level <= block.level[i + Math::kLanes - 1]; ++level) {
      const typename Math::Mask on_it = Math::at(block.level + i) == level;
      origin_x = Math::select(on_it, Math::all(frames[level].origin_x), origin_x);
      origin_y = Math::select(on_it, Math::all(frames[level].origin_y), origin_y);
      scale_x = Math::select(on_it, Math::all(frames[level].scale_x), scale_x);
      scale_y = Math::select(on_it, Math::all(frames[level].scale_y), scale_y);
    }
    Math::at(block.origin_x + i) = origin_x, Math::at(block.origin_y + i) = origin_y;
    Math::at(block.scale_x + i) = scale_x, Math::at(block.scale_y + i) = scale_y;
  }
}

template <typename T>
struct Exponential;
template <>
struct Exponential<float> {
  static constexpr int kDegree = 7, kMantissa = 23, kBias = 127;
  static constexpr float kLowest = -87, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
};
template <>
struct Exponential<double> {
  static constexpr int kDegree = 13, kMantissa = 52, kBias = 1023;
  static constexpr double kLowest = -708, kLn2High = 0.693145751953125,
                          kLn2Low = 1.42860682030941723212e-6;
};

// e^x for x <= 0 by x = power * ln 2 + r and the series of e^r, to the last bits; 0 where it would
// not be a normal number, NaN for NaN.
template <typename T>
DINO_D2_INLINE typename Lanes<T>::Number exponential(typename Lanes<T>::Number x) {
  typedef Exponential<T> E;
  typedef Lanes<T> Math;
  typedef typename Math::Number Number;
  const Number bounded = Math::select(x > E::kLowest, x, Math::all(E::kLowest));
  const typename Math::Integer power =
      round_down<Math>(bounded * T(1.44269504088896340736) + T(0.5));
  const Number whole = Math::widen(power);
  const Number r = (bounded - whole * E::kLn2High) - whole * E::kLn2Low;
  Number series = Math::all(1);
  for (int k = E::kDegree; k > 0; --k) series = series * (r * (T(1) / k)) + T(1);
  const typename Math::Integer bits = (power + E::kBias) << E::kMantissa;
  const Number result = series * reinterpret_cast<Number>(bits);
  return Math::select(x == x, Math::select(x < E::kLowest, Number{}, result), x);
}

// Attention weights of one (query, head).
template <typename T>
void set_attention(const Problem& problem, const T* logits, Block<T>* blocks) {
  typedef Lanes<T> Math;
  typedef typename Math::Number Number;
  const int64_t samples = problem.samples(), padded = Scratch<T>::block_count(problem) * kBlock;
  const T padding = problem.has_softmax() ? -static_cast<T>(__builtin_inf()) : T(0);
  for (int64_t p = 0; p < padded; p += kBlock) {
    T* attention = blocks[p / kBlock].attention;
    if (samples - p >= kBlock)
      __builtin_memcpy(attention, logits + p, kBlock * sizeof(T));
    else
      for (int i = 0; i < kBlock; ++i) attention[i] = p + i < samples ? logits[p + i] : padding;
  }
  if (!problem.has_softmax() || samples == 0) return;
  const auto weights = [blocks](int64_t p) -> Number& {
    return Math::at(blocks[p / kBlock].attention + p % kBlock);
  };
  Number most = weights(0), sum = {};
  for (int64_t p = Math::kLanes; p < padded; p += Math::kLanes)
    most = Math::select(most > weights(p), most, weights(p));
  const T shift = most_of<T>(most);
  for (int64_t p = 0; p < padded; p += Math::kLanes) {
    weights(p) = exponential<T>(weights(p) - shift);
    sum += weights(p);
  }
  const T inverse = 1 / sum_of<T>(sum);
  for (int64_t p = 0; p < padded; p += Math::kLanes) weights(p) *= inverse;
}

template <typename T>
void set_offsets(const T* offsets, int64_t count, Block<T>& block) {
  typedef Lanes<T> Math;
  if (count >= kBlock) {
    for (int i = 0; i < kBlock; i += Math::kLanes)
      Math::deinterleave(Math::at(offsets + 2 * i), Math::at(offsets + 2 * i + Math::kLanes),
                         Math::at(block.offset_x + i), Math::at(block.offset_y + i));
  } else {
    for (int i = 0; i < count; ++i)
      block.offset_x[i] = offsets[2 * i], block.offset_y[i] = offsets[2 * i + 1];
  }
}

// Corners of one (query, head).
template <typename T>
void set_corners(const Problem& problem, bool copied, const T* offsets, Block<T>* blocks) {
  typedef Lanes<T> Math;
  typedef typename Math::Number Number;
  typedef typename Math::Integer Integer;
  const int margin = copied ? 1 : 0;
  for (int64_t first = 0; first < problem.samples(); first += kBlock, ++blocks) {
    Block<T>& block = *blocks;
    set_offsets(offsets + 2 * first, problem.samples() - first, block);
    for (int i = 0; i < kBlock; i += Math::kLanes) {
      const Number x =
          Math::at(block.origin_x + i) + Math::at(block.offset_x + i) * Math::at(block.scale_x + i);
      const Number y =
          Math::at(block.origin_y + i) + Math::at(block.offset_y + i) * Math::at(block.scale_y + i);
      const Sample<Math> sample =
          locate<Math>(x, y, Math::at(block.height + i), Math::at(block.width + i));
      const Integer start = Math::at(block.start + i), pitch = Math::at(block.pitch + i);
      const Integer upper = start + (sample.y + margin) * pitch + sample.x + margin;
      // The rows at `start` of a copy are zeros.
      Math::at(block.upper + i) = Math::select(sample.inside, upper, start);
      Math::at(block.lower + i) = Math::select(sample.inside, upper + pitch, start);
      Math::at(block.inside + i) = sample.inside;
      Math::at(block.from_left + i) = sample.from_left;
      Math::at(block.from_top + i) = sample.from_top;
      for (int k = 0; k < 4; ++k) {
        Math::at(block.on_map[k] + i) = sample.on_map[k];
        Math::at(block.weight[k] + i) = sample.weight[k];
        Math::at(block.coefficient[k] + i) = Math::select(
            sample.on_map[k], Math::at(block.attention + i) * sample.weight[k], Number{});
      }
    }
  }
}

// A head's rows of memory: how to get at the corners of a prepared sample.
template <typename T>
struct Copied {
  const T* rows;
  int64_t stride;

  DINO_D2_INLINE const T* corner(const Block<T>& block, int i, int k) const {
    return rows + ((k < 2 ? block.upper[i] : block.lower[i]) + k % 2) * stride;
  }
};

template <typename T>
struct InPlace {
  const T* rows;
  int64_t stride;
  const T* zeros;

  DINO_D2_INLINE const T* corner(const Block<T>& block, int i, int k) const {
    const int64_t row = (k < 2 ? block.upper[i] : block.lower[i]) + k % 2;
    return block.on_map[k][i] ? rows + row * stride : zeros;
  }
};

// One head of a value in place (rows `stride` apart) to a copy with its margins.
template <typename T>
void copy_head(const Problem& problem, const Share& share, const T* value, T* rows) {
  const int64_t channels = problem.channels, stride = problem.heads * channels;
  const int64_t bytes = channels * sizeof(T);
  for (int32_t level = share.first_level; level < share.last_level; ++level) {
    const int64_t width = problem.levels.width[level];
    const T* from = value + problem.levels.start[level] * stride;
    T* to = rows + padded_start(problem.levels, level) * channels;
    __builtin_memset(to, 0, (width + 2) * bytes);
    to += (width + 2) * channels;
    for (int32_t y = 0; y < problem.levels.height[level]; ++y) {
      for (int64_t x = 0; x < width; ++x, from += stride, to += channels)
        __builtin_memcpy(to, from, bytes);
      __builtin_memset(to, 0, bytes);
      to += channels;
    }
    __builtin_memset(to, 0, (width + 1) * bytes);
  }
}

// The way back, without the margins.
template <typename T>
void return_head(const Problem& problem, const Share& share, const T* rows, T* value) {
  const int64_t channels = problem.channels, stride = problem.heads * channels;
  for (int32_t level = share.first_level; level < share.last_level; ++level) {
    const int64_t width = problem.levels.width[level];
    const T* from = rows + (padded_start(problem.levels, level) + width + 2) * channels;
    T* to = value + problem.levels.start[level] * stride;
    for (int32_t y = 0; y < problem.levels.height[level]; ++y, from += channels)
      for (int64_t x = 0; x < width; ++x, from += channels, to += stride)
        __builtin_memcpy(to, from, channels * sizeof(T));
  }
}

// ---- Forward ----

// output[0 : kVectors * kLanes] = weighted sum of the samples over some channels, from `c` on. Sums
// of different corners are kept apart as far as registers go: additions to one must wait for each
// other.
template <typename T, int kLanes, int kVectors, typename Rows>
void gather(const Rows& rows, int64_t c, const Block<T>* blocks, int64_t samples, T* output) {
  typedef typename Vector<T, kLanes>::type V;
  constexpr int kSums = kVectors > 4 ? 1 : kVectors > 2 ? 2 : 4;
  V sum[kSums][kVectors] = {};
  for (; samples > 0; samples -= kBlock, ++blocks) {
    const int count = samples < kBlock ? static_cast<int>(samples) : kBlock;
    for (int i = 0; i < count; ++i) {
      for (int k = 0; k < 4; ++k) {
        const T* row = rows.corner(*blocks, i, k) + c;
        for (int v = 0; v < kVectors; ++v)
          sum[k % kSums][v] +=
              blocks->coefficient[k][i] * *reinterpret_cast<const V*>(row + v * kLanes);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    for (int k = 1; k < kSums; ++k) sum[0][v] += sum[k][v];
    *reinterpret_cast<V*>(output + c + v * kLanes) = sum[0][v];
  }
}

// All channels of one (query, head), from `c` on: vectors of kLanes as long as they fit, then
// narrower ones.
template <typename T, int kLanes, typename Rows>
void gather_channels(const Rows& rows, int64_t channels, const Block<T>* blocks, int64_t samples,
                     T* output, int64_t c = 0) {
  for (; channels - c >= 8 * kLanes; c += 8 * kLanes)
    gather<T, kLanes, 8>(rows, c, blocks, samples, output);
  for (; channels - c >= 4 * kLanes; c += 4 * kLanes)
    gather<T, kLanes, 4>(rows, c, blocks, samples, output);
  for (; channels - c >= 2 * kLanes; c += 2 * kLanes)
    gather<T, kLanes, 2>(rows, c, blocks, samples, output);
  for (; channels - c >= kLanes; c += kLanes)
    gather<T, kLanes, 1>(rows, c, blocks, samples, output);
  if constexpr (kLanes > 1)
    gather_channels<T, (kLanes > 4 ? kLanes / 2 : 1)>(rows, channels, blocks, samples, output, c);
}

// Which (query, head) of all the share's query `i` of the order is.
template <typename T>
DINO_D2_INLINE int64_t slot_of(const Arguments<T>& arguments, const Share& share, int64_t i) {
  const Problem& problem = *arguments.problem;
  return (share.image * problem.queries + arguments.order[i]) * problem.heads + share.head;
}

// What is read of a query lies a query's heads away from that of the next. Not every processor
// foresees that, and the same one only for some places of this code in memory, so that queries are
// fetched some time before their turn.
constexpr int64_t kAhead = 4;

template <typename T>
DINO_D2_INLINE void fetch_ahead(const Arguments<T>& arguments, const Share& share, int64_t i,
                                const T* numbers, int64_t per_slot) {
  if (i + kAhead >= share.end) return;
  const char* start =
      reinterpret_cast<const char*>(numbers + slot_of(arguments, share, i + kAhead) * per_slot);
  for (int64_t byte = 0; byte < per_slot * static_cast<int64_t>(sizeof(T)); byte += 64)
    __builtin_prefetch(start + byte);
}

// Prepares all samples of the query in the share's head.
template <typename T>
int64_t prepare(const Arguments<T>& arguments, const Share& share, int64_t i, bool copied,
                Block<T>* blocks) {
  const Problem& problem = *arguments.problem;
  const int64_t slot = slot_of(arguments, share, i), query = slot / problem.heads;
  fetch_ahead(arguments, share, i, arguments.logits, problem.samples());
  fetch_ahead(arguments, share, i, arguments.offsets, problem.samples() * 2);
  set_frames(problem, arguments.reference + query * problem.levels.count * problem.coordinates(),
             blocks);
  set_attention(problem, arguments.logits + slot * problem.samples(), blocks);
  set_corners(problem, copied, arguments.offsets + slot * problem.samples() * 2, blocks);
  return slot;
}

template <typename T, typename Rows>
void gather_queries(const Arguments<T>& arguments, T* output, const Share& share, bool copied,
                    const Rows& rows, Block<T>* blocks) {
  const Problem& problem = *arguments.problem;
  set_levels(problem, copied, blocks);
  for (int64_t i = share.begin; i < share.end; ++i) {
    const int64_t slot = prepare(arguments, share, i, copied, blocks);
    gather_channels<T, native_lanes<T>>(rows, problem.channels, blocks, problem.samples(),
                                        output + slot * problem.channels);
  }
}

template <typename T>
void forward(const Arguments<T>& arguments, T* output, const Share& share, Scratch<T> scratch) {
  const Problem& problem = *arguments.problem;
  const int64_t channels = problem.channels, stride = problem.heads * channels;
  const T* value = arguments.value + share.image * problem.tokens * stride + share.head * channels;
  if (copies(problem)) {
    copy_head(problem, share, value, scratch.rows);
    const Copied<T> rows = {scratch.rows, channels};
    gather_queries(arguments, output, share, true, rows, scratch.blocks);
  } else {
    __builtin_memset(scratch.rows, 0, channels * sizeof(T));
    const InPlace<T> rows = {value, stride, scratch.rows};
    gather_queries(arguments, output, share, false, rows, scratch.blocks);
  }
}

// ---- Backward ----

// Adds the products of four corners to their dots, each folded to 4 lanes at most.
template <typename T, int kLanes, typename V>
DINO_D2_INLINE void add_products(const V (&of)[4], T (&dot)[4][4]) {
  typedef typename Vector<typename IntegerAs<T>::type, kLanes>::type Integer;
  V* sums = reinterpret_cast<V*>(dot);
  if constexpr (kLanes == 16) {
    V pairs[2];
    for (int k = 0; k < 2; ++k)
      pairs[k] = DINO_D2_SHUFFLE(of[2 * k], of[2 * k + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19,
                                 20, 21, 22, 23) +
                 DINO_D2_SHUFFLE(of[2 * k], of[2 * k + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26,
                                 27, 28, 29, 30, 31);
    sums[0] += DINO_D2_SHUFFLE(pairs[0], pairs[1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25,
                               26, 27) +
               DINO_D2_SHUFFLE(pairs[0], pairs[1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28,
                               29, 30, 31);
  } else if constexpr (kLanes == 8) {
    for (int k = 0; k < 2; ++k)
      sums[k] += DINO_D2_SHUFFLE(of[2 * k], of[2 * k + 1], 0, 1, 2, 3, 8, 9, 10, 11) +
                 DINO_D2_SHUFFLE(of[2 * k], of[2 * k + 1], 4, 5, 6, 7, 12, 13, 14, 15);
  } else {
    for (int k = 0; k < 4; ++k) *reinterpret_cast<V*>(dot[k]) += of[k];
  }
}

// The samples [first, last), `points` on every level.
struct Samples {
  int64_t first, last, points;
};

// Adds to the value gradient of a sample's corners, and to its dots the product of the output
// gradient with the value at the corner: as many channels as `gradient` has. `i`: in the block.
template <typename T, int kLanes, int kVectors>
DINO_D2_INLINE void scatter_sample(const T* value, T* grad_value, int64_t stride,
                                   const typename Vector<T, kLanes>::type (&gradient)[kVectors],
                                   Block<T>& block, int i) {
  typedef typename Vector<T, kLanes>::type V;
  const int64_t upper = block.upper[i] * stride, lower = block.lower[i] * stride;
  const int64_t corner[4] = {upper, upper + stride, lower, lower + stride};
  V products[4] = {};
  T coefficient[4];
  for (int k = 0; k < 4; ++k) {
    coefficient[k] = block.coefficient[k][i];
    for (int v = 0; v < kVectors; ++v)
      products[k] += gradient[v] * *reinterpret_cast<const V*>(value + corner[k] + v * kLanes);
  }
  for (int k = 0; k < 4; ++k)
    for (int v = 0; v < kVectors; ++v)
      *reinterpret_cast<V*>(grad_value + corner[k] + v * kLanes) += coefficient[k] * gradient[v];
  add_products<T, kLanes>(products, block.dot[i]);
}

// Some channels of samples, from `c` on. kAll: there are no others. Samples of one level often
// share corners, and a sum that is read back at once holds up the processor; so one sample of every
// level takes its turn, then the next ones.
template <typename T, int kLanes, int kVectors, bool kAll = false>
void scatter(const Copied<T>& rows, T* grad_rows, const T* grad_output, int64_t c, Block<T>* blocks,
             const Samples& samples) {
  typedef typename Vector<T, kLanes>::type V;
  V gradient[kVectors];
  for (int v = 0; v < kVectors; ++v)
    gradient[v] = *reinterpret_cast<const V*>(grad_output + c + v * kLanes);
  const T* value = rows.rows + c;  // in local variables: stores below could change others
  const int64_t stride = kAll ? kLanes * kVectors : rows.stride;
  const int64_t last = samples.last, points = samples.points;
  for (int64_t turn = samples.first; turn < samples.first + points; ++turn)
    for (int64_t p = turn; p < last; p += points)
      scatter_sample<T, kLanes, kVectors>(value, grad_rows + c, stride, gradient,
                                          blocks[static_cast<uint64_t>(p) / kBlock],
                                          static_cast<uint64_t>(p) % kBlock);
}

template <typename T, int kLanes>
void scatter_channels(const Copied<T>& rows, T* grad_rows, const T* grad_output, Block<T>* blocks,
                      const Samples& samples, int64_t c = 0) {
  if (c == 0 && rows.stride == 2 * kLanes)
    return scatter<T, kLanes, 2, true>(rows, grad_rows, grad_output, 0, blocks, samples);
  if (c == 0 && rows.stride == 4 * kLanes)
    return scatter<T, kLanes, 4, true>(rows, grad_rows, grad_output, 0, blocks, samples);
  for (; rows.stride - c >= 4 * kLanes; c += 4 * kLanes)
    scatter<T, kLanes, 4>(rows, grad_rows, grad_output, c, blocks, samples);
  for (; rows.stride - c >= 2 * kLanes; c += 2 * kLanes)
    scatter<T, kLanes, 2>(rows, grad_rows, grad_output, c, blocks, samples);
  for (; rows.stride - c >= kLanes; c += kLanes)
    scatter<T, kLanes, 1>(rows, grad_rows, grad_output, c, blocks, samples);
  if constexpr (kLanes > 1)
    scatter_channels<T, (kLanes > 4 ? kLanes / 2 : 1)>(rows, grad_rows, grad_output, blocks,
                                                       samples, c);
}

// From the dots to the gradients of weights and pixels, 0 for samples that take no part.
template <typename T>
void differentiate_samples(Block<T>& block) {
  typedef Lanes<T> Math;
  typedef typename Math::Number Number;
  for (int i = 0; i < kBlock; i += Math::kLanes) {
    const T* parts = block.dot[i][0];
    Number sums[4], even[2], odd[2], weight[4], dot[4];
    for (int j = 0; j < 4; ++j, parts += 4 * Math::kLanes)  // of kLanes / 4 samples
      sums[j] = Math::add_pairs(
          Math::add_pairs(Math::at(parts), Math::at(parts + Math::kLanes)),
          Math::add_pairs(Math::at(parts + 2 * Math::kLanes), Math::at(parts + 3 * Math::kLanes)));
    Math::deinterleave(sums[0], sums[1], even[0], odd[0]);
    Math::deinterleave(sums[2], sums[3], even[1], odd[1]);
    Math::deinterleave(even[0], even[1], dot[0], dot[2]);
    Math::deinterleave(odd[0], odd[1], dot[1], dot[3]);
    for (int k = 0; k < 4; ++k) {
      dot[k] = Math::select(Math::at(block.on_map[k] + i), dot[k], Number{});
      weight[k] = Math::at(block.weight[k] + i);
    }
    const SampleGradient<Math> gradient =
        differentiate<Math>(weight, dot, Math::at(block.from_left + i),
                            Math::at(block.from_top + i), Math::at(block.attention + i));
    const typename Math::Mask inside = Math::at(block.inside + i);
    Math::at(block.grad_attention + i) = gradient.attention;
    const Number x = Math::select(inside, gradient.x, Number{});
    const Number y = Math::select(inside, gradient.y, Number{});
    Math::at(block.grad_x + i) = x;
    Math::at(block.grad_y + i) = y;
    Math::interleave(Math::select(inside, x * Math::at(block.scale_x + i), Number{}),
                     Math::select(inside, y * Math::at(block.scale_y + i), Number{}),
                     Math::at(block.grad_offset + 2 * i),
                     Math::at(block.grad_offset + 2 * i + Math::kLanes));
  }
}

// Weight gradients in the blocks become those of the logits.
template <typename T>
void differentiate_softmax(int64_t count, Block<T>* blocks) {
  typedef Lanes<T> Math;
  typename Math::Number sum = {};
  for (int64_t b = 0; b < count; ++b)
    for (int i = 0; i < kBlock; i += Math::kLanes)
      sum += Math::at(blocks[b].attention + i) * Math::at(blocks[b].grad_attention + i);
  const T mean = sum_of<T>(sum);
  for (int64_t b = 0; b < count; ++b)
    for (int i = 0; i < kBlock; i += Math::kLanes)
      Math::at(blocks[b].grad_attention + i) =
          Math::at(blocks[b].attention + i) * (Math::at(blocks[b].grad_attention + i) - mean);
}

// Gradients of the samples [first, last).
template <typename T>
void store_samples(const Block<T>* blocks, int64_t first, int64_t last, T* offsets, T* logits) {
  for (int64_t p = first; p < last;) {
    const Block<T>& block = blocks[p / kBlock];
    const int64_t i = p % kBlock, count = last - p < kBlock - i ? last - p : kBlock - i;
    if (count == kBlock) {  // the usual case, without a call
      __builtin_memcpy(offsets + 2 * p, block.grad_offset, 2 * kBlock * sizeof(T));
      __builtin_memcpy(logits + p, block.grad_attention, kBlock * sizeof(T));
    } else {
      __builtin_memcpy(offsets + 2 * p, block.grad_offset + 2 * i, 2 * count * sizeof(T));
      __builtin_memcpy(logits + p, block.grad_attention + i, count * sizeof(T));
    }
    p += count;
  }
}

// Gradient of a query's reference on one level, as far as it comes from one head.
template <typename T>
void store_reference(const Problem& problem, const Block<T>* blocks, int32_t level, T* gradient) {
  const T width = problem.levels.width[level], height = problem.levels.height[level];
  T sum[4] = {};
  for (int64_t p = level * problem.points; p < (level + 1) * problem.points; ++p) {
    const Block<T>& block = blocks[p / kBlock];
    const T x = block.grad_x[p % kBlock] * width, y = block.grad_y[p % kBlock] * height;
    const bool still = x == 0 && y == 0;  // perhaps outside: its offset may be infinite
    sum[0] += x, sum[1] += y;
    sum[2] += still ? T(0) : x * block.offset_x[p % kBlock];
    sum[3] += still ? T(0) : y * block.offset_y[p % kBlock];
  }
  const T part = T(0.5) / static_cast<T>(problem.points > 0 ? problem.points : 1);
  for (int64_t i = 0; i < problem.coordinates(); ++i) gradient[i] = i < 2 ? sum[i] : sum[i] * part;
}

template <typename T>
void backward(const Arguments<T>& arguments, const Gradients<T>& gradients, const Share& share,
              Scratch<T> scratch) {
  const Problem& problem = *arguments.problem;
  const int64_t samples = problem.samples(), channels = problem.channels;
  const int64_t first = share.first_level * problem.points,
                last = share.last_level * problem.points;
  const int64_t count = Scratch<T>::block_count(problem), coordinates = problem.coordinates();
  const int64_t origin = (share.image * problem.tokens * problem.heads + share.head) * channels;
  const Copied<T> rows = {scratch.rows, channels};
  const int64_t size = padded_rows(problem.levels) * channels;
  T* grad_rows = scratch.rows + size;
  copy_head(problem, share, arguments.value + origin, scratch.rows);
  __builtin_memset(grad_rows, 0, size * sizeof(T));
  set_levels(problem, true, scratch.blocks);
  for (int64_t i = share.begin; i < share.end; ++i) {
    fetch_ahead(arguments, share, i, gradients.of_output, channels);
    const int64_t slot = prepare(arguments, share, i, true, scratch.blocks);
    for (int64_t b = 0; b < count; ++b)
      __builtin_memset(scratch.blocks[b].dot, 0, sizeof(scratch.blocks[b].dot));
    scatter_channels<T, native_lanes<T>>(rows, grad_rows, gradients.of_output + slot * channels,
                                         scratch.blocks, {first, last, problem.points});
    for (int64_t b = 0; b < count; ++b) differentiate_samples(scratch.blocks[b]);
    if (problem.has_softmax() && last - first == samples)
      differentiate_softmax(count, scratch.blocks);
    store_samples(scratch.blocks, first, last, gradients.offsets + slot * samples * 2,
                  gradients.logits + slot * samples);
    for (int32_t level = share.first_level; gradients.reference && level < share.last_level;
         ++level)
      store_reference(problem, scratch.blocks, level,
                      gradients.reference + (slot * problem.levels.count + level) * coordinates);
  }
  return_head(problem, share, grad_rows, gradients.value + origin);
}

template <typename T>
void softmax_backward(const Arguments<T>& arguments, const Gradients<T>& gradients, int64_t begin,
                      int64_t end, Scratch<T> scratch) {
  const Problem& problem = *arguments.problem;
  const int64_t samples = problem.samples();
  for (int64_t slot = begin * problem.heads; slot < end * problem.heads; ++slot) {
    set_attention(problem, arguments.logits + slot * samples, scratch.blocks);
    T* gradient = gradients.logits + slot * samples;
    for (int64_t p = 0; p < Scratch<T>::block_count(problem) * kBlock; ++p)
      scratch.blocks[p / kBlock].grad_attention[p % kBlock] = p < samples ? gradient[p] : T(0);
    differentiate_softmax(Scratch<T>::block_count(problem), scratch.blocks);
    for (int64_t p = 0; p < samples; ++p)
      gradient[p] = scratch.blocks[p / kBlock].grad_attention[p % kBlock];
  }
}

}  // namespace

Kernels kernels() {
  return {{forward<float>, backward<float>, softmax_backward<float>},
          {forward<double>, backward<double>, softmax_backward<double>}};
}

}  // namespace DINO_D2_ISA
}  // namespace dino_d2
