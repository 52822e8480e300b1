// philox_normal, reparameterize, gaussian_kl, sample_gaussian, bernoulli_kl: tensors to kernels.
// One implementation serves the three Gaussian ops: each asks it for z, for the KL, or for both.
//
// A reduced loss is linear in the gradient that arrives at it, mostly one. _with_gradients writes, with the
// loss, the gradients for one while the operands are at hand; _backward_ brings those up to the gradient
// that arrived, which is no work where that is one. A sample's _with_gradient writes dz/dlogvar, which
// becomes the gradient of logvar in place.
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#include "common.h"

namespace fgbg::ops {
namespace {

using std::string_view;

struct Gaussian {
  Tensor mu, logvar;
  OptionalTensor prior_mu, prior_logvar;

  GaussianArgs args() const {
    check_operand(logvar, mu, "logvar");
    if (prior_mu) check_operand(*prior_mu, mu, "prior_mu");
    if (prior_logvar) check_operand(*prior_logvar, mu, "prior_logvar");
    GaussianArgs a{};
    a.shape = latent_shape(mu);
    a.mu = view_of(mu, mu, false);
    a.logvar = view_of(logvar, mu, false);
    a.prior_mu = view_of(prior_mu, mu, false);
    a.prior_logvar = view_of(prior_logvar, mu, false);
    return a;
  }
  at::ScalarType dtype() const { return compute_dtype({mu, logvar, prior_mu, prior_logvar}); }
};

void set_noise(GaussianArgs& args, const Tensor& seed, int64_t offset, std::optional<int64_t> samples) {
  check_seed(seed);
  args.noise = {seed.const_data_ptr<int64_t>(), static_cast<uint64_t>(offset)};
  args.samples = samples.value_or(1);
}

Tensor empty_draws(const Gaussian& g, std::optional<int64_t> samples) {
  const auto dtype = at::promote_types(g.mu.scalar_type(), g.logvar.scalar_type());
  const auto options = g.mu.options().dtype(dtype);
  if (!samples) return empty_result_like(g.mu, options);
  auto sizes = g.mu.sizes().vec();
  sizes.insert(sizes.begin(), *samples);
  return empty_result(sizes, options);
}

// Where draws are stacked, the view of one of them; they are dense and follow each other.
View draws_view(const Tensor& z, const Gaussian& g, std::optional<int64_t> samples) {
  if (!samples) return view_of(z, g.mu, false);
  return *samples > 0 ? view_of(z.select(0, 0), g.mu, false) : View{};
}

// A KL that is either written per element or summed.
struct Kl {
  Tensor out, partial;

