#include "categorical.h"

#include "kl.h"

namespace fgbg::ops {
namespace {

variable_list operands(const CategoricalKl& op) { return {op.logits, op.prior_logits}; }

// A tensor of one number for each group, of which only the form is used.
Tensor groups_of(const CategoricalKl& op) { return op.logits.select_symint(op.dim, 0); }

// A view of the first outcome of every group, and how far apart the outcomes are.
View outcomes_view(const Tensor& t, const CategoricalKl& op, int64_t& step) {
  if (!t.defined()) return {};
  const Tensor all = t.expand_as(op.logits);
  step = all.stride(op.dim);
  const Tensor first = all.select(op.dim, 0);
  return view_of(first, first, false);
}

CategoricalArgs args_of(const CategoricalKl& op) {
  CategoricalArgs args{};
  args.shape = latent_shape(groups_of(op), op.batch_dims);
  args.outcomes = op.logits.size(op.dim);
  args.logits = outcomes_view(op.logits, op, args.logits_step);
  args.prior = outcomes_view(op.prior_logits, op, args.prior_step);
  return args;
}

void run_backward(CategoricalArgs& args, const CategoricalKl& op, const variable_list& to) {
  const BroadcastGradients gradients(to, op.logits, op.dtype(), false);
  args.grad_logits = outcomes_view(gradients[0], op, args.grad_logits_step);
  args.grad_prior = outcomes_view(gradients[1], op, args.grad_prior_step);
  FGBG_RUN(categorical_backward, args, op.dtype() == at::kDouble, op.logits);
  gradients.sum();
}

}  // namespace

void CategoricalKl::check() const {
  check_float("logits", logits);
  TORCH_CHECK_VALUE(logits.dim() >= 2, "logits has shape ", logits.sym_sizes(),
                    ", expected a batch dimension and one of outcomes at least");
  TORCH_CHECK_VALUE(dim >= 0 && dim < logits.dim(), "dim is ", dim,
                    ", expected a dimension of logits, of shape ", logits.sym_sizes());
  TORCH_CHECK_VALUE(batch_dims >= 1 && batch_dims < logits.dim(), "batch_dims is ", batch_dims,
                    ", expected how many of the other dimensions of logits index samples, 1 to ",
                    logits.dim() - 1);
  TORCH_CHECK_VALUE(dim >= batch_dims, "dim is ", dim, ", one of the ", batch_dims,
                    " that index samples, expected one after them");
  TORCH_CHECK_VALUE(logits.sym_size(dim) != 0, "logits has shape ", logits.sym_sizes(),
                    ", expected at least one outcome along dim ", dim);
  if (prior_logits.defined()) check_broadcasts("prior_logits", prior_logits, "logits", logits);
}

Forward CategoricalKl::allocate(Needs needs) const {
  Forward out{{empty_kl(groups_of(*this), reduction, dtype(), batch_dims)}, {}};
  if (writes_unit_gradients(operands(*this), logits, reduction, batch_dims, needs))
    out.saved = defined_of(empty_gradients(operands(*this), needs));
  return out;
}

Forward CategoricalKl::forward(Needs needs) const {
  Forward out = allocate(needs);
  CategoricalArgs args = args_of(*this);
  Tensor partial;
  if (reduction == Reduction::none)
    args.kl = view_of(out.outputs[0], groups_of(*this), false);
  else
    partial = set_sums(args, out.outputs[0], reduction);
  if (out.saved.empty()) {
    FGBG_RUN(categorical_forward, args, dtype() == at::kDouble, logits);
    return out;
  }
  args.grad_kl.factor = args.final_reductions[0].factor;
  run_backward(args, *this, by_operand(out.saved, needs, kOperands));
  return out;
}

variable_list CategoricalKl::backward(const variable_list& grads, const Tensor&, Needs needs, bool) const {
  CategoricalArgs args = args_of(*this);
  Tensor upstream;
  if (reduction == Reduction::none)
    args.grad_kl_elements = view_of(grads[0], groups_of(*this), false);
  else
    upstream = set_upstream(args, args.grad_kl, grads[0], reduction);
  variable_list out = empty_gradients(operands(*this), needs);
  run_backward(args, *this, out);
  return out;
}

}  // namespace fgbg::ops
