// Negative log-likelihoods -log p(target | x) in nats per element, with their derivatives.
//
// Adding one: a struct here, its name in FGBG_FOR_EACH_LIKELIHOOD, and its formula in reference.py.
#pragma once

#include "factorial.h"
#include "mask.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

template <class T>
struct Nll {
  T value;
  T d_x;
  T d_target;
  T d_scale;  // 0 where the likelihood has no scale
};

// What a likelihood needs of its scale, computed once per channel rather than once per pixel.
template <class T>
struct Scale {
  T inverse;   // 1 / scale
  T constant;  // log of the normalising constant; of Charbonnier, which has none, the scale
};

struct Scaled {
  static constexpr bool kScaled = true;
};

// scale = standard deviation.  r = (x - target) / scale:  r^2/2 + log(scale) + log(2 pi)/2
struct Gaussian : Scaled {
  template <class T>
  static FGBG_FN Scale<T> prepare(T scale) {
    return {T(1) / scale, log(scale) + T(0.918938533204672742)};
  }
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T> s) {
    const T r = (x - target) * s.inverse, slope = r * s.inverse;
    return {fma(T(0.5) * r, r, s.constant), slope, -slope, (T(1) - r * r) * s.inverse};
  }
};

// |x - target| / scale + log(2 scale).  At x = target the derivative is taken as 0, as torch.abs does.
struct Laplace : Scaled {
  template <class T>
  static FGBG_FN Scale<T> prepare(T scale) {
    return {T(1) / scale, log(scale) + T(0.693147180559945309)};
  }
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T> s) {
    const T diff = x - target, r = abs(diff) * s.inverse, slope = sign(diff) * s.inverse;
    return {fma(abs(diff), s.inverse, s.constant), slope, -slope, (T(1) - r) * s.inverse};
  }
};

// sqrt((x - target)^2 + scale^2), a robust L1 (Charbonnier et al., "Two deterministic half-quadratic
// regularization algorithms for computed imaging", 1994).
struct Charbonnier : Scaled {
  template <class T>
  static FGBG_FN Scale<T> prepare(T scale) {
    return {T(1) / scale, scale};
  }
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T> s) {
    const T diff = x - target, root = sqrt(fma(diff, diff, s.constant * s.constant)), slope = diff / root;
    return {root, slope, -slope, s.constant / root};
  }
};

struct Unscaled {
  static constexpr bool kScaled = false;
  template <class T>
  static FGBG_FN Scale<T> prepare(T) {
    return {T(1), T(0)};
  }
};

// x is a logit:  softplus(x) - target x.  target may be any value in [0, 1].
struct Bernoulli : Unscaled {
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T>) {
    const T e = exp_minus_abs(x), large = reciprocal(T(1) + e);
    const bool positive = x > T(0);
    // max(x, 0) - target x first: for a confident right answer it is exactly 0.
    const T linear = positive ? (T(1) - target) * x : -target * x;
    return {linear + log1p_unit(e), (positive ? large : e * large) - target, -x, T(0)};
  }
};

// x is a logit:  softplus(x) - target x - log C(x),  C(x) = x / tanh(x / 2)
// (Loaiza-Ganem & Cunningham, "The continuous Bernoulli", NeurIPS 2019, eq. 7, with lambda = sigmoid x).
// With a = |x| the log(1 + e^-a) of softplus and of C cancel exactly, which leaves
// max(x, 0) - target x - g(a),  g(a) = log(a / (1 - e^-a)),  g'(a) = 1/a - 1/(e^a - 1).
// Near 0 both are evaluated from g(a) = a/2 - sum B_2k / (2k (2k)!) a^2k, where 1/a would cancel.
struct ContinuousBernoulli : Unscaled {
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T>) {
    const T a = abs(x), aa = a * a;
    // B_2k / (2k)!; ten terms reach 2^-53 for a < 1, four reach 2^-24.
    constexpr T kCoefficient[] = {T(0.0833333333333333333),   T(-0.00138888888888888889),
                                  T(3.30687830687830688e-5),  T(-8.2671957671957672e-7),
                                  T(2.0876756987868099e-8),   T(-5.28419013868749318e-10),
                                  T(1.33825365306846788e-11), T(-3.38968029632258287e-13),
                                  T(8.58606205627784456e-15), T(-2.17486869855806187e-16)};
    constexpr int kTerms = sizeof(T) == 8 ? 10 : 4;
    const bool near = a < T(1);
    T near_g = T(0), near_slope = T(0), far_g = T(0), far_slope = T(0);
    FGBG_WHEN(near) {
      T g_series = T(0), slope_series = T(0);
      for (int k = kTerms; k >= 1; --k) {
        slope_series = fma(slope_series, aa, kCoefficient[k - 1]);
        g_series = fma(g_series, aa, kCoefficient[k - 1] / T(2 * k));
      }
      near_g = a * T(0.5) - aa * g_series;
      near_slope = T(0.5) - a * slope_series;
    }
    FGBG_WHEN(!near) {
      // Where this is computed for nothing, or a is so large that 1 / a is 0, the bounds keep 0 and inf out
      // of the reciprocals.
      const T e = exp_minus_abs(x), per_shrink = reciprocal(near ? T(1) : T(1) - e);
      far_g = log((near ? T(1) : a) * per_shrink);
      far_slope = reciprocal(near ? T(1) : (T(1e30) < a ? T(1e30) : a)) - e * per_shrink;
    }
    const T g = near ? near_g : far_g, slope = near ? near_slope : far_slope;
    const bool positive = x > T(0);
    const T linear = positive ? (T(1) - target) * x : -target * x;
    return {linear - g, (positive ? T(1) - slope : slope) - target, -x, T(0)};
  }
};

// x is the log of the rate, target a count:  e^x - target x + log target!
struct Poisson : Unscaled {
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T>) {
    const T rate = exp(x);
    return {rate - target * x + log_factorial(target), rate - target, digamma_of_next(target) - x, T(0)};
  }
};

struct SquaredError : Unscaled {
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T>) {
    const T diff = x - target;
    return {diff * diff, T(2) * diff, T(-2) * diff, T(0)};
  }
};

struct AbsoluteError : Unscaled {
  template <class T>
  static FGBG_FN Nll<T> eval(T x, T target, Scale<T>) {
    const T diff = x - target, slope = sign(diff);
    return {abs(diff), slope, -slope, T(0)};
  }
};

// (struct, public name)
#define FGBG_FOR_EACH_LIKELIHOOD(_)              \
  _(Gaussian, "gaussian")                        \
  _(Laplace, "laplace")                          \
  _(Charbonnier, "charbonnier")                  \
  _(Bernoulli, "bernoulli")                      \
  _(ContinuousBernoulli, "continuous_bernoulli") \
  _(Poisson, "poisson")                          \
  _(SquaredError, "squared_error")               \
  _(AbsoluteError, "absolute_error")

}  // namespace FGBG_ISA
}  // namespace fgbg::math
