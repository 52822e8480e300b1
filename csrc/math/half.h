// Conversions of bfloat16 and float16 to float32 and back, rounded to nearest even: by integer arithmetic,
// which vectorises for every instruction set, and on CUDA by its instructions.
#pragma once

#include "elementary.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fgbg::math {
inline namespace FGBG_ISA {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FGBG_FN float to_float(bf16 h) { return bits_as<float>(static_cast<uint32_t>(h.bits) << 16); }

FGBG_FN float to_float(f16 h) {
#if defined(FGBG_CUDA_MATH)
  return __half2float(__ushort_as_half(h.bits));
#else
  const uint32_t magnitude = static_cast<uint32_t>(h.bits & 0x7fff) << 13;
  // The exponent bias differs by 112; as a multiplication this also normalises subnormals.
  float value = bits_as<float>(magnitude) * 5.192296858534828e33f;
  value = magnitude >= 0x0f800000u ? bits_as<float>(magnitude | 0x7f800000u) : value;  // inf, NaN
  return bits_as<float>(bits_as<uint32_t>(value) | static_cast<uint32_t>(h.bits & 0x8000) << 16);
#endif
}

// Two neighbours, loaded as one word.
FGBG_FN void to_float_pair(uint32_t word, bf16, float& first, float& second) {
  first = bits_as<float>(word << 16);
  second = bits_as<float>(word & 0xffff0000u);
}
FGBG_FN void to_float_pair(uint32_t word, f16, float& first, float& second) {
  first = to_float(f16{static_cast<uint16_t>(word)});
  second = to_float(f16{static_cast<uint16_t>(word >> 16)});
}

FGBG_FN bf16 to_bf16(float x) {
#if defined(FGBG_CUDA_MATH)
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
#else
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded)};
#endif
}

FGBG_FN f16 to_f16(float x) {
#if defined(FGBG_CUDA_MATH)
  return {__half_as_ushort(__float2half_rn(x))};
#else
  const uint32_t bits = bits_as<uint32_t>(x), magnitude = bits & 0x7fffffffu;
  // Adding 1/2 puts the last bit of a subnormal half at the last bit of the float, which then rounds.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t out = magnitude < 0x38800000u ? subnormal : normal;
  out = magnitude >= 0x47800000u ? special : out;
  return {static_cast<uint16_t>(out | (bits >> 16 & 0x8000u))};
#endif
}

FGBG_FN void to_half_pair(float first, float second, bf16* out) {
#if defined(FGBG_CUDA_MATH)
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  out[0] = {__bfloat16_as_ushort(pair.x)};
  out[1] = {__bfloat16_as_ushort(pair.y)};
#else
  out[0] = to_bf16(first);
  out[1] = to_bf16(second);
#endif
}

FGBG_FN void to_half_pair(float first, float second, f16* out) {
#if defined(FGBG_CUDA_MATH)
  const __half2 pair = __floats2half2_rn(first, second);
  out[0] = {__half_as_ushort(pair.x)};
  out[1] = {__half_as_ushort(pair.y)};
#else
  out[0] = to_f16(first);
  out[1] = to_f16(second);
#endif
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
