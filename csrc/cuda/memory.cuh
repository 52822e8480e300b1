// How the CUDA kernels walk memory. Every kernel exists twice, from one template: with V = 8 a thread
// handles 8 consecutive elements in 16-byte accesses, for operands that are all contiguous, aligned and of
// a multiple of 8 elements; with V = 1 it takes one element at a time from any layout. The storage type is
// a run-time property of each operand (a branch that is uniform over the grid), so that any mix of types
// works without a copy and kernels are not multiplied by types.
#pragma once

#include "../storage.h"

namespace fgbg::cuda {

// 8 float32 are two 16-byte accesses, 8 half-precision numbers one.
constexpr int kVector = 8;

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;  // beyond, threads take several items of work each

// Elements of a row (or pixels) that one warp sums.
constexpr int64_t kSegment = 1024;

template <int N>
struct Bytes;
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

// N storage elements from / to an aligned address.
template <class Storage, int N>
__device__ __forceinline__ void read_vector(const Storage* from, Storage (&to)[N]) {
  constexpr int kTotal = N * sizeof(Storage), kEach = kTotal > 16 ? 16 : kTotal;
  using Word = typename Bytes<kEach>::type;
  Word words[kTotal / kEach];
#pragma unroll
  for (int k = 0; k < kTotal / kEach; ++k) words[k] = reinterpret_cast<const Word*>(from)[k];
  memcpy(to, words, kTotal);
}

template <class Storage, int N>
__device__ __forceinline__ void write_vector(const Storage (&from)[N], Storage* to) {
  constexpr int kTotal = N * sizeof(Storage), kEach = kTotal > 16 ? 16 : kTotal;
  using Word = typename Bytes<kEach>::type;
  Word words[kTotal / kEach];
  memcpy(words, from, kTotal);
#pragma unroll
  for (int k = 0; k < kTotal / kEach; ++k) reinterpret_cast<Word*>(to)[k] = words[k];
}

// Element `offset`, and the V - 1 after it, of an operand. float32 kernels never see float64 operands.
template <class T, int V>
__device__ __forceinline__ void load(const View& v, int64_t offset, T (&out)[V]) {
  const auto as = [&](auto storage) {
    using Storage = decltype(storage);
    const Storage* from = static_cast<const Storage*>(v.data) + offset;
    Storage raw[V];
    if constexpr (V == 1)
      raw[0] = *from;
    else
      read_vector(from, raw);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widen<T>(raw[j]);
  };
  switch (v.dtype) {
    case DType::f64:
      if constexpr (sizeof(T) == 8) as(double{});
      break;
    case DType::f32: as(float{}); break;
    case DType::bf16: as(math::bf16{}); break;
    case DType::f16: as(math::f16{}); break;
    case DType::u8: as(uint8_t{}); break;
  }
}

template <class T, int V>
__device__ __forceinline__ void store(const View& v, int64_t offset, const T (&in)[V]) {
  const auto as = [&](auto storage) {
    using Storage = decltype(storage);
    Storage* to = static_cast<Storage*>(v.data) + offset;
    Storage raw[V];
#pragma unroll
    for (int j = 0; j < V; ++j) narrow(in[j], raw[j]);
    if constexpr (V == 1)
      *to = raw[0];
    else
      write_vector(raw, to);
  };
  switch (v.dtype) {
    case DType::f64:
      if constexpr (sizeof(T) == 8) as(double{});
      break;
    case DType::f32: as(float{}); break;
    case DType::bf16: as(math::bf16{}); break;
    case DType::f16: as(math::f16{}); break;
    case DType::u8: break;
  }
}

// The sum over a warp, in lane 0; always the same tree.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_down_sync(0xffffffffu, x, width);
  return x;
}

// Launches `kernel` with one warp for each of `warps` items of work, up to the cap of the grid.
template <class Args>
inline void launch(void (*kernel)(Args), int64_t warps, const Args& args, cudaStream_t stream) {
  const int64_t wanted = (warps * kWarp + kThreads - 1) / kThreads;
  if (wanted == 0) return;
  const int blocks = static_cast<int>(wanted < kMaxBlocks ? wanted : kMaxBlocks);
  kernel<<<blocks, kThreads, 0, stream>>>(args);
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
