// KL(softmax a || softmax b) of K outcomes, in nats, with its derivatives.
//
// With d_k = a_k - b_k, p = softmax a, c = sum_k p_k d_k and x_k = c - d_k,
//
//   KL = log sum_k p_k e^x_k = log(1 + sum_k p_k (e^x_k - 1 - x_k)),    since sum_k p_k x_k = 0,
//
// a sum of positive terms: no two of them cancel, however near the prior. Shifting all d_k by one number
// changes nothing; they are taken relative to that of the most probable outcome. The derivatives are
// dKL/da_k = -p_k x_k and dKL/db_k = q_k - p_k = p_k (e^(x_k - KL) - 1).
//
// An outcome is far if x_k >= kFar: its p_k is next to nothing beside its q_k, 0 if a_k = -inf. For those
// p_k e^x_k = q_k e^KL is solved for the KL:
//
//   e^KL (1 - sum_far q_k) = 1 + sum_near p_k (e^x_k - 1 - x_k) - sum_far p_k (1 + x_k).
//
// Where the last sum counts, or the near outcomes have next to no q_k, the KL is so large (above 25 nats)
// that its definition loses nothing: sum_k p_k (log p_k - log q_k). An outcome that the prior alone excludes,
// b_k = -inf, makes the KL inf.
#pragma once

#include "elementary.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

template <class T>
constexpr T kFar = T(40);

// Of each outcome: what the most probable one is told by, and what the sums over outcomes are made of.
template <class T>
FGBG_FN T outcome_weight(T logit, T largest) {
  return exp_minus_abs(logit - largest);
}
template <class T>
FGBG_FN T outcome_mean(T weight, T d) {  // without those that are excluded, whose d is infinite
  return weight > T(0) ? weight * d : T(0);
}
template <class T>
FGBG_FN T outcome_growth(T p, T x) {
  return p * expm1_minus_x(x);
}

// Of groups with far outcomes.
template <class T>
struct OutcomeSums {
  T growth = T(0);  // of the near outcomes
  T excess = T(0);  // p (1 + x) of the far ones
  T near_q = T(0), far_q = T(0);
  T apart = T(0);          // sum of p (a - b), both relative to their largest
  bool forbidden = false;  // whether the prior excludes what the posterior does not
};
template <class T>
FGBG_FN bool is_far(T x) {
  return !(x < kFar<T>);
}
template <class T>
FGBG_FN void add_outcome(T logit, T largest, T prior, T largest_prior, T p, T x, T q, OutcomeSums<T>& to) {
  const bool far = is_far(x);
  to.growth += far ? T(0) : outcome_growth(p, x);
  to.excess += far && p != T(0) ? p * (T(1) + x) : T(0);
  to.near_q += far ? T(0) : q;
  to.far_q += far ? q : T(0);
  to.apart += p != T(0) ? p * ((logit - largest) - (prior - largest_prior)) : T(0);
  to.forbidden |= prior == -kInf<T> && logit > -kInf<T>;
}
// `total`, `prior_total`: of the weights.
template <class T>
FGBG_FN T categorical_kl(const OutcomeSums<T>& s, T total, T prior_total) {
  if (s.forbidden) return kInf<T>;
  if (s.excess > T(0.1) || s.near_q < T(1e-12)) return s.apart - (log(total) - log(prior_total));
  return log1p(s.growth - s.excess) - (s.far_q < T(0.5) ? log1p(-s.far_q) : log(s.near_q));
}

template <class T>
FGBG_FN T d_outcome_logit(T p, T x) {
  return p == T(0) ? T(0) : -p * x;
}
template <class T>
FGBG_FN T d_outcome_prior(T p, T x, T kl, T q) {  // q: of far outcomes
  return is_far(x) ? q - p : p * expm1(x - kl);
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
