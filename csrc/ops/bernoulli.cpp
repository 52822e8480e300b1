#include "bernoulli.h"

#include "kl.h"

namespace fgbg::ops {
namespace {

variable_list operands(const BernoulliKl& op) { return {op.logits, op.prior_logits.tensor}; }

BernoulliArgs args_of(const BernoulliKl& op) {
  BernoulliArgs args{};
  args.shape = latent_shape(op.logits, op.batch_dims);
  args.logits = view_of(op.logits, op.logits, false);
  args.prior = broadcast_view(op.prior_logits, op.logits);
  return args;
}

void run_backward(BernoulliArgs& args, const BernoulliKl& op, const variable_list& to) {
  const BroadcastGradients gradients(to, op.logits, op.dtype(), false);
  args.grad_logits = view_of(gradients[0], op.logits, false);
  args.grad_prior = view_of(gradients[1], op.logits, false);
  FGBG_RUN(bernoulli_backward, args, op.dtype() == at::kDouble, op.logits);
  gradients.sum();
}

}  // namespace

void BernoulliKl::check() const {
  check_float("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() >= 1, "logits has shape [], expected [B, *D]");
  check_batch_dims(batch_dims, "logits", logits);
  if (prior_logits.tensor.defined()) check_broadcasts("prior_logits", prior_logits.tensor, "logits", logits);
}

Forward BernoulliKl::allocate(Needs needs) const {
  Forward out{{empty_kl(logits, reduction, dtype(), batch_dims)}, {}};
  if (writes_unit_gradients(operands(*this), logits, reduction, batch_dims, needs))
    out.saved = defined_of(empty_gradients(operands(*this), needs));
  return out;
}

Forward BernoulliKl::forward(Needs needs) const {
  Forward out = allocate(needs);
  BernoulliArgs args = args_of(*this);
  Tensor partial;
  if (reduction == Reduction::none)
    args.kl = view_of(out.outputs[0], logits, false);
  else
    partial = set_sums(args, out.outputs[0], reduction);
  if (out.saved.empty()) {
    FGBG_RUN(bernoulli_forward, args, dtype() == at::kDouble, logits);
    return out;
  }
  args.grad_kl.factor = args.final_reductions[0].factor;
  run_backward(args, *this, by_operand(out.saved, needs, kOperands));
  return out;
}

variable_list BernoulliKl::backward(const variable_list& grads, const Tensor&, Needs needs, bool) const {
  BernoulliArgs args = args_of(*this);
  Tensor upstream;
  if (reduction == Reduction::none)
    args.grad_kl_elements = view_of(grads[0], logits, false);
  else
    upstream = set_upstream(args, args.grad_kl, grads[0], reduction);
  variable_list out = empty_gradients(operands(*this), needs);
  run_backward(args, *this, out);
  return out;
}

}  // namespace fgbg::ops
