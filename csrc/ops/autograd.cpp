// First derivatives: each op on the Autograd key saves its inputs and calls its _backward op. The
// _backward ops get their own derivatives in _ops.py, from the executable specification in reference.py,
// so the second-order formulas are not written again here.
//
// Reduced losses have a faster way, which the eager entries take: their forward pass writes the gradients for
// an upstream gradient of one, and these are saved too. A backward pass that frees the graph hands them over,
// after bringing them up to the gradient that arrived if that is not one. One that keeps the graph, for more
// passes to come or for second derivatives, computes its own, as the saved ones can be given away only once.
// Losses that the program scales are better off with the plain way: see Habit.
//
// A sample on the CPU, where noise costs more to make than to keep, has such a way as well: its forward pass
// writes dz/dlogvar, which the backward pass that frees the graph turns into the gradient in place.
#include "autograd.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include <atomic>

#include "common.h"

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

// Calls a _backward op. Only create_graph=True needs its own autograd formula, which is in Python and
// slow to reach; otherwise the Autograd key is skipped.
template <class Op, class... Args>
auto call_backward(const Op& op, Args&&... args) {
  if (at::GradMode::is_enabled()) return op.call(std::forward<Args>(args)...);
  at::AutoDispatchBelowADInplaceOrView guard;
  return op.call(std::forward<Args>(args)...);
}

// Whether the fused forward pass may be used: not under tracing, which records the ops, nor for subclasses.
bool plain(std::initializer_list<OptionalTensor> tensors) {
  return !c10::impl::dispatch_mode_enabled() &&
         std::none_of(tensors.begin(), tensors.end(),
                      [](const auto& t) { return t.has_value() && at::isTensorSubclassLike(*t); });
}

// Whether the gradient that arrived last at a loss of one kind was one. A program that scales its loss does
// so at every step, and then the gradients are better computed in backward, when the scale is known. Speed
// alone depends on it: either way gives the same numbers. (On a GPU one is assumed.)
class Habit {
 public:
  bool one() const { return one_.load(std::memory_order_relaxed); }
  void note(const Tensor& grad) {
    if (grad.defined() && grad.is_cpu() && plain({grad}))
      one_.store(all_ones(grad), std::memory_order_relaxed);
  }

 private:
  std::atomic<bool> one_{true};
};

// The gradients of the forward pass, those needed, behind `inputs` other saved tensors; none if they must
// not be used.
variable_list saved_gradients(const variable_list& saved, size_t inputs) {
  if (saved.size() == inputs || at::GradMode::is_enabled() ||
      torch::autograd::get_current_graph_task_keep_graph())
    return {};
  return {saved.begin() + static_cast<std::ptrdiff_t>(inputs), saved.end()};
}

template <size_t N>
std::array<bool, N> needs_of(const OptionalTensor (&tensors)[N]) {
  std::array<bool, N> needs;
  std::transform(std::begin(tensors), std::end(tensors), needs.begin(), wants_grad);
  return needs;
}

// What backward returns, one entry for each argument of forward, from gradients of which only those needed
// count, or which only they are in.
template <size_t N>
variable_list for_arguments(const variable_list& gradients, const std::array<bool, N>& needs,
                            size_t arguments) {
  variable_list out(arguments);
  for (size_t i = 0, next = 0; i < N; ++i)
    if (needs[i]) out[i] = gradients[gradients.size() == N ? i : next++];
  return out;
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

// Whether the forward pass may keep dz/dlogvar: of one draw, and exactly, in logvar's own type.
bool may_keep_gradient(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                       const OptionalTensor& prior_logvar, const OptionalSymInt& samples) {
  return !samples && at::GradMode::is_enabled() && logvar.requires_grad() &&
         logvar.scalar_type() == compute_dtype({mu, logvar, prior_mu, prior_logvar}) &&
         plain({mu, logvar, prior_mu, prior_logvar});
}

struct Reparameterize : Function<Reparameterize> {
  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar, const Tensor& seed,
                        const c10::SymInt& offset, const OptionalSymInt& samples, bool keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    save_draw(ctx, offset, samples);
    save_needs(ctx, needs_of<2>({mu, logvar}));
    variable_list saved{mu, logvar, seed};
    if (keep) {
      const auto [z, dz_dlogvar] = reparameterize_with_gradient_op().call(mu, logvar, seed, offset);
      if (dz_dlogvar.numel() > 0) saved.push_back(dz_dlogvar);
      ctx->save_for_backward(std::move(saved));
      return z;
    }
    ctx->save_for_backward(std::move(saved));
    return reparameterize_op().call(mu, logvar, seed, offset, samples);
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto samples = saved_samples(ctx);
    auto needs = saved_needs<2>(ctx);
    variable_list out(6);
    // dz/dmu = 1: what arrives at one draw goes on to mu as it is, as from torch's own addition.
    if (needs[0] && !samples && grads[0].scalar_type() == saved[0].scalar_type()) {
      out[0] = grads[0];
      needs[0] = false;
    }
    if (const auto kept = saved_gradients(saved, 3); !kept.empty() && !needs[0]) {
      at::AutoDispatchBelowADInplaceOrView guard;
      out[1] = kept[0].mul_(grads[0]);
      return out;
    }
    if (needs[0] || needs[1]) {
      const auto [d_mu, d_logvar] = call_backward(reparameterize_backward_op(), grads[0], saved[0], saved[1],
                                                  saved[2], saved_offset(ctx), samples, needs);
      if (needs[0]) out[0] = d_mu;
      if (needs[1]) out[1] = d_logvar;
    }
    return out;
  }
};

