// How the CUDA kernels read and write operands: V consecutive elements a thread, stored as S, computed as T.
//
// The usual kernels know the storage type: float four at a time or half precision eight at a time, which both
// makes accesses of 16 bytes. Any other mix of types is decided operand by operand at run time, by a branch
// that is uniform over the grid: four elements at a time, or one where an operand is not contiguous, not
// aligned, or no multiple of the width.
#pragma once

#include <initializer_list>

#include "../dtype.h"

namespace fgbg::cuda {

struct Any {};  // a storage type that is decided at run time

template <class T_, int V_, class S_>
struct Format {
  using T = T_;
  using S = S_;
  static constexpr int V = V_;
  static constexpr bool kMixed = std::is_same_v<S, Any>;
  static constexpr bool kMaps = false;
};

// The same for kernels that take weights and a scale for each element. Only formats of mixed types have them:
// they would be a burden on the registers of the others, and few losses use them.
template <class F>
struct WithMaps : F {
  static constexpr bool kMaps = true;
};

constexpr int kVector = 4, kVectorHalf = 8;
// float64 is meant for checking rather than speed, so it uses the general format alone.
using Float64 = Format<double, 1, Any>;
using General = Format<float, 1, Any>;
using Mixed = Format<float, kVector, Any>;
using Float32 = Format<float, kVector, float>;
using BFloat16 = Format<float, kVectorHalf, math::bf16>;
using Float16 = Format<float, kVectorHalf, math::f16>;
// Of kernels that keep much for each element.
using BFloat16Four = Format<float, kVector, math::bf16>;
using Float16Four = Format<float, kVector, math::f16>;

enum class FormatOf { float64, general, mixed, float32, bfloat16, float16 };

// The format for rows (or planes) of `extent`; `run(view)` says how many elements of a row of `view` are
// consecutive. A mask of bytes decides nothing here.
template <class Run>
FormatOf choose_format(bool f64, int64_t extent, std::initializer_list<View> views, Run run) {
  if (f64) return FormatOf::float64;
  bool same = true;
  DType dtype = DType::u8;
  for (const View& v : views) {
    if (!v) continue;
    if (run(v) < extent || !v.vector_aligned) return FormatOf::general;
    if (v.dtype == DType::u8) continue;
    same &= dtype == DType::u8 || v.dtype == dtype;
    dtype = v.dtype;
  }
  if (same && extent % kVectorHalf == 0) {
    if (dtype == DType::bf16) return FormatOf::bfloat16;
    if (dtype == DType::f16) return FormatOf::float16;
  }
  if (extent % kVector != 0) return FormatOf::general;
  return same && dtype == DType::f32 ? FormatOf::float32 : FormatOf::mixed;
}

inline int width_of(FormatOf format) {
  if (format == FormatOf::bfloat16 || format == FormatOf::float16) return kVectorHalf;
  return format == FormatOf::mixed || format == FormatOf::float32 ? kVector : 1;
}

// Kernels::get<F>() for the format.
template <class Kernels>
auto kernel_for(FormatOf format) {
  switch (format) {
    case FormatOf::float64: return Kernels::template get<Float64>();
    case FormatOf::mixed: return Kernels::template get<Mixed>();
    case FormatOf::float32: return Kernels::template get<Float32>();
    case FormatOf::bfloat16: return Kernels::template get<BFloat16>();
    case FormatOf::float16: return Kernels::template get<Float16>();
    default: return Kernels::template get<General>();
  }
}

template <class Kernels>
auto kernel_with_maps_for(FormatOf format) {
  switch (format) {
    case FormatOf::float64: return Kernels::template get<WithMaps<Float64>>();
    case FormatOf::general: return Kernels::template get<WithMaps<General>>();
    default: return Kernels::template get<WithMaps<Mixed>>();
  }
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

// What is computed ahead of a loop, and kept in registers throughout: nvcc would rather compute it anew.
__device__ __forceinline__ uint64_t held(uint64_t x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}
template <class T>
__device__ __forceinline__ T* held(T* global) {
#if defined(__CUDA_ARCH__)
  return static_cast<T*>(__cvta_global_to_generic(held(uint64_t{__cvta_generic_to_global(global)})));
#else
  return global;
#endif
}

// Loads before it are under way before those after it: nvcc would move them to where they are used.
__device__ __forceinline__ void loads_first() {
#if defined(__CUDA_ARCH__)
  asm volatile("" ::: "memory");
#endif
}

// Calls with_type(Storage{}) for the storage type of an operand: that of the format, bytes for masks, or what
// the operand has.
template <class F, class Visit>
__device__ __forceinline__ void with_storage(DType dtype, Visit with_type) {
  if constexpr (!F::kMixed) {
    with_type(typename F::S{});
  } else {
    switch (dtype) {
      case DType::f64:
        if constexpr (sizeof(typename F::T) == 8) with_type(double{});
        break;
      case DType::f32: with_type(float{}); break;
      case DType::bf16: with_type(math::bf16{}); break;
      case DType::f16: with_type(math::f16{}); break;
      case DType::u8: with_type(uint8_t{}); break;
    }
  }
}
// A mask is stored as bytes or as the format has it.
template <class F, class Visit>
__device__ __forceinline__ void with_mask_storage(DType dtype, Visit with_type) {
  if (!F::kMixed && F::V < kVectorHalf && dtype == DType::u8) return with_type(uint8_t{});
  with_storage<F>(dtype, with_type);
}

// V numbers as they are stored. Fetching and unpacking are separate steps, so that the loads of all
// operands are in flight before the first is used.
template <class F>
struct Raw {
  uint32_t words[F::V == 1 ? 2 : 4];
};

// V elements from `offset` on, in one access.
template <int V, class Storage, class F>
__device__ __forceinline__ void fetch_as(const void* data, int64_t offset, Raw<F>& to) {
  using Word = typename Bytes<V * sizeof(Storage)>::type;
  const Word word = *reinterpret_cast<const Word*>(static_cast<const Storage*>(data) + offset);
  memcpy(to.words, &word, sizeof word);
}
template <class F>
__device__ __forceinline__ void fetch(const View& v, int64_t offset, Raw<F>& to) {
  with_storage<F>(v.dtype, [&](auto s) { fetch_as<F::V, decltype(s)>(v.data, offset, to); });
}
template <class F>
__device__ __forceinline__ void fetch_mask(const View& v, int64_t offset, Raw<F>& to) {
  with_mask_storage<F>(v.dtype, [&](auto s) { fetch_as<F::V, decltype(s)>(v.data, offset, to); });
}

template <class Storage, class F, class T, int V>
__device__ __forceinline__ void unpack_as(const Raw<F>& from, T (&out)[V]) {
  if constexpr (V > 1 && sizeof(Storage) == 2) {
#pragma unroll
    for (int j = 0; j < V; j += 2) math::to_float_pair(from.words[j / 2], Storage{}, out[j], out[j + 1]);
  } else {
    Storage numbers[V];
    memcpy(numbers, from.words, sizeof numbers);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = widen<T>(numbers[j]);
  }
}
template <class F, class T, int V>
__device__ __forceinline__ void unpack(const View& v, const Raw<F>& from, T (&out)[V]) {
  with_storage<F>(v.dtype, [&](auto s) { unpack_as<decltype(s)>(from, out); });
}
template <class F, class T, int V>
__device__ __forceinline__ void unpack_mask(const View& v, const Raw<F>& from, T (&out)[V]) {
  with_mask_storage<F>(v.dtype, [&](auto s) { unpack_as<decltype(s)>(from, out); });
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

template <class Storage, class T, int V>
__device__ __forceinline__ void store_as(void* data, int64_t offset, const T (&in)[V]) {
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
    put(word, reinterpret_cast<Word*>(static_cast<Storage*>(data) + offset));
  }
}
template <class F, class T, int V>
__device__ __forceinline__ void store(const View& v, int64_t offset, const T (&in)[V]) {
  with_storage<F>(v.dtype, [&](auto s) { store_as<decltype(s)>(v.data, offset, in); });
}

}  // namespace fgbg::cuda
