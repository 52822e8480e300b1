// What the kernels of a masked loss read of their arguments, as math/composition.h wants it.
#pragma once

#include "dtype.h"
#include "math/composition.h"

namespace fgbg {
inline namespace FGBG_ISA {

template <class T>
FGBG_FN math::RegionWeights<T> region_weights(const FinalReduction& args) {
  return {scale_at<T>(args.fg_weight, 0), scale_at<T>(args.bg_weight, 0), args.normalize_area,
          static_cast<T>(args.channels)};
}
template <class T>
FGBG_FN math::RegionWeights<T> region_weights(const ReconstructionArgs& args) {
  return {scale_at<T>(args.fg_weight, 0), scale_at<T>(args.bg_weight, 0), args.normalize_area,
          static_cast<T>(args.shape.size[1])};
}

// The terms (or their gradients) of sample b, of [kTerms, B].
template <class T>
FGBG_FN math::RegionSums<T> terms_of(const void* terms, int64_t batch, int64_t b) {
  const T* of = static_cast<const T*>(terms) + b;
  return {of[0], of[batch], of[2 * batch], of[3 * batch]};
}

FGBG_FN bool hard_mask(const ReconstructionArgs& args) { return args.mask.dtype == DType::u8; }
// Whether some elements may be left out: where such a mask, or a weight, is 0.
FGBG_FN bool selects(const ReconstructionArgs& args) { return hard_mask(args) || args.weight; }

// How the upstream gradients of sample b of a masked loss reach its elements.
template <class T>
FGBG_FN math::RegionUpstream<T> region_upstream(const ReconstructionArgs& args, int64_t b) {
  const int64_t batch = args.shape.size[0];
  const bool unreduced = static_cast<bool>(args.grad_loss_elements);
  math::RegionSums<T> sums{}, to_terms{};  // not behind a pointer, which would put them in local memory
  if (args.terms) sums = terms_of<T>(args.terms, batch, b);
  if (args.grad_terms) to_terms = terms_of<T>(args.grad_terms, batch, b);
  return math::region_upstream(
      unreduced ? T(1) : upstream<T>(args.grad_loss, b), sums, to_terms, args.grad_terms != nullptr,
      region_weights<T>(args),
      args.mask_per_channel || args.weight ? static_cast<T>(args.shape.size[1]) : T(1), selects(args));
}

// What a loss that is not reduced leaves out.
template <class T>
FGBG_FN math::ExcludedOfRegions<T> excluded_of_loss(const math::RegionWeights<T>& weights, bool selects) {
  const math::Excluded<T> zeros = math::Excluded<T>::zeros_if(selects);
  return {zeros.or_everything_if(weights.fg == T(0)), zeros.or_everything_if(weights.bg == T(0))};
}

}  // namespace FGBG_ISA
}  // namespace fgbg