Tensor reparameterize(const Tensor& mu, const Tensor& logvar, const Tensor& seed, c10::SymInt offset,
                      OptionalSymInt samples) {
  if (any_wants_grad({mu, logvar})) return Reparameterize::apply(mu, logvar, seed, offset, samples, false);
  at::AutoDispatchBelowADInplaceOrView guard;
  return reparameterize_op().call(mu, logvar, seed, offset, samples);
}

struct GaussianKl : Function<GaussianKl> {
  inline static Habit habit;

  static Tensor forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                        const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                        const std::string& reduction, bool fused) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{mu, logvar, prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor())};
    const auto needs = needs_of<4>({mu, logvar, prior_mu, prior_logvar});
    ctx->saved_data["reduction"] = reduction;
    save_needs(ctx, needs);
    Tensor kl;
    if (fused) {
      variable_list gradients;
      std::tie(kl, gradients) =
          gaussian_kl_with_gradients_op().call(mu, logvar, prior_mu, prior_logvar, reduction, needs);
      saved.insert(saved.end(), gradients.begin(), gradients.end());
    } else {
      kl = gaussian_kl_op().call(mu, logvar, prior_mu, prior_logvar, reduction);
    }
    ctx->save_for_backward(std::move(saved));
    return kl;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<4>(ctx);
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    if (reduction != "none") habit.note(grads[0]);
    variable_list out = saved_gradients(saved, 4);
    if (!out.empty()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      gaussian_kl_backward__op().call(out, grads[0], saved[0], saved[1], optional(saved[2]),
                                      optional(saved[3]), reduction, needs);
    } else {
      const auto [d_mu, d_logvar, d_prior_mu, d_prior_logvar] =
          call_backward(gaussian_kl_backward_op(), grads[0], saved[0], saved[1], optional(saved[2]),
                        optional(saved[3]), reduction, needs);
      out = {d_mu, d_logvar, d_prior_mu, d_prior_logvar};
    }
    return for_arguments(out, needs, 6);
  }
};

Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                   const OptionalTensor& prior_logvar, string_view reduction) {
  if (any_wants_grad({mu, logvar, prior_mu, prior_logvar}))
    return GaussianKl::apply(mu, logvar, prior_mu, prior_logvar, std::string(reduction), false);
  at::AutoDispatchBelowADInplaceOrView guard;
  return gaussian_kl_op().call(mu, logvar, prior_mu, prior_logvar, reduction);
}

