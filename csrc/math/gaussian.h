// Diagonal Gaussians: the reparameterised sample, the KL divergence and the log-density in nats, with their
// derivatives. Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, appendix B, for a general Gaussian
// prior.
//
// The formulas are those of a parameterization: of what s, the second parameter of a Gaussian, is. For the
// KL, delta = mu - prior_mu, and the prior is given by its mean and by what prepare() makes of its s.
#pragma once

#include "elementary.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

template <class T>
struct GaussianKl {
  T value;
  T d_mu;  // prior_mu: the negative
  T d_spread;
  T d_prior_spread;
};

template <class T>
struct Prior {
  T spread;   // its s; of log_std twice that
  T inverse;  // 1 / variance; of std 1 / s
};

template <class T>
struct Density {
  T inverse;   // 1 / std
  T constant;  // log(std sqrt(2 pi))
};

template <class T>
struct LogDensity {
  T value;  // log N(z; mu, std^2)
  T d_mu;   // z: the negative
  T d_spread;
};

template <class T>
constexpr T kHalfLog2Pi = T(0.91893853320467274178);

// s is the log of the variance (kLogs = 1) or of the standard deviation (2: the same at 2 s, with derivatives
// twice as large, both exactly).
template <int kLogs>
struct LogSpread {
  template <class T>
  static FGBG_FN T std(T s) {
    return exp(T(0.5 * kLogs) * s);
  }
  // Of z = mu + std eps.
  template <class T>
  static FGBG_FN T dz_dspread(T std, T eps) {
    return T(0.5 * kLogs) * std * eps;
  }

  // 1/2 (e^d - 1 - d + delta^2 / prior_var), d = logvar - prior_logvar. e^d - 1 - d is taken as one function,
  // which does not cancel.
  template <class T>
  static FGBG_FN Prior<T> prepare(T prior_s) {
    const T prior_logvar = T(kLogs) * prior_s;
    return {prior_logvar, exp(-prior_logvar)};
  }
  template <class T>
  static FGBG_FN GaussianKl<T> kl(T mu, T s, T prior_mu, Prior<T> prior) {
    const T d = T(kLogs) * s - prior.spread, delta = mu - prior_mu;
    const T scaled = delta * prior.inverse;
    const T square = delta * scaled;
    const T growth = expm1(d);
    return {T(0.5) * (expm1_minus_x(d) + square), scaled, T(0.5 * kLogs) * growth,
            T(-0.5 * kLogs) * (growth + square)};
  }
  // Against N(0, 1).
  template <class T>
  static FGBG_FN GaussianKl<T> standard_kl(T mu, T s) {
    const T logvar = T(kLogs) * s;
    return {T(0.5) * fma(mu, mu, expm1_minus_x(logvar)), mu, T(0.5 * kLogs) * expm1(logvar), T(0)};
  }

  // -log(std sqrt(2 pi)) - r^2 / 2, r = (z - mu) / std
  template <class T>
  static FGBG_FN Density<T> prepare_density(T s) {
    const T log_std = T(0.5 * kLogs) * s;
    return {exp(-log_std), log_std + kHalfLog2Pi<T>};
  }
  template <class T>
  static FGBG_FN LogDensity<T> log_density(T z, T mu, Density<T> density) {
    const T r = (z - mu) * density.inverse;
    return {-fma(T(0.5) * r, r, density.constant), r * density.inverse, T(0.5 * kLogs) * fma(r, r, T(-1))};
  }
};
using LogVar = LogSpread<1>;
using LogStd = LogSpread<2>;

// s is the standard deviation itself.
struct Std {
  template <class T>
  static FGBG_FN T std(T s) {
    return s;
  }
  template <class T>
  static FGBG_FN T dz_dspread(T, T eps) {
    return eps;
  }

  // 1/2 (ratio^2 - 1) - log ratio + 1/2 (delta / prior_std)^2, ratio = std / prior_std. With t = ratio - 1
  // that is t^2 / 2 + (t - log(1 + t)) + ..., where no term cancels another.
  template <class T>
  static FGBG_FN Prior<T> prepare(T prior_s) {
    return {prior_s, T(1) / prior_s};
  }
  template <class T>
  static FGBG_FN GaussianKl<T> kl(T mu, T s, T prior_mu, Prior<T> prior) {
    const T t = (s - prior.spread) * prior.inverse, scaled = (mu - prior_mu) * prior.inverse;
    const T square = scaled * scaled;
    const T growth = t * (T(2) + t);  // ratio^2 - 1
    return {fma(T(0.5), fma(t, t, square), x_minus_log1p(t, s * prior.inverse)), scaled * prior.inverse,
            growth / s, -(growth + square) * prior.inverse};
  }
  template <class T>
  static FGBG_FN GaussianKl<T> standard_kl(T mu, T s) {
    const T t = s - T(1);
    return {fma(T(0.5), fma(t, t, mu * mu), x_minus_log1p(t, s)), mu, t * (T(2) + t) / s, T(0)};
  }

  template <class T>
  static FGBG_FN Density<T> prepare_density(T s) {
    return {T(1) / s, log(s) + kHalfLog2Pi<T>};
  }
  template <class T>
  static FGBG_FN LogDensity<T> log_density(T z, T mu, Density<T> density) {
    const T r = (z - mu) * density.inverse;
    return {-fma(T(0.5) * r, r, density.constant), r * density.inverse, fma(r, r, T(-1)) * density.inverse};
  }
};

}  // namespace FGBG_ISA
}  // namespace fgbg::math
