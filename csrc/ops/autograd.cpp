// First derivatives: each op on the Autograd key saves its inputs and calls its _backward op. The
// _backward ops get their own derivatives in _ops.py, from the executable specification in reference.py,
// so the second-order formulas are not written again here.
#include "autograd.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

namespace fgbg::ops {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

bool wants_grad(const OptionalTensor& t) { return t.has_value() && t->requires_grad(); }
bool any_wants_grad(std::initializer_list<OptionalTensor> tensors) {
  return at::GradMode::is_enabled() && std::any_of(tensors.begin(), tensors.end(), wants_grad);
}

OptionalTensor optional(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }
Tensor undefined_unless(bool needed, const Tensor& t) { return needed ? t : Tensor(); }

// Calls a _backward op. Only create_graph=True needs its own autograd formula, which is in Python and
// slow to reach; otherwise the Autograd key is skipped.
template <class Op, class... Args>
auto call_backward(const Op& op, Args&&... args) {
  if (at::GradMode::is_enabled()) return op.call(std::forward<Args>(args)...);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Args>(args)...);
}

template <size_t N>
std::array<bool, N> needs_of(const OptionalTensor (&tensors)[N]) {
  std::array<bool, N> needs;
  std::transform(std::begin(tensors), std::end(tensors), needs.begin(), wants_grad);
  return needs;
}

template <size_t N>
void save_needs(AutogradContext* ctx, const std::array<bool, N>& needs) {
  int64_t bits = 0;
  for (size_t i = 0; i < N; ++i) bits |= static_cast<int64_t>(needs[i]) << i;
  ctx->saved_data["needs"] = bits;
}

template <size_t N>
std::array<bool, N> saved_needs(AutogradContext* ctx) {
  const int64_t bits = ctx->saved_data["needs"].toInt();
  std::array<bool, N> needs;
  for (size_t i = 0; i < N; ++i) needs[i] = (bits >> i & 1) != 0;
  return needs;
}

void save_draw(AutogradContext* ctx, const c10::SymInt& offset, const OptionalSymInt& samples) {
  ctx->saved_data["offset"] = offset;
  ctx->saved_data["samples"] = samples ? c10::IValue(*samples) : c10::IValue();
}
c10::SymInt saved_offset(AutogradContext* ctx) { return ctx->saved_data["offset"].toSymInt(); }
OptionalSymInt saved_samples(AutogradContext* ctx) {
  const auto& value = ctx->saved_data["samples"];
  return value.isNone() ? OptionalSymInt() : OptionalSymInt(value.toSymInt());
}

struct Reparameterize : Function<Reparameterize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                        const c10::SymInt& offset, const OptionalSymInt& samples) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({mu, logvar, seed});
    save_draw(ctx, offset, samples);
    save_needs(ctx, needs_of<2>({mu, logvar}));
    return reparameterize_op().call(mu, logvar, seed, offset, samples);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<2>(ctx);
    const auto [d_mu, d_logvar] = call_backward(reparameterize_backward_op(), grads[0], saved[0], saved[1],
                                                saved[2], saved_offset(ctx), saved_samples(ctx), needs);
    return {undefined_unless(needs[0], d_mu), undefined_unless(needs[1], d_logvar), {}, {}, {}};
  }
};

Tensor reparameterize(const Tensor& mu, const Tensor& logvar, const Tensor& seed, c10::SymInt offset,
                      OptionalSymInt samples) {
  if (any_wants_grad({mu, logvar})) return Reparameterize::apply(mu, logvar, seed, offset, samples);
  at::AutoDispatchBelowADInplaceOrView guard;
  return reparameterize_op().call(mu, logvar, seed, offset, samples);
}