struct SampleGaussian : Function<SampleGaussian> {
  static variable_list forward(AutogradContext* ctx, const Tensor& mu, const Tensor& logvar,
                               const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                               const Tensor& seed, const c10::SymInt& offset, const OptionalSymInt& samples,
                               const std::string& reduction, bool keep) {
    at::AutoDispatchBelowADInplaceOrView guard;
    ctx->set_materialize_grads(false);
    ctx->saved_data["reduction"] = reduction;
    save_draw(ctx, offset, samples);
    save_needs(ctx, needs_of<4>({mu, logvar, prior_mu, prior_logvar}));
    variable_list saved{mu, logvar, prior_mu.value_or(Tensor()), prior_logvar.value_or(Tensor()), seed};
    Tensor z, kl, dz_dlogvar;
    if (keep) {
      std::tie(z, kl, dz_dlogvar) = sample_gaussian_with_gradient_op().call(
          mu, logvar, prior_mu, prior_logvar, seed, offset, reduction);
      if (dz_dlogvar.numel() > 0) saved.push_back(dz_dlogvar);
    } else {
      std::tie(z, kl) =
          sample_gaussian_op().call(mu, logvar, prior_mu, prior_logvar, seed, offset, samples, reduction);
    }
    ctx->save_for_backward(std::move(saved));
    return {z, kl};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<4>(ctx);
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    variable_list out(4);
    if (const auto kept = saved_gradients(saved, 5); !kept.empty() && grads[0].defined()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      out[1] = kept[0];
      std::tie(out[0], out[2], out[3]) =
          sample_gaussian_backward__op().call(out[1], grads[0], optional(grads[1]), saved[0], saved[1],
                                              optional(saved[2]), optional(saved[3]), reduction, needs);
    } else {
      std::tie(out[0], out[1], out[2], out[3]) =
          call_backward(sample_gaussian_backward_op(), optional(grads[0]), optional(grads[1]), saved[0],
                        saved[1], optional(saved[2]), optional(saved[3]), saved[4], saved_offset(ctx),
                        saved_samples(ctx), reduction, needs);
    }
    return for_arguments(out, needs, 9);
  }
};

