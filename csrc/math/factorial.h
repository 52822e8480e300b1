// log n! and its derivative for real n >= 0: log Gamma and digamma at n + 1, by Stirling's series. Where n is
// small it is taken at z + kShift, z = n + 1, with Gamma(z) = Gamma(z + kShift) / (z (z + 1) ...).
#pragma once

#include "elementary.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

// Beyond so many steps the terms of the series that are left out are below epsilon / 2.
template <class T>
constexpr int kShift = sizeof(T) == 8 ? 10 : 5;

// In float32 right to 4 epsilon of the largest term (10 epsilon below n = 10), and exact at 0 and 1.
FGBG_FN float log_factorial(float n) {
  const float z = n + 1.0f;
  const bool small = n < static_cast<float>(kShift<float>);
  const float w = small ? z + static_cast<float>(kShift<float>) : z;
  float product = 1.0f;
  for (int k = 0; k < kShift<float>; ++k) product *= z + static_cast<float>(k);
  const float r = 1.0f / w, rr = r * r;
  // B_2k / (2k (2k - 1)) w^(1 - 2k)
  const float series = r * fma(rr, fma(rr, 7.93650794e-4f, -2.77777778e-3f), 0.0833333333f);
  // (w - 1/2) log w - w + log(2 pi) / 2, without the difference of two infinities
  const float stirling = fma(w - 0.5f, log(w) - 1.0f, 0.418938533f) + series;
  const float value = stirling - log(small ? product : 1.0f);
  return (n == 0.0f) | (n == 1.0f) ? 0.0f : value;
}
FGBG_FN double log_factorial(double n) {
#if defined(__CUDA_ARCH__)
  return ::lgamma(n + 1.0);
#else
  int sign;  // lgamma would store it in a global variable
  return ::lgamma_r(n + 1.0, &sign);
#endif
}

template <class T>
FGBG_FN T digamma_of_next(T n) {
  const T z = n + T(1);
  const bool small = n < T(kShift<T>);
  const T w = small ? z + T(kShift<T>) : z;
  T shifted = T(0);
  for (int k = 0; k < kShift<T>; ++k) shifted += T(1) / (z + T(k));
  // B_2k / 2k
  constexpr T kCoefficient[] = {T(0.0833333333333333333),  T(-0.00833333333333333333),
                                T(0.00396825396825396825), T(-0.00416666666666666667),
                                T(0.00757575757575757576), T(-0.0210927960927960928),
                                T(0.0833333333333333333),  T(-0.443259803921568627)};
  constexpr int kTerms = sizeof(T) == 8 ? 8 : 4;
  const T r = T(1) / w, rr = r * r;
  T series = T(0);
  for (int k = kTerms - 1; k >= 0; --k) series = fma(series, rr, kCoefficient[k]);
  return log(w) - T(0.5) * r - rr * series - (small ? shifted : T(0));
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
