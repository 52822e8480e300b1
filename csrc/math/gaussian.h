// Diagonal Gaussians: the reparameterised sample and the KL divergence in nats, with their derivatives.
// Kingma & Welling, "Auto-Encoding Variational Bayes", 2014, appendix B, for a general Gaussian prior.
#pragma once

#include "elementary.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

// z = mu + std eps, std = exp(logvar / 2).  dz/dmu = 1.
template <class T>
FGBG_FN T std_from_logvar(T logvar) {
  return exp(T(0.5) * logvar);
}
template <class T>
FGBG_FN T dz_dlogvar(T std, T eps) {
  return T(0.5) * std * eps;
}

template <class T>
struct GaussianKl {
  T value;     // 1/2 (e^d - 1 - d + delta^2 / prior_var),  d = logvar - prior_logvar, delta = mu - prior_mu
  T d_mu;      // delta / prior_var                         (prior_mu: the negative)
  T d_logvar;  // 1/2 (e^d - 1)
  T d_prior_logvar;  // -1/2 (e^d - 1 + delta^2 / prior_var)
};

template <class T>
FGBG_FN GaussianKl<T> gaussian_kl(T mu, T logvar, T prior_mu, T prior_logvar) {
  const T d = logvar - prior_logvar, delta = mu - prior_mu;
  const T scaled = delta * exp(-prior_logvar);
  const T square = delta * scaled;
  const T growth = expm1(d);
  return {T(0.5) * (expm1_minus_x(d) + square), scaled, T(0.5) * growth, T(-0.5) * (growth + square)};
}

// Against N(0, 1): the same with prior_mu = prior_logvar = 0.
template <class T>
FGBG_FN GaussianKl<T> gaussian_kl(T mu, T logvar) {
  const T growth = expm1(logvar);
  return {T(0.5) * fma(mu, mu, expm1_minus_x(logvar)), mu, T(0.5) * growth, T(0)};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
