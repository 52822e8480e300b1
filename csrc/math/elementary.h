// Elementary functions the formulas need. In float64 they are the platform's. In float32 they are branch-free
// polynomials, because g++ does not vectorise calls to libm; on CUDA exp and log, of which it has shorter
// versions, are its own. Each polynomial stays within 2 ulp over its whole range (expm1_minus_x within 2.1,
// log1p_unit without a fused multiply-add within 2.3) and treats inf, NaN, zero and subnormals as IEEE asks.
// The coefficients are least-maximum-error fits over the reduced interval: tools/fit_polynomials.py makes
// them, each polynomial under the name that stands above its first coefficient.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>

#include "config.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();

template <class To, class From>
FGBG_FN To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// a b + c, rounded once where there is an instruction for it. The sources are compiled without contraction:
// which products and sums become one operation is decided here, not by the optimiser from loop to loop, so
// that the same formula gives the same bits in every kernel.
FGBG_FN float fma(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return ::fmaf(a, b, c);
#elif defined(__FMA__)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}
FGBG_FN double fma(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return ::fma(a, b, c);
#elif defined(__FMA__)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// 1.5 * 2^23: adding it rounds a float of magnitude below 2^22 to an integer, which then stands in the
// low mantissa bits.
constexpr float kRoundMagic = 12582912.0f;

struct Reduced {
  float r;         // x - n ln 2, in [-ln 2 / 2, ln 2 / 2]
  int32_t n;       // nearest integer to x / ln 2
  float n_number;  // the same
};

FGBG_FN Reduced reduce_by_ln2(float x) {
  const float shifted = fma(x, 1.44269504f, kRoundMagic);
  const float n = shifted - kRoundMagic;
  // ln 2 in two parts, the first with 9 trailing zero bits so that n times it is exact.
  const float r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));
  return {r, bits_as<int32_t>(shifted) - bits_as<int32_t>(kRoundMagic), n};
}

// exp(r) - 1 on the reduced interval.
FGBG_FN float expm1_reduced(float r) {
  // expm1_reduced: |r| <= ln 2 / 2, least absolute error of exp(r), 1/2 exact.
  float p = 0.00139419665f;
  p = fma(p, r, 0.00836872403f);
  p = fma(p, r, 0.0416663885f);
  p = fma(p, r, 0.166665211f);
  p = fma(p, r, 0.5f);
  return fma(r * r, p, r);
}

FGBG_FN float pow2(int32_t n) {  // n in [-127, 127]; 0 for -127
  return bits_as<float>((n + 127) << 23);
}

// Within [low, 89]: e^89 overflows.
FGBG_FN float clamp_for_exp(float x, float low) {
  // In the form of the processor's minimum and maximum, which let NaN through.
  x = 89.0f < x ? 89.0f : x;
  return low > x ? low : x;
}

FGBG_FN float exp(float x) {
#if defined(FGBG_CUDA_MATH)
  return ::expf(x);
#else
  const Reduced red = reduce_by_ln2(clamp_for_exp(x, -104.0f));
  // Two factors, since 2^n alone overflows or is subnormal at the ends.
  const int32_t half = red.n >> 1;
  return (1.0f + expm1_reduced(red.r)) * pow2(half) * pow2(red.n - half);
#endif
}
FGBG_FN double exp(double x) { return ::exp(x); }

// exp(-|x|), for which one factor 2^n will do: 2^(n + 24) is no subnormal number, and 2^-24 rounds once.
// Below half of the smallest subnormal n is -151, and the factor exactly 0: a product that underflows to 0
// would cost a hundred cycles on many processors.
FGBG_FN float exp_minus_abs(float x) {
#if defined(FGBG_CUDA_MATH)
  return ::expf(-::fabsf(x));
#else
  const float magnitude = ::fabsf(x);
  const Reduced red = reduce_by_ln2(-(104.7f < magnitude ? 104.7f : magnitude));
  return (1.0f + expm1_reduced(red.r)) * pow2(red.n + 24) * 5.9604644775390625e-8f;
#endif
}
FGBG_FN double exp_minus_abs(double x) { return ::exp(-::fabs(x)); }

FGBG_FN float expm1(float x) {
  // Half of 2^n does not overflow, and is 0 only where the result is -1.
  const Reduced red = reduce_by_ln2(clamp_for_exp(x, -87.0f));
  const float half = pow2(red.n - 1), p = expm1_reduced(red.r);
  return 2.0f * fma(half, p, half - 0.5f);
}
FGBG_FN double expm1(double x) { return ::expm1(x); }

