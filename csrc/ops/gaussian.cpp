#include "gaussian.h"

#include "kl.h"

namespace fgbg::ops {
namespace {

// Where draws are stacked, the view of one of them; they are dense and follow each other.
View draws_view(const Tensor& z, const Tensor& mu, bool stacked) {
  return view_of(stacked ? z.select(0, 0) : z, mu, false);
}

bool is_standard(const Gaussian& g) {
  const double spread = g.prior_spread.value;
  return !g.prior_mu.tensor.defined() && !g.prior_spread.tensor.defined() && g.prior_mu.value == 0.0 &&
         (spread == 0.0 || (spread == 1.0 && g.parameterization == Parameterization::std));
}

GaussianArgs args_of(const Gaussian& g) {
  GaussianArgs args{};
  args.shape = latent_shape(g.mu, g.batch_dims);
  args.parameterization = g.parameterization;
  args.mu = view_of(g.mu, g.mu, false);
  args.spread = view_of(g.spread, g.mu, false);
  args.standard = is_standard(g);
  args.prior_mu = broadcast_view(g.prior_mu, g.mu);
  args.prior_spread = broadcast_view(g.prior_spread, g.mu);
  const bool absent = !g.prior_spread.tensor.defined() && g.prior_spread.value == g.prior_spread.absent;
  if (absent && g.parameterization == Parameterization::std) args.prior_spread.number.value = 1.0;
  return args;
}

void set_noise(GaussianArgs& args, const Gaussian& g) {
  args.noise = noise_of(g.seed, g.offset.expect_int());
  args.samples = g.num_samples ? g.num_samples->expect_int() : 1;
}

void run_backward(GaussianArgs& args, const Gaussian& g, const variable_list& to) {
  const BroadcastGradients gradients(to, g.mu, g.dtype(), false);
  args.grad_mu = view_of(gradients[0], g.mu, false);
  args.grad_spread = view_of(gradients[1], g.mu, false);
  args.grad_prior_mu = view_of(gradients[2], g.mu, false);
  args.grad_prior_spread = view_of(gradients[3], g.mu, false);
  FGBG_RUN(gaussian_backward, args, g.dtype() == at::kDouble, g.mu);
  gradients.sum();
}

variable_list operands(const Gaussian& g) {
  return {g.mu, g.spread, g.prior_mu.tensor, g.prior_spread.tensor};
}

// Only the KL, reduced: its kernel can write the gradients for an upstream gradient of one as well.
bool writes_gradients(const Gaussian& g, bool draws, Needs needs) {
  return !draws && writes_unit_gradients(operands(g), g.mu, g.reduction, g.batch_dims, needs);
}

}  // namespace

void Gaussian::check_latents() const {
  check_float("mu", mu);
  check_like("logvar", spread, "mu", mu);
  TORCH_CHECK_VALUE(mu.dim() >= 1, "mu has shape [], expected [B, *D]");
  check_batch_dims(batch_dims, "mu", mu);
  if (prior_mu.tensor.defined()) check_broadcasts("prior_mu", prior_mu.tensor, "mu", mu);
  if (prior_spread.tensor.defined()) check_broadcasts("prior_logvar", prior_spread.tensor, "mu", mu);
}

void Gaussian::check_draw() const {
  check_seed(seed, mu);
  check_at_least("offset", offset, 0);
  if (num_samples) check_at_least("num_samples", *num_samples, 1);
}

Needs Gaussian::keep_slope(Needs needs) const {
  return !num_samples && needs_operand(needs, 1) && !mu.is_cuda() && spread.scalar_type() == dtype()
             ? kKeepSlope
             : 0;
}

Forward Gaussian::results(bool draws, bool sums, Needs needs) const {
  Forward out;
  if (draws) {
    const auto options = mu.options().dtype(c10::promoteTypes(mu.scalar_type(), spread.scalar_type()));
    if (num_samples) {
      auto sizes = mu.sym_sizes().vec();
      sizes.insert(sizes.begin(), *num_samples);
      out.outputs.push_back(empty_result(sizes, options));
    } else {
      out.outputs.push_back(empty_result_like(mu, options));
    }
    if (needs & kKeepSlope) out.saved.push_back(empty_result_like(spread, spread.options()));
  }
  if (sums) out.outputs.push_back(empty_kl(mu, reduction, dtype(), batch_dims));
  if (writes_gradients(*this, draws, needs)) out.saved = defined_of(empty_gradients(operands(*this), needs));
  return out;
}

Forward Gaussian::run(bool draws, bool sums, Needs needs) const {
  Forward out = results(draws, sums, needs);
  GaussianArgs args = args_of(*this);
  Tensor partial;
  if (sums) {
    const Tensor& kl = out.outputs.back();
    if (reduction == Reduction::none)
      args.kl = view_of(kl, mu, false);
    else
      partial = set_sums(args, kl, reduction);
  }
  if (writes_gradients(*this, draws, needs)) {
    args.grad_kl.factor = args.final_reductions[0].factor;
    run_backward(args, *this, by_operand(out.saved, needs, 4));
    return out;
  }
  if (draws) {
    set_noise(args, *this);
    args.z = draws_view(out.outputs[0], mu, num_samples.has_value());
    if (!out.saved.empty()) args.dz_dspread = view_of(out.saved[0], mu, false);
  }
  FGBG_RUN(gaussian_forward, args, dtype() == at::kDouble, mu);
  return out;
}

variable_list Gaussian::gradients(const Tensor& grad_z, const Tensor& grad_kl, const Tensor& dz_dspread,
                                  Needs needs, bool overwrite) const {
  GaussianArgs args = args_of(*this);
  const bool kept = dz_dspread.defined() && grad_z.defined();
  Tensor dense, upstream;
  if (grad_z.defined()) {
    set_noise(args, *this);
    dense = num_samples ? grad_z.contiguous() : grad_z;
    args.grad_z = draws_view(dense, mu, num_samples.has_value());
    if (kept) args.dz_dspread = view_of(dz_dspread, mu, false);
  }
  if (grad_kl.defined()) {
    if (reduction == Reduction::none)
      args.grad_kl_elements = view_of(grad_kl, mu, false);
    else
      upstream = set_upstream(args, args.grad_kl, grad_kl, reduction);
  }
  const bool in_place = kept && overwrite;
  variable_list out = empty_gradients(operands(*this), in_place ? needs & ~Needs{2} : needs);
  if (in_place) out[1] = dz_dspread;  // which the gradient of the spread replaces
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
  out[1] = overwrite ? saved[0].mul_(grad) : saved[0].mul(grad);
  return 0;
}

}  // namespace fgbg::ops
