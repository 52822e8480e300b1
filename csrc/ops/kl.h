// What the Gaussian and the Bernoulli KL share: a value per element or a sum, and the upstream gradient of
// it.
#pragma once

#include "tensors.h"

namespace fgbg::ops {

inline Tensor empty_kl(const Tensor& like, Reduction reduction, at::ScalarType dtype) {
  return reduction == Reduction::none ? empty_result_like(like, like.options().dtype(dtype))
                                      : empty_loss(like, reduction, dtype);
}

// Has the kernel write `kl`: by element, or as partial sums, which are returned and have to outlive it.
template <class Args>
Tensor set_kl(Args& args, const Tensor& kl, const Tensor& like, Reduction reduction) {
  if (reduction == Reduction::none) {
    args.kl = view_of(kl, like, false);
    return {};
  }
  const Tensor partial = at::empty({args.shape.size[0], FGBG_ON_DEVICE(row_segments, args.shape, like)},
                                   like.options().dtype(at::kDouble));
  args.partial = partial.template mutable_data_ptr<double>();
  FinalReduction& f = args.final_reductions[0];
  f.partial = args.partial;
  f.terms = 1;
  f.batch = partial.size(0);
  f.segments = partial.size(1);
  f.reduction = reduction;
  f.factor = reduction_factor(reduction, f.batch, like.numel());
  f.loss = kl.mutable_data_ptr();
  f.dtype = storage_dtype(kl);
  return partial;
}

template <class Args>
void set_kl_gradient(Args& args, const Tensor& grad, const Tensor& like, Reduction reduction) {
  if (reduction == Reduction::none)
    args.grad_kl_elements = view_of(grad, like, false);
  else
    args.grad_kl = upstream_of(grad, reduction, reduction_factor(reduction, like.size(0), like.numel()));
}

}  // namespace fgbg::ops
