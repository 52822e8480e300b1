#include "gaussian.h"

#include "kl.h"

namespace fgbg::ops {
namespace {

// Where draws are stacked, the view of one of them; they are dense and follow each other.
View draws_view(const Tensor& z, const Tensor& mu, bool stacked) {
  return view_of(stacked ? z.select(0, 0) : z, mu, false);
}

GaussianArgs args_of(const Gaussian& g) {
  GaussianArgs args{};
  args.shape = latent_shape(g.mu);
  args.mu = view_of(g.mu, g.mu, false);
  args.logvar = view_of(g.logvar, g.mu, false);
  args.prior_mu = view_of(g.prior_mu, g.mu, false);
  args.prior_logvar = view_of(g.prior_logvar, g.mu, false);
  return args;
}

void set_noise(GaussianArgs& args, const Gaussian& g) {
  args.noise = noise_of(g.seed, g.offset.expect_int());
  args.samples = g.num_samples ? g.num_samples->expect_int() : 1;
}

void run_backward(GaussianArgs& args, const Gaussian& g, const variable_list& to) {
  args.grad_mu = view_of(to[0], g.mu, false);
  args.grad_logvar = view_of(to[1], g.mu, false);
  args.grad_prior_mu = view_of(to[2], g.mu, false);
  args.grad_prior_logvar = view_of(to[3], g.mu, false);
  FGBG_RUN(gaussian_backward, args, g.dtype() == at::kDouble, g.mu);
}

variable_list operands(const Gaussian& g) { return {g.mu, g.logvar, g.prior_mu, g.prior_logvar}; }

// Only the KL, reduced: its kernel can write the gradients for an upstream gradient of one as well.
bool writes_gradients(const Gaussian& g, bool draws, Needs needs) {
  return !draws && g.reduction != Reduction::none && may_write_unit_gradients(operands(g), needs);
}

}  // namespace

void Gaussian::check_latents() const {
  check_float("mu", mu);
  check_like("logvar", logvar, "mu", mu);
  if (prior_mu.defined()) check_like("prior_mu", prior_mu, "mu", mu);
  if (prior_logvar.defined()) check_like("prior_logvar", prior_logvar, "mu", mu);
  TORCH_CHECK_VALUE(mu.dim() >= 1, "mu has shape [], expected [B, *D]");
}

void Gaussian::check_draw() const {
  check_seed(seed, mu);
  check_at_least("offset", offset, 0);
  if (num_samples) check_at_least("num_samples", *num_samples, 1);
}

Needs Gaussian::keep_slope(Needs needs) const {
  return !num_samples && needs_operand(needs, 1) && !mu.is_cuda() && logvar.scalar_type() == dtype()
             ? kKeepSlope
             : 0;
}

Forward Gaussian::results(bool draws, bool sums, Needs needs) const {
  Forward out;
  if (draws) {
    const auto options = mu.options().dtype(at::promote_types(mu.scalar_type(), logvar.scalar_type()));
    if (num_samples) {
      auto sizes = mu.sym_sizes().vec();
      sizes.insert(sizes.begin(), *num_samples);
      out.outputs.push_back(empty_result(sizes, options));
    } else {
      out.outputs.push_back(empty_result_like(mu, options));
    }
    if (needs & kKeepSlope) out.saved.push_back(empty_result_like(logvar, logvar.options()));
  }
  if (sums) out.outputs.push_back(empty_kl(mu, reduction, dtype()));
  if (writes_gradients(*this, draws, needs)) out.saved = defined_of(empty_gradients(operands(*this), needs));
  return out;
}

Forward Gaussian::run(bool draws, bool sums, Needs needs) const {
  Forward out = results(draws, sums, needs);
  GaussianArgs args = args_of(*this);
  Tensor partial;
  if (sums) partial = set_kl(args, out.outputs.back(), mu, reduction);
  if (writes_gradients(*this, draws, needs)) {
    args.grad_kl.factor = reduction_factor(reduction, mu.size(0), mu.numel());
    run_backward(args, *this, by_operand(out.saved, needs, 4));
    return out;
  }
  if (draws) {
    set_noise(args, *this);
    args.z = draws_view(out.outputs[0], mu, num_samples.has_value());
    if (!out.saved.empty()) args.dz_dlogvar = view_of(out.saved[0], mu, false);
  }
  FGBG_RUN(gaussian_forward, args, dtype() == at::kDouble, mu);
  return out;
}

variable_list Gaussian::gradients(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& dz_dlogvar,
                                  Needs needs, bool overwrite) const {
  GaussianArgs args = args_of(*this);
  const bool kept = dz_dlogvar.defined() && grad_z.defined();
  Tensor dense;
  if (grad_z.defined()) {
    set_noise(args, *this);
    dense = num_samples ? grad_z.contiguous() : grad_z;
    args.grad_z = draws_view(dense, mu, num_samples.has_value());
    if (kept) args.dz_dlogvar = view_of(dz_dlogvar, mu, false);
  }
  if (grad_kl.defined()) set_kl_gradient(args, grad_kl, mu, reduction);
  const bool in_place = kept && overwrite;
  variable_list out = empty_gradients(operands(*this), in_place ? needs & ~Needs{2} : needs);
  if (in_place) out[1] = dz_dlogvar;  // which the gradient of logvar replaces
  run_backward(args, *this, out);
  return out;
}

// dz/dmu = 1: what arrives at one draw is the gradient of mu, as from torch's own addition.
Needs Reparameterize::reuse(const variable_list& grads, const variable_list& saved, Needs needs,
                            bool overwrite, variable_list& out) const {
  const Tensor& grad = grads[0];
  if (num_samples || grad.scalar_type() != mu.scalar_type()) return needs;
  if (needs_operand(needs, 0)) out[0] = grad;
  if (!needs_operand(needs, 1)) return 0;
  if (saved.empty()) return 2;
  // Under a transform what is kept cannot hold the product.
  out[1] = overwrite ? saved[0].mul_(grad) : saved[0] * grad;
  return 0;
}

}  // namespace fgbg::ops
