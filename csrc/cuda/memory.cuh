// How the CUDA kernels access memory. Every kernel is instantiated for three widths: a thread handles V
// consecutive elements, 8 where all floating-point operands are of half precision, else 4, which makes
// accesses of 16 bytes without raising register pressure; or 1, where an operand is not contiguous, not
// aligned, or no multiple of V. The storage type is a run-time property of each operand (a branch that is
// uniform over the grid), so that any mix of types works without a copy and kernels are not multiplied by
// types.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <map>
#include <utility>

#include "../dtype.h"

namespace fgbg::cuda {

constexpr int kVectorHalf = 8, kVector = 4;

constexpr int kWarp = 32;
constexpr int kThreads = 256;

// The minimum occupancy, in blocks per multiprocessor, which bounds the registers of a kernel.
template <int V>
constexpr int kBlocks = V == kVectorHalf ? 1 : 2;

// Elements of a row (or pixels) that one warp sums: few, so that small tensors occupy many multiprocessors,
// but more where that would make too many sums for the one block that adds them.
constexpr int64_t kSegment = 256, kMaxSums = 4096;

inline int64_t segment_length(const Shape& shape, int64_t extent) {
  int64_t segment = kSegment;
  while (segment < extent && shape.size[0] * segments_of(extent, segment) > kMaxSums) segment *= 2;
  return segment;
}

// How many elements a thread handles, of rows (or planes) of `extent`; `run(view)` says how many elements of
// a row of `view` are consecutive.
template <class Run>
int common_width(int64_t extent, std::initializer_list<View> views, Run run) {
  bool half = true;
  for (const View& v : views) {
    if (!v) continue;
    if (run(v) < extent || !v.vector_aligned) return 1;
    half &= v.dtype != DType::f32;
  }
  if (half && extent % kVectorHalf == 0) return kVectorHalf;
  return extent % kVector == 0 ? kVector : 1;
}

template <int N>
struct Bytes;
template <>
struct Bytes<1> {
  using type = uint8_t;
};
template <>
struct Bytes<2> {
  using type = uint16_t;
};
template <>
struct Bytes<4> {
  using type = uint32_t;
};
template <>
struct Bytes<8> {
  using type = uint2;
};
template <>
struct Bytes<16> {
  using type = uint4;
};

// Calls with_type(Storage{}) for the storage type of an operand, if a kernel with this T and V can meet it.
template <class T, int V, class Visit>
__device__ __forceinline__ void with_storage(DType dtype, Visit with_type) {
  switch (dtype) {
    case DType::f64:
      if constexpr (sizeof(T) == 8) with_type(double{});
      break;
    case DType::f32:
      if constexpr (V != kVectorHalf) with_type(float{});
      break;
    case DType::bf16: with_type(math::bf16{}); break;
    case DType::f16: with_type(math::f16{}); break;
    case DType::u8: with_type(uint8_t{}); break;
  }
}

// V numbers as they are stored. Fetching and unpacking are separate steps, so that the loads of all
// operands are in flight before the first is used.
template <int V>
struct Raw {
  uint32_t words[V == 1 ? 2 : 4];
};

// Element `offset`, and the V - 1 after it, of an operand, in one access.
template <class T, int V>
__device__ __forceinline__ void fetch(const View& v, int64_t offset, Raw<V>& to) {
  with_storage<T, V>(v.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    using Word = typename Bytes<V * sizeof(Storage)>::type;
    const Word word = *reinterpret_cast<const Word*>(static_cast<const Storage*>(v.data) + offset);
    memcpy(to.words, &word, sizeof word);
  });
}

template <class T, int V>
__device__ __forceinline__ void unpack(const View& v, const Raw<V>& from, T (&out)[V]) {
  with_storage<T, V>(v.dtype, [&](auto storage) {
    decltype(storage) numbers[V];
    memcpy(numbers, from.words, sizeof numbers);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widen<T>(numbers[j]);
  });
}

// One access. (nvcc may split an assignment into four.)
template <class Word>
__device__ __forceinline__ void put(const Word& word, Word* to) {
  *to = word;
}
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ void put(const uint2& word, uint2* to) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
               "r"(word.y)
               : "memory");
}
__device__ __forceinline__ void put(const uint4& word, uint4* to) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(word.x),
               "r"(word.y), "r"(word.z), "r"(word.w)
               : "memory");
}
#endif

template <class T, int V>
__device__ __forceinline__ void store(const View& v, int64_t offset, const T (&in)[V]) {
  with_storage<T, V>(v.dtype, [&](auto storage) {
    using Storage = decltype(storage);
    if constexpr (sizeof(Storage) > 1) {  // masks are not written
      Storage numbers[V];
      if constexpr (V > 1 && sizeof(Storage) == 2) {
#pragma unroll
        for (int j = 0; j < V; j += 2) narrow_pair(in[j], in[j + 1], numbers + j);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) narrow(in[j], numbers[j]);
      }
      using Word = typename Bytes<sizeof numbers>::type;
      Word word;
      memcpy(&word, numbers, sizeof word);
      put(word, reinterpret_cast<Word*>(static_cast<Storage*>(v.data) + offset));
    }
  });
}

// The sum over a warp, in lane 0; always the same tree.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_down_sync(0xffffffffu, x, width);
  return x;
}

// How many blocks of a kernel the device has room for at a time.
inline int64_t resident_blocks(const void* kernel) {
  int device = 0;
  cudaGetDevice(&device);
  // Constant, so it is queried once rather than at every launch.
  thread_local std::map<std::pair<int, const void*>, int64_t> known;
  int64_t& blocks = known[{device, kernel}];
  if (blocks == 0) {
    int multiprocessors = 1, each = 1;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, 0);
    blocks = std::max<int64_t>(1, static_cast<int64_t>(multiprocessors) * each);
  }
  return blocks;
}

// Launches `kernel` with one warp for each of `warps` items of work, as long as the device has room; beyond
// that each warp takes several. Without any work it is launched if there is a sum to be finished.
template <class Args>
void launch(void (*kernel)(Args), int64_t warps, const Args& args, bool finishes, cudaStream_t stream) {
  const int64_t wanted = std::max<int64_t>(finishes ? 1 : 0, (warps * kWarp + kThreads - 1) / kThreads);
  if (wanted == 0) return;
  const int64_t blocks = std::min(wanted, resident_blocks(reinterpret_cast<const void*>(kernel)));
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(args);
}

// The items of work of this warp.
template <class Body>
__device__ __forceinline__ void for_warp_items(int64_t items, Body body) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t item = thread / kWarp; item < items; item += threads / kWarp)
    body(item, static_cast<int>(thread % kWarp));
}

}  // namespace fgbg::cuda
