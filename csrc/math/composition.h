// How a foreground, a background and a mask m make one loss, and the chain rule from it to each operand.
// l(x) = -log p(target | x) is the likelihood of an element, in nats:
//
//   masked    fg_weight sum m l(fg) + bg_weight sum (1 - m) l(bg), the sums of two regions
//   blended   sum l(m fg + (1 - m) bg)
//   mixture   sum -log(m e^-l(fg) + (1 - m) e^-l(bg))
//   plain     sum l(fg)
//
// A weight w of each element multiplies its part of the sum; where w is 0 the element is left out of it.
#pragma once

#include <limits>
#include <type_traits>

#include "likelihood.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

// Which elements a region leaves out of its sum. They are selected away, not multiplied by 0: whatever fg,
// bg, target and scale hold there, NaN included, the element adds 0 to the loss and to every gradient. An
// element is left out if its share of the mask, read as an integer, is below a bound. That is one comparison
// for all three cases, and one that no NaN escapes.
template <class T>
struct Excluded {
  using Bits = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr Bits kNothing = std::numeric_limits<Bits>::min(), kZeros = 1,
                        kEverything = std::numeric_limits<Bits>::max();
  Bits bound = kNothing;

  // Zeros of a mask of type bool or uint8, and of a weight. (Zeros of a float mask multiply, as IEEE says.)
  static FGBG_FN Excluded zeros_if(bool hard) { return {hard ? kZeros : kNothing}; }
  FGBG_FN Excluded or_everything_if(bool all) const { return {all ? kEverything : bound}; }
  FGBG_FN bool nothing() const { return bound == kNothing; }
  FGBG_FN bool everything() const { return bound == kEverything; }
};

template <class T>
struct ExcludedOfRegions {
  Excluded<T> fg, bg;
};

// x of an element, or 0 where it is left out. `share` is its part in the region: m in the foreground, 1 - m
// in the background; with a weight, selecting_share(). By a mask of bits, not by ?: of which g++ 12 makes
// branches that it does not vectorise.
template <class T>
FGBG_FN T selected(T x, T share, const Excluded<T>& excluded) {
  using Bits = typename Excluded<T>::Bits;
#if defined(__CUDA_ARCH__)
  return bits_as<Bits>(share) >= excluded.bound ? x : T(0);
#else
  return bits_as<T>(bits_as<Bits>(x) & -static_cast<Bits>(bits_as<Bits>(share) >= excluded.bound));
#endif
}

// Of a weighted element. A soft mask of 0 does not leave it out, and a negative weight does not either.
template <class T>
FGBG_FN T selecting_share(T share, T weight, bool hard_mask) {
  return hard_mask ? share * abs(weight) : abs(weight);
}

// (Functions of numbers, not of structs: within a loop g++ 12 keeps a struct that it has seen the address of
// in memory, and the loop scalar.)

// What an element adds to the sum of a region.
template <class T>
FGBG_FN T masked_value(T share, T nll, const Excluded<T>& excluded) {
  return selected(share * nll, share, excluded);
}

// An element of a masked loss that is not reduced, from what it adds to both sums.
template <class T>
FGBG_FN T masked_loss(T on, T off, T fg_weight, T bg_weight, T fg, T bg,
                      const ExcludedOfRegions<T>& excluded) {
  return selected(fg_weight * fg, on, excluded.fg) + selected(bg_weight * bg, off, excluded.bg);
}

// d loss / d sum of a region: u is the upstream gradient of an element, `weight` the region's, and `term`
// what reaches the sum directly.
template <class T>
FGBG_FN T masked_to_sum(T u, T weight, T term) {
  return weight == T(0) ? term : u * weight + term;
}

// d loss / d l(x)
template <class T>
FGBG_FN T masked_weight(T to_sum, T share) {
  return to_sum * share;
}

// d loss / d operand, from d loss / d l(x), the weight, and d l(x) / d operand.
template <class T>
FGBG_FN T chain(T weight, T d, T share, const Excluded<T>& excluded) {
  return selected(weight * d, share, excluded);
}

// d loss / d m
template <class T>
FGBG_FN T masked_d_mask(T on, T off, T to_fg, T to_bg, T nll_fg, T nll_bg,
                        const ExcludedOfRegions<T>& excluded) {
  return chain(to_fg, nll_fg, on, excluded.fg) - chain(to_bg, nll_bg, off, excluded.bg);
}

