// Masks, their logits, the discrete KL between them, and the two-component mixture.
#pragma once

#include "elementary.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

// log(1 + e^x), from an exponential that cannot overflow.
template <class T>
FGBG_FN T softplus(T x) {
  return (x > T(0) ? x : T(0)) + log1p_unit(exp_minus_abs(x));
}

template <class T>
struct Mask {
  T on;     // m = sigmoid(logit)
  T off;    // 1 - m = sigmoid(-logit), with its own relative accuracy
  T slope;  // dm / dlogit = m (1 - m)
};

// dm / dlogit from m and 1 - m.
template <class T>
FGBG_FN T mask_slope(T on, T off) {
  return on * off;
}

template <class T>
FGBG_FN Mask<T> mask_from_logit(T logit) {
  const T e = exp_minus_abs(logit);
  const T large = T(1) / (T(1) + e), small = e * large;
  const bool positive = logit > T(0);
  return {positive ? large : small, positive ? small : large, mask_slope(small, large)};
}

// sigmoid(a) - sigmoid(b) without cancellation, given d = a - b.
template <class T>
FGBG_FN T sigmoid_difference(T a, T b, T d) {
  const Mask<T> ma = mask_from_logit(a), mb = mask_from_logit(b);
  const T shrink = expm1(-abs(d));
  return d > T(0) ? -ma.on * mb.off * shrink : mb.on * ma.off * shrink;
}

template <class T>
struct BernoulliKl {
  T value;    // KL(Bernoulli(sigmoid a) || Bernoulli(sigmoid b)) in nats
  T d_logit;  // sigmoid'(a) (a - b)
  T d_prior;  // sigmoid(b) - sigmoid(a)
};

// KL = m d + log((1 + e^b) / (1 + e^a)), d = a - b, m = sigmoid(a), taken on the side where m <= 1/2
// (flipping the sign of both logits exchanges the two outcomes). Far apart, the log is a difference of
// softplus, which are log(1 + e^-|x|) and, for b > 0, b. Close together both terms cancel to second order in
// d; there log(...) = log1p(y) with y = m (e^-d - 1), and KL = m (e^-d - 1 + d) + (log1p(y) - y), each part
// accurate by itself.
template <class T>
FGBG_FN BernoulliKl<T> bernoulli_kl(T logit, T prior_logit) {
  const T sign = logit > T(0) ? T(-1) : T(1);
  const T a = sign * logit, b = sign * prior_logit, d = a - b;
  const Mask<T> m = mask_from_logit(a);
  const T near = m.on * expm1_minus_x(-d) + log1p_minus_x(m.on * expm1(-d));
  const T logs = log1p_unit(exp_minus_abs(prior_logit)) - log1p_unit(exp_minus_abs(a));
  // m d + b, written so that an infinite b gives no inf - inf.
  const T far = (b > T(0) ? m.on * a + m.off * b : m.on * d) + logs;
  return {abs(d) < T(0.5) ? near : far, m.slope * (logit - prior_logit),
          -sigmoid_difference(logit, prior_logit, logit - prior_logit)};
}

template <class T>
struct Mixture {
  T value;    // -log(m e^-fg + (1 - m) e^-bg),  m = sigmoid(logit), fg and bg in nats
  T d_fg;     // r = sigmoid(logit - fg + bg), the responsibility of the foreground
  T d_bg;     // 1 - r
  T d_logit;  // m - r
};

template <class T>
FGBG_FN Mixture<T> mixture(T logit, T fg, T bg) {
  const T joint_fg = softplus(-logit) + fg, joint_bg = softplus(logit) + bg;
  const T posterior = logit - (fg - bg);
  const Mask<T> r = mask_from_logit(posterior);
  const T best = joint_fg < joint_bg ? joint_fg : joint_bg;
  // Equal terms apart: where both are infinite the posterior is inf - inf.
  const T value =
      joint_fg == joint_bg ? joint_fg - T(0.693147180559945309) : best - log1p_unit(exp_minus_abs(posterior));
  return {value, r.on, r.off, sigmoid_difference(logit, posterior, fg - bg)};
}

// A masked loss of one sample from its sums: w_fg S_fg + w_bg S_bg, or, normalised by area, each sum
// over its region's area times the channels. An empty region contributes 0.
template <class T>
struct RegionSums {
  T fg, bg, fg_area, bg_area;
};

template <class T>
FGBG_FN T region_mean(T sum, T area, T channels) {
  return area <= T(0) ? T(0) : sum / (area * channels);  // NaN stays NaN
}

template <class T>
FGBG_FN T region_loss(RegionSums<T> s, T fg_weight, T bg_weight, bool normalize_area, T channels) {
  if (!normalize_area) return fg_weight * s.fg + bg_weight * s.bg;
  return fg_weight * region_mean(s.fg, s.fg_area, channels) +
         bg_weight * region_mean(s.bg, s.bg_area, channels);
}

// d(region_loss) / d(sums).
template <class T>
FGBG_FN RegionSums<T> region_loss_gradient(RegionSums<T> s, T fg_weight, T bg_weight, bool normalize_area,
                                           T channels) {
  if (!normalize_area) return {fg_weight, bg_weight, T(0), T(0)};
  const bool no_fg = s.fg_area <= T(0), no_bg = s.bg_area <= T(0);
  const T per_fg = no_fg ? T(0) : fg_weight / (s.fg_area * channels);
  const T per_bg = no_bg ? T(0) : bg_weight / (s.bg_area * channels);
  return {per_fg, per_bg, no_fg ? T(0) : -per_fg * (s.fg / s.fg_area),
          no_bg ? T(0) : -per_bg * (s.bg / s.bg_area)};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