  template <class Args>
  Kl(Args& args, const Tensor& like, Reduction reduction, at::ScalarType dtype) {
    if (reduction == Reduction::none) {
      out = empty_result_like(like, like.options().dtype(dtype));
      args.kl = view_of(out, like, false);
    } else {
      out = empty_loss(like, reduction, dtype);
      partial = at::empty({args.shape.size[0], FGBG_ON_DEVICE(row_segments, args.shape, like)},
                          like.options().dtype(at::kDouble));
      args.partial = partial.mutable_data_ptr<double>();
      FinalReduction& f = args.final_reductions[0];
      f.partial = args.partial;
      f.terms = 1;
      f.batch = partial.size(0);
      f.segments = partial.size(1);
      f.reduction = reduction;
      f.factor = reduction_factor(reduction, f.batch, like.numel());
      f.loss = out.mutable_data_ptr();
      f.dtype = storage_dtype(out);
    }
  }
};

template <class Args>
void set_kl_gradient(Args& args, const Tensor& grad, const Tensor& like, Reduction reduction) {
  if (reduction == Reduction::none)
    args.grad_kl_elements = view_of(grad, like, false);
  else
    args.grad_kl = upstream_of(grad, reduction, reduction_factor(reduction, like.size(0), like.numel()));
}

Tensor philox_normal(const Tensor& seed, at::IntArrayRef size, int64_t offset, at::ScalarType dtype) {
  check_seed(seed);
  Tensor out = empty_result(size, seed.options().dtype(dtype));
  if (out.numel() == 0) return out;
  const Tensor flat = out.view({1, -1});
  NormalArgs args{};
  args.noise = {seed.const_data_ptr<int64_t>(), static_cast<uint64_t>(offset)};
  args.out = view_of(flat, flat, false);
  args.numel = out.numel();
  FGBG_RUN(normal, args, dtype == at::kDouble, out);
  return out;
}

struct Sampled {
  Tensor z;
  Tensor kl;  // if a reduction was given
  // If it was asked for. It has no elements where noise is cheaper to make again than to keep.
  Tensor dz_dlogvar;
};

Sampled gaussian_forward(const Gaussian& g, const Tensor& seed, int64_t offset,
                         std::optional<int64_t> samples, std::optional<Reduction> reduction,
                         bool wants_gradient) {
  GaussianArgs args = g.args();
  set_noise(args, seed, offset, samples);
  Sampled out{empty_draws(g, samples), {}, {}};
  args.z = draws_view(out.z, g, samples);
  std::optional<Kl> kl;  // whose partial sums have to outlive the kernel
  if (reduction) out.kl = kl.emplace(args, g.mu, *reduction, g.dtype()).out;
  if (wants_gradient && g.mu.is_cuda()) {
    out.dz_dlogvar = at::empty({0}, g.logvar.options());
  } else if (wants_gradient) {
    out.dz_dlogvar = empty_result_like(g.logvar, g.logvar.options());
    args.dz_dlogvar = view_of(out.dz_dlogvar, g.mu, false);
  }
  FGBG_RUN(gaussian_forward, args, g.dtype() == at::kDouble, g.mu);
  return out;
}

Tensor reparameterize(const Tensor& mu, const Tensor& logvar, const Tensor& seed, int64_t offset,
                      std::optional<int64_t> samples) {
  return gaussian_forward({mu, logvar, {}, {}}, seed, offset, samples, {}, false).z;
}

std::tuple<Tensor, Tensor> reparameterize_with_gradient(const Tensor& mu, const Tensor& logvar,
                                                        const Tensor& seed, int64_t offset) {
  const Sampled out = gaussian_forward({mu, logvar, {}, {}}, seed, offset, {}, {}, true);
  return {out.z, out.dz_dlogvar};
}

std::tuple<Tensor, Tensor> sample_gaussian(const Tensor& mu, const Tensor& logvar,
                                           const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                           const Tensor& seed, int64_t offset, std::optional<int64_t> samples,
                                           string_view reduction) {
  const Sampled out = gaussian_forward({mu, logvar, prior_mu, prior_logvar}, seed, offset, samples,
                                       parse_reduction(reduction), false);
  return {out.z, out.kl};
}

std::tuple<Tensor, Tensor, Tensor> sample_gaussian_with_gradient(const Tensor& mu, const Tensor& logvar,
                                                                 const OptionalTensor& prior_mu,
                                                                 const OptionalTensor& prior_logvar,
                                                                 const Tensor& seed, int64_t offset,
                                                                 string_view reduction) {
  const Sampled out = gaussian_forward({mu, logvar, prior_mu, prior_logvar}, seed, offset, {},
                                       parse_reduction(reduction), true);
  return {out.z, out.kl, out.dz_dlogvar};
}

Tensor gaussian_kl(const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                   const OptionalTensor& prior_logvar, string_view reduction_name) {
  const Gaussian g{mu, logvar, prior_mu, prior_logvar};
  const Reduction reduction = parse_reduction(reduction_name);
  GaussianArgs args = g.args();
  Kl kl(args, mu, reduction, g.dtype());
  FGBG_RUN(gaussian_forward, args, g.dtype() == at::kDouble, mu);
  return kl.out;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

struct Draw {
  Tensor seed;
  int64_t offset;
  std::optional<int64_t> samples;
};

Gradients<4> empty_gradients(const Gaussian& g, std::array<bool, 4> needs) {
  return ops::empty_gradients<4>({g.mu, g.logvar, g.prior_mu, g.prior_logvar}, needs);
}

// Sets where the gradients go and runs the kernel that writes them.
void run_gradients(GaussianArgs& args, const Gaussian& g, const Gradients<4>& to) {
  args.grad_mu = view_of(to[0], g.mu, false);
  args.grad_logvar = view_of(to[1], g.mu, false);
  args.grad_prior_mu = view_of(to[2], g.mu, false);
  args.grad_prior_logvar = view_of(to[3], g.mu, false);
  FGBG_RUN(gaussian_backward, args, g.dtype() == at::kDouble, g.mu);
}

FourTensors gaussian_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl, const Gaussian& g,
                              const std::optional<Draw>& draw, Reduction reduction,
                              std::array<bool, 4> needs) {
  GaussianArgs args = g.args();
  Tensor z_gradient;
  if (grad_z) {
    set_noise(args, draw->seed, draw->offset, draw->samples);
    z_gradient = draw->samples ? grad_z->contiguous() : *grad_z;
    args.grad_z = draws_view(z_gradient, g, draw->samples);
  }
  if (grad_kl) set_kl_gradient(args, *grad_kl, g.mu, reduction);
  const Gradients<4> out = empty_gradients(g, needs);
  run_gradients(args, g, out);
  return returned(out, g.mu);
}

std::tuple<Tensor, Tensor> reparameterize_backward(const Tensor& grad_z, const Tensor& mu,
                                                   const Tensor& logvar, const Tensor& seed, int64_t offset,
                                                   std::optional<int64_t> samples,
                                                   std::array<bool, 2> needs) {
  const auto grads = gaussian_backward(grad_z, {}, {mu, logvar, {}, {}}, Draw{seed, offset, samples},
                                       Reduction::sum, {needs[0], needs[1], false, false});
  return {std::get<0>(grads), std::get<1>(grads)};
}

FourTensors gaussian_kl_backward(const Tensor& grad_kl, const Tensor& mu, const Tensor& logvar,
                                 const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
                                 string_view reduction, std::array<bool, 4> needs) {
  return gaussian_backward({}, grad_kl, {mu, logvar, prior_mu, prior_logvar}, {}, parse_reduction(reduction),
                           needs);
}

FourTensors sample_gaussian_backward(const OptionalTensor& grad_z, const OptionalTensor& grad_kl,
                                     const Tensor& mu, const Tensor& logvar, const OptionalTensor& prior_mu,
                                     const OptionalTensor& prior_logvar, const Tensor& seed, int64_t offset,
                                     std::optional<int64_t> samples, string_view reduction,
                                     std::array<bool, 4> needs) {
  return gaussian_backward(grad_z, grad_kl, {mu, logvar, prior_mu, prior_logvar}, Draw{seed, offset, samples},
                           parse_reduction(reduction), needs);
}

// The gradients of the others; that of logvar takes the place of dz_dlogvar.
std::tuple<Tensor, Tensor, Tensor> sample_gaussian_backward_(
    const Tensor& dz_dlogvar, const Tensor& grad_z, const OptionalTensor& grad_kl, const Tensor& mu,
    const Tensor& logvar, const OptionalTensor& prior_mu, const OptionalTensor& prior_logvar,
    string_view reduction, std::array<bool, 4> needs) {
  const Gaussian g{mu, logvar, prior_mu, prior_logvar};
  GaussianArgs args = g.args();
  args.grad_z = view_of(grad_z, mu, false);
  args.dz_dlogvar = view_of(dz_dlogvar, mu, false);
  if (grad_kl) set_kl_gradient(args, *grad_kl, mu, parse_reduction(reduction));
  needs[1] = false;
  Gradients<4> out = empty_gradients(g, needs);
  out[1] = dz_dlogvar;
  run_gradients(args, g, out);
  const auto [d_mu, d_logvar, d_prior_mu, d_prior_logvar] = returned(out, mu);
  return {d_mu, d_prior_mu, d_prior_logvar};
}

std::tuple<Tensor, std::vector<Tensor>> gaussian_kl_with_gradients(const Tensor& mu, const Tensor& logvar,
                                                                   const OptionalTensor& prior_mu,
                                                                   const OptionalTensor& prior_logvar,
                                                                   string_view reduction_name,
                                                                   std::array<bool, 4> needs) {
  const Gaussian g{mu, logvar, prior_mu, prior_logvar};
  const Reduction reduction = parse_reduction(reduction_name);
  GaussianArgs args = g.args();
  Kl kl(args, mu, reduction, g.dtype());
  args.grad_kl.factor = reduction_factor(reduction, mu.size(0), mu.numel());
  const Gradients<4> out = empty_gradients(g, needs);
  run_gradients(args, g, out);
  return {kl.out, listed(out)};
}

void gaussian_kl_backward_(at::TensorList gradients, const Tensor& grad_kl, const Tensor& mu,
                           const Tensor& logvar, const OptionalTensor& prior_mu,
                           const OptionalTensor& prior_logvar, string_view reduction,
                           std::array<bool, 4> needs) {
  if (all_ones(grad_kl)) return;
  const Gaussian g{mu, logvar, prior_mu, prior_logvar};
  GaussianArgs args = g.args();
  set_kl_gradient(args, grad_kl, mu, parse_reduction(reduction));
  args.grad_kl.stored = true;
  run_gradients(args, g, from_list<4>(gradients, needs));
}

BernoulliArgs bernoulli_args(const Tensor& logits, const OptionalTensor& prior, double prior_logit) {
  if (prior) check_operand(*prior, logits, "prior_logits");
  BernoulliArgs args{};
  args.shape = latent_shape(logits);
  args.logits = view_of(logits, logits, false);
  args.prior = view_of(prior, logits, false);
  args.prior_logit = prior_logit;
  return args;
}

Tensor bernoulli_kl(const Tensor& logits, const OptionalTensor& prior, double prior_logit,
                    string_view reduction_name) {
  const Reduction reduction = parse_reduction(reduction_name);
  BernoulliArgs args = bernoulli_args(logits, prior, prior_logit);
  const auto dtype = compute_dtype({logits, prior});
  Kl kl(args, logits, reduction, dtype);
  FGBG_RUN(bernoulli_forward, args, dtype == at::kDouble, logits);
  return kl.out;
}

void run_gradients(BernoulliArgs& args, const Tensor& logits, bool f64, const Gradients<2>& to) {
  args.grad_logits = view_of(to[0], logits, false);
  args.grad_prior = view_of(to[1], logits, false);
  FGBG_RUN(bernoulli_backward, args, f64, logits);
}

std::tuple<Tensor, Tensor> bernoulli_kl_backward(const Tensor& grad_kl, const Tensor& logits,
                                                 const OptionalTensor& prior, double prior_logit,
                                                 string_view reduction, std::array<bool, 2> needs) {
  BernoulliArgs args = bernoulli_args(logits, prior, prior_logit);
  set_kl_gradient(args, grad_kl, logits, parse_reduction(reduction));
  const Gradients<2> out = ops::empty_gradients<2>({logits, prior}, needs);
  run_gradients(args, logits, compute_dtype({logits, prior}) == at::kDouble, out);
  return returned(out, logits);
}

std::tuple<Tensor, std::vector<Tensor>> bernoulli_kl_with_gradients(const Tensor& logits,
                                                                    const OptionalTensor& prior,
                                                                    double prior_logit,
                                                                    string_view reduction_name,
                                                                    std::array<bool, 2> needs) {
  const Reduction reduction = parse_reduction(reduction_name);
  BernoulliArgs args = bernoulli_args(logits, prior, prior_logit);
  const auto dtype = compute_dtype({logits, prior});
  Kl kl(args, logits, reduction, dtype);
  args.grad_kl.factor = reduction_factor(reduction, logits.size(0), logits.numel());
  const Gradients<2> out = ops::empty_gradients<2>({logits, prior}, needs);
  run_gradients(args, logits, dtype == at::kDouble, out);
  return {kl.out, listed(out)};
}

void bernoulli_kl_backward_(at::TensorList gradients, const Tensor& grad_kl, const Tensor& logits,
                            const OptionalTensor& prior, double prior_logit, string_view reduction,
                            std::array<bool, 2> needs) {
  if (all_ones(grad_kl)) return;
  BernoulliArgs args = bernoulli_args(logits, prior, prior_logit);
  set_kl_gradient(args, grad_kl, logits, parse_reduction(reduction));
  args.grad_kl.stored = true;
  run_gradients(args, logits, compute_dtype({logits, prior}) == at::kDouble, from_list<2>(gradients, needs));
}

void register_kernels(torch::Library& m) {
  m.impl("philox_normal", philox_normal);
  m.impl("reparameterize", reparameterize);
  m.impl("reparameterize_with_gradient", reparameterize_with_gradient);
  m.impl("reparameterize_backward", reparameterize_backward);
  m.impl("gaussian_kl", gaussian_kl);
  m.impl("gaussian_kl_backward", gaussian_kl_backward);
  m.impl("gaussian_kl_with_gradients", gaussian_kl_with_gradients);
  m.impl("gaussian_kl_backward_", gaussian_kl_backward_);
  m.impl("sample_gaussian", sample_gaussian);
  m.impl("sample_gaussian_with_gradient", sample_gaussian_with_gradient);
  m.impl("sample_gaussian_backward", sample_gaussian_backward);
  m.impl("bernoulli_kl", bernoulli_kl);
  m.impl("bernoulli_kl_backward", bernoulli_kl_backward);
  m.impl("bernoulli_kl_with_gradients", bernoulli_kl_with_gradients);
  m.impl("bernoulli_kl_backward_", bernoulli_kl_backward_);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fgbg, m) {
  m.def("philox_normal(Tensor seed, SymInt[] size, SymInt offset, ScalarType dtype) -> Tensor");
  m.def(
      "reparameterize(Tensor mu, Tensor logvar, Tensor seed, SymInt offset, SymInt? num_samples) -> Tensor");
  m.def(
      "reparameterize_with_gradient(Tensor mu, Tensor logvar, Tensor seed, SymInt offset) -> "
      "(Tensor, Tensor)");
  m.def(
      "reparameterize_backward(Tensor grad_z, Tensor mu, Tensor logvar, Tensor seed, SymInt offset, "
      "SymInt? num_samples, bool[2] needs) -> (Tensor, Tensor)");
  m.def(
      "gaussian_kl(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, str reduction) -> "
      "Tensor");
  m.def(
      "gaussian_kl_backward(Tensor grad_kl, Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? "
      "prior_logvar, "
      "str reduction, bool[4] needs) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "gaussian_kl_with_gradients(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "str reduction, bool[4] needs) -> (Tensor, Tensor[])");
  m.def(
      "gaussian_kl_backward_(Tensor(a!)[] gradients, Tensor grad_kl, Tensor mu, Tensor logvar, "
      "Tensor? prior_mu, Tensor? prior_logvar, str reduction, bool[4] needs) -> ()");
  m.def(
      "sample_gaussian(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, Tensor seed, "
      "SymInt offset, SymInt? num_samples, str reduction) -> (Tensor, Tensor)");
  m.def(
      "sample_gaussian_backward(Tensor? grad_z, Tensor? grad_kl, Tensor mu, Tensor logvar, Tensor? prior_mu, "
      "Tensor? prior_logvar, Tensor seed, SymInt offset, SymInt? num_samples, str reduction, bool[4] needs) "
      "-> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "sample_gaussian_with_gradient(Tensor mu, Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, "
      "Tensor seed, SymInt offset, str reduction) -> (Tensor, Tensor, Tensor)");
  m.def(
      "sample_gaussian_backward_(Tensor(a!) dz_dlogvar, Tensor grad_z, Tensor? grad_kl, Tensor mu, "
      "Tensor logvar, Tensor? prior_mu, Tensor? prior_logvar, str reduction, bool[4] needs) -> "
      "(Tensor, Tensor, Tensor)");
  m.def("bernoulli_kl(Tensor logits, Tensor? prior_logits, float prior_logit, str reduction) -> Tensor");
  m.def(
      "bernoulli_kl_backward(Tensor grad_kl, Tensor logits, Tensor? prior_logits, float prior_logit, "
      "str reduction, bool[2] needs) -> (Tensor, Tensor)");
  m.def(
      "bernoulli_kl_with_gradients(Tensor logits, Tensor? prior_logits, float prior_logit, str reduction, "
      "bool[2] needs) -> (Tensor, Tensor[])");
  m.def(
      "bernoulli_kl_backward_(Tensor(a!)[] gradients, Tensor grad_kl, Tensor logits, Tensor? prior_logits, "
      "float prior_logit, str reduction, bool[2] needs) -> ()");
}

TORCH_LIBRARY_IMPL(fgbg, CPU, m) {
  register_kernels(m);
  m.impl("sample_gaussian_backward_", sample_gaussian_backward_);  // elsewhere dz/dlogvar is not kept
}
#ifdef FGBG_WITH_CUDA
TORCH_LIBRARY_IMPL(fgbg, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fgbg::ops