std::tuple<Tensor, Tensor> sample_gaussian(const Tensor& mu, const Tensor& logvar,
                                           const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                           const Tensor& seed, c10::SymInt offset, OptionalSymInt samples,
                                           string_view reduction) {
  if (any_wants_grad({mu, logvar, prior_mu, prior_logvar})) {
    const auto out = SampleGaussian::apply(mu, logvar, prior_mu, prior_logvar, seed, offset, samples,
                                           std::string(reduction), false);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return sample_gaussian_op().call(mu, logvar, prior_mu, prior_logvar, seed, offset, samples, reduction);
}

struct BernoulliKl : Function<BernoulliKl> {
  inline static Habit habit;

  static Tensor forward(AutogradContext* ctx, const Tensor& logits, const OptionalTensor& prior,
                        double prior_logit, const std::string& reduction, bool fused) {
    at::AutoDispatchBelowADInplaceOrView guard;
    variable_list saved{logits, prior.value_or(Tensor())};
    const auto needs = needs_of<2>({logits, prior});
    ctx->saved_data["prior_logit"] = prior_logit;
    ctx->saved_data["reduction"] = reduction;
    save_needs(ctx, needs);
    Tensor kl;
    if (fused) {
      variable_list gradients;
      std::tie(kl, gradients) =
          bernoulli_kl_with_gradients_op().call(logits, prior, prior_logit, reduction, needs);
      saved.insert(saved.end(), gradients.begin(), gradients.end());
    } else {
      kl = bernoulli_kl_op().call(logits, prior, prior_logit, reduction);
    }
    ctx->save_for_backward(std::move(saved));
    return kl;
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto needs = saved_needs<2>(ctx);
    const double prior_logit = ctx->saved_data["prior_logit"].toDouble();
    const auto reduction = ctx->saved_data["reduction"].toStringView();
    if (reduction != "none") habit.note(grads[0]);
    variable_list out = saved_gradients(saved, 2);
    if (!out.empty()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      bernoulli_kl_backward__op().call(out, grads[0], saved[0], optional(saved[1]), prior_logit, reduction,
                                       needs);
    } else {
      const auto [d_logits, d_prior] = call_backward(bernoulli_kl_backward_op(), grads[0], saved[0],
                                                     optional(saved[1]), prior_logit, reduction, needs);
      out = {d_logits, d_prior};
    }
    return for_arguments(out, needs, 5);
  }
};

Tensor bernoulli_kl(const Tensor& logits, const OptionalTensor& prior, double prior_logit,
                    string_view reduction) {
  if (any_wants_grad({logits, prior}))
    return BernoulliKl::apply(logits, prior, prior_logit, std::string(reduction), false);
  at::AutoDispatchBelowADInplaceOrView guard;
  return bernoulli_kl_op().call(logits, prior, prior_logit, reduction);
}

struct ReconstructionLoss : Function<ReconstructionLoss> {
  inline static Habit habit;

  // Outputs: the loss and, unless it is fused and has none, the terms.
  static variable_list forward(AutogradContext* ctx, const Tensor& fg, const OptionalTensor& bg,
                               const Tensor& target, const Tensor& mask, const OptionalTensor& fg_scale,
                               const OptionalTensor& bg_scale, double fg_scale_value, double bg_scale_value,
                               const std::string& composition, bool mask_is_logits,
                               const std::string& likelihood, double fg_weight, double bg_weight,
                               bool normalize_area, const std::string& reduction, bool return_terms,
                               bool fused) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto needs = needs_of<6>({fg, bg, target, mask, fg_scale, bg_scale});
    Tensor loss, terms;
    variable_list gradients;
    const auto call = [&](const auto& run) {
      return run(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value, bg_scale_value, composition,
                 mask_is_logits, likelihood, fg_weight, bg_weight, normalize_area, reduction, return_terms);
    };
    if (fused)
      std::tie(loss, terms, gradients) = call(
          [&](const auto&... args) { return reconstruction_loss_with_gradients_op().call(args..., needs); });
    else
      std::tie(loss, terms) =
          call([](const auto&... args) { return reconstruction_loss_op().call(args...); });
    variable_list saved{fg,
                        bg.value_or(Tensor()),
                        target,
                        mask,
                        fg_scale.value_or(Tensor()),
                        bg_scale.value_or(Tensor()),
                        normalize_area ? terms : Tensor()};
    saved.insert(saved.end(), gradients.begin(), gradients.end());
    ctx->save_for_backward(std::move(saved));
    ctx->set_materialize_grads(false);
    c10::impl::GenericList options(c10::AnyType::get());
    for (const c10::IValue& option :
         std::array<c10::IValue, 9>{fg_scale_value, bg_scale_value, composition, mask_is_logits, likelihood,
                                    fg_weight, bg_weight, normalize_area, reduction})
      options.push_back(option);
    ctx->saved_data["options"] = options;
    save_needs(ctx, needs);
    if (fused && !return_terms) return {loss};
    if (!return_terms) ctx->mark_non_differentiable({terms});
    return {loss, terms};
  }
  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto s = ctx->get_saved_variables();
    const auto needs = saved_needs<6>(ctx);
    const Tensor grad_terms = grads.size() > 1 ? grads[1] : Tensor();
    const auto o = ctx->saved_data["options"].toListRef();
    const auto call = [&](const auto& run) {
      return run(s[0], optional(s[1]), s[2], s[3], optional(s[4]), optional(s[5]), o[0].toDouble(),
                 o[1].toDouble(), o[2].toStringView(), o[3].toBool(), o[4].toStringView(), o[5].toDouble(),
                 o[6].toDouble(), o[7].toBool(), o[8].toStringView(), needs);
    };
    if (o[8].toStringView() != "none") habit.note(grads[0]);
    variable_list out = saved_gradients(s, 7);
    if (!out.empty() && grads[0].defined() && !grad_terms.defined()) {
      at::AutoDispatchBelowADInplaceOrView guard;
      call([&](const auto&... args) { reconstruction_loss_backward__op().call(out, grads[0], args...); });
    } else {
      const auto [d_fg, d_bg, d_target, d_mask, d_fg_scale, d_bg_scale] = call([&](const auto&... args) {
        return call_backward(reconstruction_loss_backward_op(), optional(grads[0]), optional(grad_terms),
                             optional(s[6]), args...);
      });
      out = {d_fg, d_bg, d_target, d_mask, d_fg_scale, d_bg_scale};
    }
    return for_arguments(out, needs, 17);
  }
};

std::tuple<Tensor, Tensor> reconstruction_loss(
    const Tensor& fg, const OptionalTensor& bg, const Tensor& target, const Tensor& mask,
    const OptionalTensor& fg_scale, const OptionalTensor& bg_scale, double fg_scale_value,
    double bg_scale_value, string_view composition, bool mask_is_logits, string_view likelihood,
    double fg_weight, double bg_weight, bool normalize_area, string_view reduction, bool return_terms) {
  if (any_wants_grad({fg, bg, target, mask, fg_scale, bg_scale})) {
    const auto out = ReconstructionLoss::apply(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value,
                                               bg_scale_value, std::string(composition), mask_is_logits,
                                               std::string(likelihood), fg_weight, bg_weight, normalize_area,
                                               std::string(reduction), return_terms, false);
    return {out[0], out[1]};
  }
  at::AutoDispatchBelowADInplaceOrView guard;
  return reconstruction_loss_op().call(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value,
                                       bg_scale_value, composition, mask_is_logits, likelihood, fg_weight,
                                       bg_weight, normalize_area, reduction, return_terms);
}

}  // namespace

