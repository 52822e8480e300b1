// A mixture of K slots and its derivatives, and how slots are blended.
//
// n_k = -log p(target | slot k) are the nats of slot k, m_k its share of the mask: of logits a_k
// m_k = e^u_k / sum_j e^u_j with u_k = a_k - max_j a_j, of log-masks m_k = e^u_k with u_k = a_k. The loss is
//
//   -log sum_k m_k e^-n_k = n_r - u_r + log(1 + z) - log(1 + s)
//
// where r is the slot whose term is largest, s the sum of e^x_k over the other slots,
// x_k = (u_k - u_r) + (n_r - n_k), and z that of e^u_k over all but the largest (0 for log-masks).
// Differences of nats are taken before anything is added to them: numbers of 10^4 that differ by 1 lose
// nothing, and nothing overflows. The largest terms, which are 1, stay out of the sums, so that a loss near 0
// keeps its relative accuracy.
//
// A slot whose mask is -inf is excluded: whatever it holds, its term is 0 and so is every gradient.
#pragma once

#include "composition.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

// Its share for selected(): 0 where a slot is excluded.
template <class T>
FGBG_FN T slot_share(T mask) {
  return mask == -kInf<T> ? T(0) : T(1);
}

// log(1 + x) for x >= 0.
FGBG_FN float log1p_positive(float x) {
  const bool unit = x < 1.0f;
  const float small = log1p_unit(unit ? x : 1.0f), large = log(1.0f + x);
  return unit ? small : large;
}
FGBG_FN double log1p_positive(double x) { return ::log1p(x); }

// x_k: the log of a term over that of another.
template <class T>
FGBG_FN T relative_term(T u, T nats, T u_of_other, T nats_of_other) {
  return (u - u_of_other) + (nats_of_other - nats);
}

// What the search for the largest term begins with: any finite term is larger.
template <class T>
constexpr T kNoMask = -std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNoNats = std::numeric_limits<T>::infinity();

// e^x_k, 0 of a slot that is excluded or infinitely unlikely, also where no slot is left to compare with.
template <class T>
FGBG_FN T slot_term(T x, T share, T nats) {
  const T term =
      exp_minus_abs(x > T(0) ? T(0) : x);  // the search may end at a slot that is larger by rounding
  const T none = nats == kInf<T> ? T(0) : share;
  return selected(term, none, Excluded<T>::zeros_if(true));
}

template <class T>
FGBG_FN T slot_mixture_loss(T largest_nats, T largest_u, T z, T s) {
  return (largest_nats - largest_u) + (log1p_positive(z) - log1p_positive(s));
}

// What e^x_k is multiplied by for the responsibility of slot k. Where no slot is likely at all there is none:
// 0 / 0. (largest: the slot whose term is, -1 where no search found one.)
template <class T>
FGBG_FN T responsibility_per_term(T s, T largest) {
  return largest < T(0) ? kNaN<T> : T(1) / (T(1) + s);
}
template <class T>
FGBG_FN T slot_responsibility(T term, T per_term, T share) {
  return selected(term * per_term, share, Excluded<T>::zeros_if(true));
}

// d loss / d logit of slot k is m_k - r_k, r_k = e^x_k / (1 + s) its responsibility. With
// g_k = e^(n_r - n_k) - 1, r_k = m_k (1 + g_k) / (1 + mean), mean = sum_j m_j g_j, so
// m_k - r_k = m_k (mean - g_k) / (1 + mean): no difference of nearly equal numbers where the slots fit nearly
// equally well, or one has nearly all of the mask and of the posterior. Where the mean is near -1 or
// overflows, m_k and r_k are far apart, and are subtracted.
template <class T>
FGBG_FN T slot_gain(T nats, T largest_nats, T share) {
  return selected(expm1(largest_nats - nats), share, Excluded<T>::zeros_if(true));
}
template <class T>
FGBG_FN T slot_d_logit(T m, T r, T gain, T mean_gain, T inverse) {  // inverse: 1 / (1 + mean_gain)
  const bool close = (inverse < T(2)) & (inverse > T(1e-30));
  return close ? m * ((mean_gain - gain) * inverse) : m - r;
}

// A blend is sum_k m_k x_k, its loss that of the blend. d blend / d x_k = m_k; d blend / d m_k = x_k, and by
// way of the softmax d blend / d logit = m_k (x_k - blend).
template <class T>
FGBG_FN T blend_term(T m, T x, T share) {
  return m * selected(x, share, Excluded<T>::zeros_if(true));
}
// base: what is taken from x_k before it meets m_k.
template <class T>
FGBG_FN T blend_d_share(T x, T base, T d_blend) {
  return (x - base) * d_blend;
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
