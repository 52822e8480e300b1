// What the latent losses share: a value per element or a sum, the upstream gradient of it, and where forward
// writes gradients.
#pragma once

#include "broadcast.h"
#include "op.h"

namespace fgbg::ops {

inline void check_batch_dims(int64_t batch_dims, const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(batch_dims >= 1 && batch_dims <= t.dim(), "batch_dims is ", batch_dims,
                    ", expected how many of the ", t.dim(), " dimensions of ", name, " index samples, 1 to ",
                    t.dim());
}

// `like`: of the shape of the elements.
inline Tensor empty_kl(const Tensor& like, Reduction reduction, at::ScalarType dtype, int64_t batch_dims) {
  return reduction == Reduction::none ? empty_result_like(like, like.options().dtype(dtype))
                                      : empty_loss(like, reduction, dtype, batch_dims);
}

// Has the kernel write `kl` as partial sums, which are returned and have to outlive it.
template <class Args>
Tensor set_sums(Args& args, const Tensor& kl, Reduction reduction) {
  const Tensor partial = empty_sums({args.shape.samples, FGBG_ON_DEVICE(row_segments, args.shape, kl)}, kl);
  args.partial = partial.template mutable_data_ptr<double>();
  FinalReduction& f = args.final_reductions[0];
  f.partial = args.partial;
  f.terms = 1;
  f.batch = partial.size(0);
  f.segments = partial.size(1);
  f.reduction = reduction;
  f.factor = reduction_factor(reduction, f.batch, args.shape.numel);
  f.loss = kl.mutable_data_ptr();
  f.dtype = storage_dtype(kl);
  return partial;
}

// The upstream gradient of a reduced loss; returned is what has to outlive the kernel.
template <class Args>
Tensor set_upstream(Args& args, Upstream& to, const Tensor& grad, Reduction reduction) {
  const Tensor flat = grad.dim() > 1 ? grad.reshape(-1) : grad;
  to = upstream_of(flat, reduction, reduction_factor(reduction, args.shape.samples, args.shape.numel));
  return flat;
}

// Whether forward writes the gradients of a reduced loss for an upstream gradient of one. Not where a
// gradient sums over samples of which each has an upstream gradient of its own. Nor on CUDA where the kernel
// of half precision would have to write a gradient in float32, for its operand is broadcast: another kernel
// adds in another order, and a loss has the same bits whether its gradients are wanted or not.
inline bool writes_unit_gradients(const variable_list& operands, const Tensor& like, Reduction reduction,
                                  int64_t batch_dims, Needs needs) {
  if (reduction == Reduction::none || !may_write_unit_gradients(operands, needs)) return false;
  for (size_t i = 0; i < operands.size(); ++i) {
    if (!needs_operand(needs, i)) continue;
    if (reduction == Reduction::sample && shared_by_samples(operands[i], like, batch_dims)) return false;
    if (like.is_cuda() && like.element_size() == 2 && operands[i].sym_sizes() != like.sym_sizes())
      return false;
  }
  return true;
}

}  // namespace fgbg::ops