// (log(1 + f) - f) / f^2 on the reduced interval.
FGBG_FN float log_normal_polynomial(float f) {
  // log_normal: f from sqrt(1/2) - 1 to sqrt(2) - 1, least absolute error of log(1 + f) / f.
  float p = -0.0782338455f;
  p = fma(p, f, 0.130048349f);
  p = fma(p, f, -0.132087931f);
  p = fma(p, f, 0.141634688f);
  p = fma(p, f, -0.166111499f);
  p = fma(p, f, 0.200030163f);
  p = fma(p, f, -0.250015229f);
  p = fma(p, f, 0.333333075f);
  p = fma(p, f, -0.499999881f);
  return p;
}

// log(x) for positive x that is finite and not subnormal.
FGBG_FN float log_normal(float x) {
  const int32_t bits = bits_as<int32_t>(x);
  // The exponent such that the mantissa lies in [sqrt(1/2), sqrt(2)), times 2^23, which its factors undo.
  const int32_t e = static_cast<int32_t>(static_cast<uint32_t>(bits - 0x3f3504f3) & 0xff800000u);
  const float f = bits_as<float>(bits - e) - 1.0f;
  const float n = static_cast<float>(e);
  constexpr float kUnit = 1.1920928955078125e-7f;  // 2^-23
  return fma(n, 0.693359375f * kUnit,
             fma(n, -2.12194440e-4f * kUnit, fma(f * f, log_normal_polynomial(f), f)));
}

FGBG_FN float log(float x) {
#if defined(FGBG_CUDA_MATH)
  return ::logf(x);
#else
  const bool tiny = x < 1.17549435e-38f;
  const float large = log_normal(tiny ? x * 8388608.0f : x);
  float y = tiny ? large - 15.9423847f : large;  // 23 ln 2
  y = x == 0.0f ? -kInf<float> : y;
  y = x < 0.0f ? kNaN<float> : y;
  return x < kInf<float> ? y : x;  // +inf and NaN come back as they are; negatives are below inf
#endif
}
FGBG_FN double log(double x) { return ::log(x); }

// log(1 + x) for x in [0, 1].
FGBG_FN float log1p_unit(float x) {
  // log1p_unit: x from 0 to 1, least relative error of log(1 + x) = x + x^2 p(x).
  float p = 0.00536482641f;
  p = fma(p, x, -0.030065801f);
  p = fma(p, x, 0.0792045519f);
  p = fma(p, x, -0.137538031f);
  p = fma(p, x, 0.191536561f);
  p = fma(p, x, -0.248571634f);
  p = fma(p, x, 0.33321324f);
  p = fma(p, x, -0.499996483f);
  return fma(x * p, x, x);  // not x * x, which would underflow
}
FGBG_FN double log1p_unit(double x) { return ::log1p(x); }

// 1 / x where both are neither 0 nor subnormal nor infinite: on CUDA without the scaling that those need,
// within 1 ulp.
FGBG_FN float reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return fma(r, fma(-x, r, 1.0f), r);  // a step of Newton's method
#elif defined(FGBG_CUDA_MATH)
  const float r = rcp_approx_ftz(x);
  return fma(r, fma(-x, r, 1.0f), r);
#else
  return 1.0f / x;
#endif
}
FGBG_FN double reciprocal(double x) { return 1.0 / x; }

// The square root of such an x, likewise.
FGBG_FN float sqrt_normal(float x) {
#if defined(__CUDA_ARCH__)
  float r;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
#elif defined(FGBG_CUDA_MATH)
  return sqrt_approx_ftz(x);
#else
  return ::sqrtf(x);
#endif
}

FGBG_FN float sqrt(float x) { return ::sqrtf(x); }
FGBG_FN double sqrt(double x) { return ::sqrt(x); }

FGBG_FN float abs(float x) { return ::fabsf(x); }
FGBG_FN double abs(double x) { return ::fabs(x); }

template <class T>
FGBG_FN T sign(T x) {  // 0 at 0, NaN at NaN
  return x > T(0) ? T(1) : (x < T(0) ? T(-1) : x);
}

// exp(x) - 1 - x >= 0 with full relative accuracy: near 0 the subtraction would cancel.
FGBG_FN double expm1_minus_x(double x) {
  // x^2/2 (1 + x/3 (1 + x/4 (...))); what is left out is below epsilon / 2 for |x| < 1/2.
  double series = 1.0;
  for (int k = 16; k >= 3; --k) series = fma(series * x, 1.0 / k, 1.0);
  return abs(x) < 0.5 ? 0.5 * x * x * series : expm1(x) - x;
}

