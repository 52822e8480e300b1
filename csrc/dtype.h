// Numbers as they are stored, to and from the type T they are computed in (float or double).
#pragma once

#include "kernels.h"
#include "math/half.h"

namespace fgbg {
inline namespace FGBG_ISA {

template <class T>
FGBG_FN T widen(double x) {
  return static_cast<T>(x);
}
template <class T>
FGBG_FN T widen(float x) {
  return static_cast<T>(x);
}
template <class T>
FGBG_FN T widen(uint8_t x) {
  return x != 0 ? T(1) : T(0);
}
template <class T>
FGBG_FN T widen(math::bf16 x) {
  return static_cast<T>(math::to_float(x));
}
template <class T>
FGBG_FN T widen(math::f16 x) {
  return static_cast<T>(math::to_float(x));
}

template <class T>
FGBG_FN void narrow(T x, double& out) {
  out = x;
}
template <class T>
FGBG_FN void narrow(T x, float& out) {
  out = static_cast<float>(x);
}
template <class T>
FGBG_FN void narrow(T x, math::bf16& out) {
  out = math::to_bf16(static_cast<float>(x));
}
template <class T>
FGBG_FN void narrow(T x, math::f16& out) {
  out = math::to_f16(static_cast<float>(x));
}

// Two at a time: what GPUs have an instruction for.
template <class T, class Half>
FGBG_FN void narrow_pair(T first, T second, Half* out) {
  math::to_half_pair(static_cast<float>(first), static_cast<float>(second), out);
}

template <class T>
FGBG_FN T read(const void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return widen<T>(static_cast<const double*>(data)[i]);
    case DType::f32: return widen<T>(static_cast<const float*>(data)[i]);
    case DType::bf16: return widen<T>(static_cast<const math::bf16*>(data)[i]);
    case DType::f16: return widen<T>(static_cast<const math::f16*>(data)[i]);
    case DType::u8: return widen<T>(static_cast<const uint8_t*>(data)[i]);
  }
  return T(0);
}

template <class T>
FGBG_FN void write(T x, void* data, DType dtype, int64_t i) {
  switch (dtype) {
    case DType::f64: return narrow(x, static_cast<double*>(data)[i]);
    case DType::f32: return narrow(x, static_cast<float*>(data)[i]);
    case DType::bf16: return narrow(x, static_cast<math::bf16*>(data)[i]);
    case DType::f16: return narrow(x, static_cast<math::f16*>(data)[i]);
    case DType::u8: return;
  }
}

// Scale of a channel.
template <class T>
FGBG_FN T scale_at(const ScaleView& s, int64_t channel) {
  return s.data ? read<T>(s.data, s.dtype, channel * s.stride) : static_cast<T>(s.value);
}

// Gradient reaching sample b of a reduced loss.
template <class T>
FGBG_FN T upstream(const Upstream& u, int64_t b) {
  const T factor = static_cast<T>(u.factor);
  return u.grad ? static_cast<const T*>(u.grad)[b * u.stride] * factor : factor;
}

}  // namespace FGBG_ISA
}  // namespace fgbg