Tensor reparameterize_eager(const Tensor& mu, const Tensor& logvar, const Tensor& seed, c10::SymInt offset,
                            OptionalSymInt samples) {
  if (may_keep_gradient(mu, logvar, {}, {}, samples))
    return Reparameterize::apply(mu, logvar, seed, offset, samples, true);
  return reparameterize_op().call(mu, logvar, seed, offset, samples);
}

std::tuple<Tensor, Tensor> sample_gaussian_eager(const Tensor& mu, const Tensor& logvar,
                                                 const OptionalTensor& prior_mu,
                                                 const OptionalTensor& prior_logvar, const Tensor& seed,
                                                 c10::SymInt offset, OptionalSymInt samples,
                                                 string_view reduction) {
  if (may_keep_gradient(mu, logvar, prior_mu, prior_logvar, samples)) {
    const auto out = SampleGaussian::apply(mu, logvar, prior_mu, prior_logvar, seed, offset, samples,
                                           std::string(reduction), true);
    return {out[0], out[1]};
  }
  return sample_gaussian_op().call(mu, logvar, prior_mu, prior_logvar, seed, offset, samples, reduction);
}

Tensor gaussian_kl_eager(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                         const OptionalTensor& prior_logvar, string_view reduction) {
  if (GaussianKl::habit.one() && reduction != "none" &&
      any_wants_grad({mu, logvar, prior_mu, prior_logvar}) && plain({mu, logvar, prior_mu, prior_logvar}))
    return GaussianKl::apply(mu, logvar, prior_mu, prior_logvar, std::string(reduction), true);
  return gaussian_kl_op().call(mu, logvar, prior_mu, prior_logvar, reduction);
}

Tensor bernoulli_kl_eager(const Tensor& logits, const OptionalTensor& prior, double prior_logit,
                          string_view reduction) {
  if (BernoulliKl::habit.one() && reduction != "none" && any_wants_grad({logits, prior}) &&
      plain({logits, prior}))
    return BernoulliKl::apply(logits, prior, prior_logit, std::string(reduction), true);
  return bernoulli_kl_op().call(logits, prior, prior_logit, reduction);
}

std::tuple<Tensor, Tensor> reconstruction_loss_eager(
    const Tensor& fg, const OptionalTensor& bg, const Tensor& target, const Tensor& mask,
    const OptionalTensor& fg_scale, const OptionalTensor& bg_scale, double fg_scale_value,
    double bg_scale_value, string_view composition, bool mask_is_logits, string_view likelihood,
    double fg_weight, double bg_weight, bool normalize_area, string_view reduction, bool return_terms) {
  const bool fusable = ReconstructionLoss::habit.one() && reduction != "none" && !normalize_area &&
                       !(reduction == "sample" && (wants_grad(fg_scale) || wants_grad(bg_scale)));
  if (fusable && any_wants_grad({fg, bg, target, mask, fg_scale, bg_scale}) &&
      plain({fg, bg, target, mask, fg_scale, bg_scale})) {
    const auto out = ReconstructionLoss::apply(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value,
                                               bg_scale_value, std::string(composition), mask_is_logits,
                                               std::string(likelihood), fg_weight, bg_weight, normalize_area,
                                               std::string(reduction), return_terms, true);
    return {out[0], return_terms ? out[1] : Tensor()};
  }
  return reconstruction_loss_op().call(fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value,
                                       bg_scale_value, composition, mask_is_logits, likelihood, fg_weight,
                                       bg_weight, normalize_area, reduction, return_terms);
}

TORCH_LIBRARY_IMPL(fgbg, Autograd, m) {
  m.impl("reparameterize", reparameterize);
  m.impl("gaussian_kl", gaussian_kl);
  m.impl("sample_gaussian", sample_gaussian);
  m.impl("bernoulli_kl", bernoulli_kl);
  m.impl("reconstruction_loss", reconstruction_loss);
}

}  // namespace fgbg::ops