// With x = n ln 2 + r and exp(r) = 1 + r + r^2 q(r) it is 2^n r^2 q(r) + (2^n - 1) r + (2^n - 1 - n ln 2),
// of which the first term alone is left near 0. Right to 2 epsilon.
FGBG_FN float expm1_minus_x(float x) {
  const float clamped = clamp_for_exp(x, -87.0f);
  const Reduced red = reduce_by_ln2(clamped);
  // expm1_minus_x: |r| <= ln 2 / 2, least relative error of q, 1/2 exact.
  float q = 1.98518785e-4f;
  q = fma(q, red.r, 1.39303925e-3f);
  q = fma(q, red.r, 8.3333673e-3f);
  q = fma(q, red.r, 0.0416665114f);
  q = fma(q, red.r, 0.166666672f);
  q = fma(q, red.r, 0.5f);
  // All by halves, since 2^n may overflow; where x was clamped, what was cut off comes back.
  const float half = pow2(red.n - 1), less = half - 0.5f;
  const float constant = fma(red.n_number, -0.34657359f, less);
  const float halved = fma(half, red.r * red.r * q, fma(less, red.r, constant));
  return (halved + halved) + (clamped - x);
}

// log(1 + y) - y <= 0 with full relative accuracy, for -0.4 < y < 0.7. With s = y / (2 + y),
// log(1 + y) = 2 artanh(s) and y - 2 s = s y.
template <class T>
FGBG_FN T log1p_minus_x(T y) {
  constexpr int kTerms = sizeof(T) == 8 ? 13 : 6;
  const T s = y * reciprocal(T(2) + y), ss = s * s;
  T series = T(0);
  for (int k = kTerms; k >= 0; --k) series = fma(series, ss, T(1) / T(2 * k + 3));
  return s * (T(2) * ss * series - y);
}

// x - log(1 + x) >= 0 with full relative accuracy, from x and 1 + x, each rounded by itself: near -1 and for
// large x the latter has the digits, near 0 the former. inf where 1 + x is 0.
FGBG_FN double x_minus_log1p(double x, double one_plus) {
  const bool near = abs(x) < 0.4;
  return near ? -log1p_minus_x(near ? x : 0.0) : x - log(one_plus);
}
FGBG_FN float x_minus_log1p(float x, float one_plus) {
  const bool tiny = one_plus < 1.17549435e-38f;
  const uint32_t bits = bits_as<uint32_t>(tiny ? one_plus * 8388608.0f : one_plus);
  // 1 + x = 2^n (1 + f), as in log_normal; f is x itself where n is 0.
  const int32_t e = static_cast<int32_t>(bits - 0x3f3504f3u) >> 23;
  const float f = e == 0 ? x : bits_as<float>(bits - (static_cast<uint32_t>(e) << 23)) - 1.0f;
  const float n = static_cast<float>(tiny ? e - 23 : e);
  const float rest = f * f * log_normal_polynomial(f);
  float y = fma(n, -0.693359375f, x - f) + fma(n, 2.12194440e-4f, -rest);
  y = one_plus == 0.0f ? kInf<float> : y;
  // NaN beyond, as log is, or inf - inf.
  const bool inside = (one_plus >= 0.0f) & (one_plus < kInf<float>);  // &: a branch would not be vectorised
  return inside ? y : kNaN<float>;
}

// log(1 + x) for x > -1.
template <class T>
FGBG_FN T log1p(T x) {
  const bool near = abs(x) < T(0.4);
  const T small = near ? x : T(0);
  return near ? small + log1p_minus_x(small) : log(T(1) + x);
}

struct SinCos {
  float sin, cos;
};

// sin and cos of 2 pi t for t in [0, 1]. Reducing t by quarter turns is exact.
FGBG_FN SinCos sincos_turns(float t) {
  const float shifted = fma(4.0f, t, kRoundMagic);
  const int32_t quarter = bits_as<int32_t>(shifted);
  const float x = fma(4.0f, t, -(shifted - kRoundMagic));
  const float xx = x * x;
  // sin_turns: |x| <= 1/2, least absolute error of sin(pi/2 x) / x.
  float p = fma(-0.00460217707f, xx, 0.0796802267f);
  p = fma(p, xx, -0.64596349f);
  const float s = x * fma(p, xx, 1.57079637f);
  // cos_turns: |x| <= 1/2, least absolute error of cos(pi/2 x), its 1 exact.
  p = fma(9.04021668e-4f, xx, -0.0208602883f);
  p = fma(p, xx, 0.253669232f);
  p = fma(p, xx, -1.23370051f);
  const float c = fma(xx, p, 1.0f);
  // Bit 0 of quarter exchanges them; the signs are bit 1 of quarter and of quarter + 1.
  const uint32_t upper = static_cast<uint32_t>(quarter) << 30;
  const bool swap = (upper & 0x40000000u) != 0;
  const float sin_abs = swap ? c : s, cos_abs = swap ? s : c;
  const uint32_t sin_sign = upper & 0x80000000u, cos_sign = (upper + 0x40000000u) & 0x80000000u;
  return {bits_as<float>(bits_as<uint32_t>(sin_abs) ^ sin_sign),
          bits_as<float>(bits_as<uint32_t>(cos_abs) ^ cos_sign)};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