struct GaussianKl : Function<GaussianKl> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                        const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                        const std::string& reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({mu, logvar, prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor())});
    ctx->saved_data["reduction"] = reduction;
    save_needs(ctx, needs_of<4>({mu, logvar, prior_mu, prior_logvar}));
    return gaussian_kl_op().call(mu, logvar, prior_mu, prior_logvar, reduction);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<4>(ctx);
    const auto [d_mu, d_logvar, d_prior_mu, d_prior_logvar] =
        call_backward(gaussian_kl_backward_op(), grads[0], saved[0], saved[1], optional(saved[2]),
                      optional(saved[3]), ctx->saved_data["reduction"].toStringView(), needs);
    return {undefined_unless(needs[0], d_mu),
            undefined_unless(needs[1], d_logvar),
            undefined_unless(needs[2], d_prior_mu),
            undefined_unless(needs[3], d_prior_logvar),
            {}};
  }
};

Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                   const OptionalTensor& prior_logvar, string_view reduction) {
  if (any_wants_grad({mu, logvar, prior_mu, prior_logvar}))
    return GaussianKl::apply(mu, logvar, prior_mu, prior_logvar, std::string(reduction));
  at::AutoDispatchBelowADInplaceOrView guard;
  return gaussian_kl_op().call(mu, logvar, prior_mu, prior_logvar, reduction);
}

struct SampleGaussian : Function<SampleGaussian> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                               const Tensor& seed, const c10::SymInt& offset, const OptionalSymInt& samples,
                               const std::string& reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({mu, logvar, prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor()), seed});
    ctx->set_materialize_grads(false);
    ctx->saved_data["reduction"] = reduction;
    save_draw(ctx, offset, samples);
    save_needs(ctx, needs_of<4>({mu, logvar, prior_mu, prior_logvar}));
    const auto [z, kl] =
        sample_gaussian_op().call(mu, logvar, prior_mu, prior_logvar, seed, offset, samples, reduction);
    return {z, kl};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<4>(ctx);
    const auto [d_mu, d_logvar, d_prior_mu, d_prior_logvar] =
        call_backward(sample_gaussian_backward_op(), optional(grads[0]), optional(grads[1]), saved[0],
                      saved[1], optional(saved[2]), optional(saved[3]), saved[4], saved_offset(ctx),
                      saved_samples(ctx), ctx->saved_data["reduction"].toStringView(), needs);
    return {undefined_unless(needs[0], d_mu),
            undefined_unless(needs[1], d_logvar),
            undefined_unless(needs[2], d_prior_mu),
            undefined_unless(needs[3], d_prior_logvar),
            {},
            {},
            {},
            {}};
  }
};

std::tuple<Tensor, Tensor> sample_gaussian(const Tensor& mu, const Tensor& logvar,
                                           const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                           const Tensor& seed, c10::SymInt offset, OptionalSymInt samples,
                                           string_view reduction) {
  if (any_wants_grad({mu, logvar, prior_mu, prior_logvar})) {
    const auto out = SampleGaussian::apply(mu, logvar, prior_mu, prior_logvar, seed, offset, samples,
                                           std::string(reduction));
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return sample_gaussian_op().call(mu, logvar, prior_mu, prior_logvar, seed, offset, samples, reduction);
}

struct BernoulliKl : Function<BernoulliKl> {
  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const OptionalTensor& prior,
                        double prior_logit, const std::string& reduction) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->save_for_backward({logits, prior.value_or(Tensor())});
    ctx->saved_data["prior_logit"] = prior_logit;
    ctx->saved_data["reduction"] = reduction;
    save_needs(ctx, needs_of<2>({logits, prior}));
    return bernoulli_kl_op().call(logits, prior, prior_logit, reduction);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<2>(ctx);
    const auto [d_logits, d_prior] = call_backward(
        bernoulli_kl_backward_op(), grads[0], saved[0], optional(saved[1]),
        ctx->saved_data["prior_logit"].toDouble(), ctx->saved_data["reduction"].toStringView(), needs);
    return {undefined_unless(needs[0], d_logits), undefined_unless(needs[1], d_prior), {}, {}};
  }
};

Tensor bernoulli_kl(const Tensor& logits, const OptionalTensor& prior, double prior_logit,
                    string_view reduction) {
  if (any_wants_grad({logits, prior}))
    return BernoulliKl::apply(logits, prior, prior_logit, std::string(reduction));
  at::AutoDispatchBelowADInplaceOrView guard;
  return bernoulli_kl_op().call(logits, prior, prior_logit, reduction);
}

