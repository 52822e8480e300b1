#include "log_prob.h"

#include "kl.h"

namespace fgbg::ops {
namespace {

variable_list operands(const GaussianLogProb& op) { return {op.z, op.mu.tensor, op.spread.tensor}; }

LogProbArgs args_of(const GaussianLogProb& op) {
  LogProbArgs args{};
  args.shape = latent_shape(op.z, op.batch_dims);
  args.parameterization = op.parameterization;
  args.z = view_of(op.z, op.z, false);
  args.mu = broadcast_view(op.mu, op.z);
  args.spread = broadcast_view(op.spread, op.z);
  const bool absent = !op.spread.tensor.defined() && op.spread.value == op.spread.absent;
  if (absent && op.parameterization == Parameterization::std) args.spread.number.value = 1.0;
  return args;
}

void run_backward(LogProbArgs& args, const GaussianLogProb& op, const variable_list& to) {
  const BroadcastGradients gradients(to, op.z, op.dtype(), false);
  args.grad_z = view_of(gradients[0], op.z, false);
  args.grad_mu = view_of(gradients[1], op.z, false);
  args.grad_spread = view_of(gradients[2], op.z, false);
  FGBG_RUN(log_prob_backward, args, op.dtype() == at::kDouble, op.z);
  gradients.sum();
}

}  // namespace

void GaussianLogProb::check() const {
  check_float("z", z);
  TORCH_CHECK_VALUE(z.dim() >= 1, "z has shape [], expected [B, *D]");
  check_batch_dims(batch_dims, "z", z);
  if (mu.tensor.defined()) check_broadcasts("mu", mu.tensor, "z", z);
  if (spread.tensor.defined()) check_broadcasts("logvar", spread.tensor, "z", z);
}

Forward GaussianLogProb::allocate(Needs needs) const {
  Forward out{{empty_kl(z, reduction, dtype(), batch_dims)}, {}};
  if (writes_unit_gradients(operands(*this), z, reduction, batch_dims, needs))
    out.saved = defined_of(empty_gradients(operands(*this), needs));
  return out;
}

Forward GaussianLogProb::forward(Needs needs) const {
  Forward out = allocate(needs);
  LogProbArgs args = args_of(*this);
  Tensor partial;
  if (reduction == Reduction::none)
    args.log_prob = view_of(out.outputs[0], z, false);
  else
    partial = set_sums(args, out.outputs[0], reduction);
  if (out.saved.empty()) {
    FGBG_RUN(log_prob_forward, args, dtype() == at::kDouble, z);
    return out;
  }
  args.grad.factor = args.final_reductions[0].factor;
  run_backward(args, *this, by_operand(out.saved, needs, kOperands));
  return out;
}

variable_list GaussianLogProb::backward(const variable_list& grads, const Tensor&, Needs needs, bool) const {
  LogProbArgs args = args_of(*this);
  Tensor upstream;
  if (reduction == Reduction::none)
    args.grad_elements = view_of(grads[0], z, false);
  else
    upstream = set_upstream(args, args.grad, grads[0], reduction);
  variable_list out = empty_gradients(operands(*this), needs);
  run_backward(args, *this, out);
  return out;
}

}  // namespace fgbg::ops