template <class T>
FGBG_FN T blend(T on, T off, T fg, T bg, const Excluded<T>& excluded) {
  return selected(on * fg, on, excluded) + selected(off * bg, off, excluded);
}

// d loss / d fg and d loss / d bg: chain(d_blend, share, share, excluded). d loss / d m:
template <class T>
FGBG_FN T blend_d_mask(T fg, T bg, T d_blend) {
  return (fg - bg) * d_blend;
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
  // Equal terms apart: where both are infinite the posterior is inf - inf. (What is taken off is computed
  // either way: a branch would part the elements.)
  const T less = log1p_unit(exp_minus_abs(posterior));
  const T value = best - (joint_fg == joint_bg ? T(0.693147180559945309) : less);
  return {value, r.on, r.off, sigmoid_difference(logit, posterior, fg - bg)};
}

// The terms of a masked loss of one sample: nats and areas, in pixels, of both regions.
template <class T>
struct RegionSums {
  T fg, bg, fg_area, bg_area;
};

// How a masked loss of one sample is made of its terms: fg_weight fg + bg_weight bg or, normalised by area,
// each sum over its region's area times the channels. An empty region adds 0, and so does one of weight 0.
template <class T>
struct RegionWeights {
  T fg, bg;
  bool normalize_area;
  T channels;

  FGBG_FN bool excludes(T weight, T area) const {
    return weight == T(0) || (normalize_area && area <= T(0));  // NaN stays NaN
  }
  FGBG_FN T per_nat(T weight, T area) const { return normalize_area ? weight / (area * channels) : weight; }
};

template <class T>
FGBG_FN T region_loss(T weight, T sum, T area, const RegionWeights<T>& w) {
  if (w.excludes(weight, area)) return T(0);
  return w.normalize_area ? weight * (sum / (area * w.channels)) : weight * sum;
}

template <class T>
FGBG_FN T region_loss(const RegionSums<T>& s, const RegionWeights<T>& w) {
  return region_loss(w.fg, s.fg, s.fg_area, w) + region_loss(w.bg, s.bg, s.bg_area, w);
}

// How the upstream gradients of a masked loss of one sample reach its elements.
template <class T>
struct RegionUpstream {
  T fg, bg;            // the sums of nats, by way of the loss
  T fg_term, bg_term;  // by way of the terms
  T fg_area, bg_area;  // the shares of each element in the areas
  ExcludedOfRegions<T> excluded;

  FGBG_FN T mask() const { return fg_area - bg_area; }  // m of each element, by way of the areas
};

// g: of the loss; 1 where each element of it has another, which is to be multiplied by later. term: of
// the terms, if it has_terms. share_channels: an element that has a share of its own in each of so many
// channels is that part of a pixel.
template <class T>
FGBG_FN RegionUpstream<T> region_upstream(T g, const RegionSums<T>& s, const RegionSums<T>& term,
                                          bool has_terms, const RegionWeights<T>& w, T share_channels,
                                          bool selects) {
  const bool no_fg = w.excludes(w.fg, s.fg_area), no_bg = w.excludes(w.bg, s.bg_area);
  const T per_fg = no_fg ? T(0) : w.per_nat(w.fg, s.fg_area);
  const T per_bg = no_bg ? T(0) : w.per_nat(w.bg, s.bg_area);
  // The terms are those before the weights: what arrives at them passes in any case.
  const Excluded<T> zeros = Excluded<T>::zeros_if(selects);
  RegionUpstream<T> to{
      no_fg ? T(0) : g * per_fg,
      no_bg ? T(0) : g * per_bg,
      term.fg,
      term.bg,
      term.fg_area,
      term.bg_area,
      {zeros.or_everything_if(no_fg && !has_terms), zeros.or_everything_if(no_bg && !has_terms)}};
  if (w.normalize_area) {
    if (!no_fg) to.fg_area -= g * per_fg * (s.fg / s.fg_area);
    if (!no_bg) to.bg_area -= g * per_bg * (s.bg / s.bg_area);
  }
  to.fg_area /= share_channels;
  to.bg_area /= share_channels;
  return to;
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