struct ReconstructionLoss : Function<ReconstructionLoss> {
  static variable_list forward(AutogradContext* ctx, const Tensor& fg, const OptionalTensor& bg,
                               const Tensor& target, const Tensor& mask, const OptionalTensor& fg_scale,
                               const OptionalTensor& bg_scale, double fg_scale_value, double bg_scale_value,
                               const std::string& composition, bool mask_is_logits,
                               const std::string& likelihood, double fg_weight, double bg_weight,
                               bool normalize_area, const std::string& reduction, bool return_terms) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [loss, terms] = reconstruction_loss_op().call(
        fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value, bg_scale_value, composition, mask_is_logits,
        likelihood, fg_weight, bg_weight, normalize_area, reduction, return_terms);
    ctx->save_for_backward({fg, bg.value_or(Tensor()), target, mask, fg_scale.value_or(Tensor()),
                            bg_scale.value_or(Tensor()), normalize_area ? terms : Tensor()});
    ctx->set_materialize_grads(false);
    if (!return_terms) ctx->mark_non_differentiable({terms});
    auto& data = ctx->saved_data;
    data["fg_scale_value"] = fg_scale_value;
    data["bg_scale_value"] = bg_scale_value;
    data["composition"] = composition;
    data["mask_is_logits"] = mask_is_logits;
    data["likelihood"] = likelihood;
    data["fg_weight"] = fg_weight;
    data["bg_weight"] = bg_weight;
    data["normalize_area"] = normalize_area;
    data["reduction"] = reduction;
    save_needs(ctx, needs_of<6>({fg, bg, target, mask, fg_scale, bg_scale}));
    return {loss, terms};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto needs = saved_needs<6>(ctx);
    auto& data = ctx->saved_data;
    const auto [d_fg, d_bg, d_target, d_mask, d_fg_scale, d_bg_scale] = call_backward(
        reconstruction_loss_backward_op(), optional(grads[0]), optional(grads[1]), optional(s[6]), s[0],
        optional(s[1]), s[2], s[3], optional(s[4]), optional(s[5]), data["fg_scale_value"].toDouble(),
        data["bg_scale_value"].toDouble(), data["composition"].toStringView(),
        data["mask_is_logits"].toBool(), data["likelihood"].toStringView(), data["fg_weight"].toDouble(),
        data["bg_weight"].toDouble(), data["normalize_area"].toBool(), data["reduction"].toStringView(),
        needs);
    variable_list out(16);
    out[0] = undefined_unless(needs[0], d_fg);
    out[1] = undefined_unless(needs[1], d_bg);
    out[2] = undefined_unless(needs[2], d_target);
    out[3] = undefined_unless(needs[3], d_mask);
    out[4] = undefined_unless(needs[4], d_fg_scale);
    out[5] = undefined_unless(needs[5], d_bg_scale);
    return out;
  }
};

std::tuple<Tensor, Tensor> reconstruction_loss(
    const Tensor& fg, const OptionalTensor& bg, const Tensor& target, const Tensor& mask,
    const OptionalTensor& fg_scale, const OptionalTensor& bg_scale, double fg_scale_value,
    double bg_scale_value, string_view composition, bool mask_is_logits, string_view likelihood,
    double fg_weight, double bg_weight, bool normalize_area, string_view reduction, bool return_terms) {
  if (any_wants_grad({fg, bg, target, mask, fg_scale, bg_scale})) {
    const auto out =
        ReconstructionLoss::apply(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value, bg_scale_value,
                                  std::string(composition), mask_is_logits, std::string(likelihood),
                                  fg_weight, bg_weight, normalize_area, std::string(reduction), return_terms);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return reconstruction_loss_op().call(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value,
                                       bg_scale_value, composition, mask_is_logits, likelihood, fg_weight,
                                       bg_weight, normalize_area, reduction, return_terms);
}

}  // namespace

TORCH_LIBRARY_IMPL(fgbg, Autograd, m) {
  m.impl("reparameterize", reparameterize);
  m.impl("gaussian_kl", gaussian_kl);
  m.impl("sample_gaussian", sample_gaussian);
  m.impl("bernoulli_kl", bernoulli_kl);
  m.impl("reconstruction_loss", reconstruction_loss);
}

}  // namespace fgbg::ops
