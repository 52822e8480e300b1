#include "bernoulli.h"

#include "kl.h"

namespace fgbg::ops {
namespace {

BernoulliArgs args_of(const BernoulliKl& op) {
  BernoulliArgs args{};
  args.shape = latent_shape(op.logits);
  args.logits = view_of(op.logits, op.logits, false);
  args.prior = view_of(op.prior_logits.defined() ? op.prior_logits : op.prior_logit.tensor, op.logits, false);
  args.prior_logit = op.prior_logit.value;
  return args;
}

void run_backward(BernoulliArgs& args, const BernoulliKl& op, const variable_list& to) {
  args.grad_logits = view_of(to[0], op.logits, false);
  args.grad_prior = view_of(to[1], op.logits, false);
  FGBG_RUN(bernoulli_backward, args, op.dtype() == at::kDouble, op.logits);
}

bool writes_gradients(const BernoulliKl& op, Needs needs) {
  return op.reduction != Reduction::none && may_write_unit_gradients({op.logits, op.prior_logits}, needs);
}

}  // namespace

void BernoulliKl::check() const {
  check_float("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() >= 1, "logits has shape [], expected [B, *D]");
  if (prior_logits.defined()) check_like("prior_logits", prior_logits, "logits", logits);
  check_number("prior_logit", prior_logit, "logits", logits);
}

Forward BernoulliKl::allocate(Needs needs) const {
  Forward out{{empty_kl(logits, reduction, dtype())}, {}};
  if (writes_gradients(*this, needs)) out.saved = defined_of(empty_gradients({logits, prior_logits}, needs));
  return out;
}

Forward BernoulliKl::forward(Needs needs) const {
  Forward out = allocate(needs);
  BernoulliArgs args = args_of(*this);
  const Tensor partial = set_kl(args, out.outputs[0], logits, reduction);
  if (out.saved.empty()) {
    FGBG_RUN(bernoulli_forward, args, dtype() == at::kDouble, logits);
    return out;
  }
  args.grad_kl.factor = reduction_factor(reduction, logits.size(0), logits.numel());
  run_backward(args, *this, by_operand(out.saved, needs, kOperands));
  return out;
}

variable_list BernoulliKl::backward(const variable_list& grads, const Tensor&, Needs needs, bool) const {
  BernoulliArgs args = args_of(*this);
  set_kl_gradient(args, grads[0], logits, reduction);
  variable_list out = empty_gradients({logits, prior_logits}, needs);
  run_backward(args, *this, out);
  return out;
}

}  // namespace fgbg::ops
