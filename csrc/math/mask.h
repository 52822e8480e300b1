// Masks, their logits, and the discrete KL between them.
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
  const T large = reciprocal(T(1) + e), small = e * large;
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

// What the KL needs of a prior, computed once where it is the same for all elements.
template <class T>
struct BernoulliPrior {
  T logit;
  Mask<T> mask;
  T log_z;  // log(1 + e^-|logit|)
};
template <class T>
FGBG_FN BernoulliPrior<T> bernoulli_prior(T logit) {
  return {logit, mask_from_logit(logit), log1p_unit(exp_minus_abs(logit))};
}

template <class T>
struct BernoulliKl {
  T value;    // KL(Bernoulli(sigmoid a) || Bernoulli(sigmoid b)) in nats
  T d_logit;  // sigmoid'(a) (a - b); 0 where a is infinite
  T d_prior;  // sigmoid(b) - sigmoid(a)
};

// KL = m d + log((1 + e^b) / (1 + e^a)), d = a - b, m = sigmoid(a), taken on the side where m <= 1/2
// (flipping the sign of both logits exchanges the two outcomes). Far apart, the log is a difference of
// softplus, which are log(1 + e^-|x|) and, for b > 0, b. Close together both terms cancel to second order in
// d; there log(...) = log1p(y) with y = m (e^-d - 1), and KL = m (e^-d - 1 + d) + (log1p(y) - y), each part
// accurate by itself. Likewise sigmoid(b) - sigmoid(a) = m (1 - sigmoid(b)) (e^-d - 1).
//
// Infinite logits are masks of exactly 0 or 1: KL(+-inf || b) = softplus(-+b), 0 where b is the same
// infinity, and inf where it is the other. The KL of any finite logit against an infinite one is inf.
template <class T>
FGBG_FN BernoulliKl<T> bernoulli_kl(T logit, BernoulliPrior<T> of) {
  constexpr T kCertain = T(-800);  // e^-800 is 0 in either type: in place of -inf, for m a = 0
  const bool flip = logit > T(0);
  const T sign = flip ? T(-1) : T(1);
  const T b = sign * of.logit, signed_logit = sign * logit;
  const T prior_on = flip ? of.mask.off : of.mask.on, prior_off = flip ? of.mask.on : of.mask.off;
  const T a = kCertain > signed_logit ? kCertain : signed_logit;
  const T d = a - b;
  const Mask<T> m = mask_from_logit(a);
  const bool close = abs(d) < T(0.5);
  T near = T(0), near_difference = T(0), far = T(0), far_difference = T(0);  // of sigmoid(b) - sigmoid(a)
  FGBG_WHEN(close) {
    const T more = expm1_minus_x(-d), growth = more - d;  // e^-d - 1 + d and e^-d - 1
    near = m.on * more + log1p_minus_x(m.on * growth);
    near_difference = m.on * prior_off * growth;
  }
  FGBG_WHEN(!close) {
    const T logs = of.log_z - log1p_unit(exp_minus_abs(a));
    // m d + b, written so that an infinite b gives no inf - inf.
    const T value = (b > T(0) ? m.on * a + m.off * b : m.on * d) + logs;
    // Against an infinite prior: m may not meet inf where it has underflowed to 0. That is b = -inf alone,
    // since m <= 1/2.
    const T limit = signed_logit == b ? T(0) : abs(d);
    far = b == -kInf<T> ? limit : value;
    far_difference = prior_on - m.on;
  }
  const bool flat = (abs(b) == kInf<T>)&(m.slope == T(0));  // &: a branch would not be vectorised
  return {close ? near : far, flat ? T(0) : m.slope * (sign * d),
          sign * (close ? near_difference : far_difference)};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
