// Conversion of contiguous or strided numbers between their storage type and the compute type.
#pragma once

#include <cstring>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

#include "../dtype.h"

// Buffers never overlap, which the compiler cannot see.
#define FGBG_SIMD _Pragma("omp simd")

namespace fgbg::cpu {
inline namespace FGBG_ISA {

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// Calls with_type(Storage{}) for the storage type of an operand.
template <class Visit>
inline void with_storage(DType dtype, Visit with_type) {
  switch (dtype) {
    case DType::f64: return with_type(double{});
    case DType::f32: return with_type(float{});
    case DType::bf16: return with_type(math::bf16{});
    case DType::f16: return with_type(math::f16{});
    case DType::u8: return with_type(uint8_t{});
  }
}

template <class T, class Storage>
inline void widen_all(const Storage* from, int64_t stride, int64_t n, T* to) {
  if (stride == 1) {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) to[j] = widen<T>(from[j]);
  } else {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) to[j] = widen<T>(from[j * stride]);
  }
}

// By hand: g++ splits the vectors into smaller registers, and spills them.
template <>
inline void widen_all<float, math::bf16>(const math::bf16* from, int64_t stride, int64_t n, float* to) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  int64_t k = 0;
  for (; stride == 1 && k + 16 <= n; k += 16) {
    Halves halves;
    std::memcpy(&halves, from + k, sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(to + k, &words, sizeof(words));
  }
  for (; k < n; ++k) to[k] = widen<float>(from[k * stride]);
}

template <class T, class Storage>
inline void narrow_all(const T* from, int64_t stride, int64_t n, Storage* to) {
  if (stride == 1) {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) narrow(from[j], to[j]);
  } else {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) narrow(from[j], to[j * stride]);
  }
}

#if defined(__AVX512BW__)
// By vcvtne2ps2bf16, which flushes subnormal numbers to zero: blocks that have any are rounded again.
__attribute__((target("avx512bf16"), noinline)) inline void round_to_bf16(const float* from, int64_t n,
                                                                          math::bf16* to) {
  constexpr int kSubnormal = 0x20, kHalf = 16;
  int64_t k = 0;
  for (; k + 2 * kHalf <= n; k += 2 * kHalf) {
    const __m512 low = _mm512_loadu_ps(from + k), high = _mm512_loadu_ps(from + k + kHalf);
    _mm512_storeu_si512(to + k, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    if (_mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal)) [[unlikely]]
      for (int64_t j = k; j < k + 2 * kHalf; ++j) narrow(from[j], to[j]);
  }
  for (; k < n; ++k) narrow(from[k], to[k]);
}

inline void narrow_all(const float* from, int64_t stride, int64_t n, math::bf16* to) {
  if (stride == 1 && __builtin_cpu_supports("avx512bf16")) return round_to_bf16(from, n, to);
  narrow_all<float, math::bf16>(from, stride, n, to);
}
#endif

inline int64_t size_of(DType dtype) {
  int64_t size = 0;
  with_storage(dtype, [&](auto storage) { size = sizeof(storage); });
  return size;
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
