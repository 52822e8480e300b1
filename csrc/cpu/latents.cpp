// Latent ops on the CPU: noise, reparameterised samples, the Gaussian and Bernoulli KL, and the Gaussian
// log-density.
// One pass: every operand of a block is read once, all results of the block are written from it.
#include <optional>

#include "../math/gaussian.h"
#include "../math/mask.h"
#include "kernel_table.h"
#include "normals.h"
#include "rows.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

template <class T>
void normal(const NormalArgs& args, int64_t begin, int64_t end) {
  const Shape shape = {{1, 1, 1, 1, args.numel}, args.numel, args.numel, args.numel, 1, 1};
  Normals normals(args.noise);
  Output<T> out;
  for (int64_t i = begin * kSegment; i < min(end * kSegment, args.numel); i += kBlock<T>) {
    const int64_t n = min(kBlock<T>, min(end * kSegment, args.numel) - i);
    const float* eps = normals.fill(i, n);
    const Span span{shape, i, n};
    T* to = out.open(args.out, span);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) to[k] = static_cast<T>(eps[k]);
    out.close(args.out, span);
  }
}

// Draw s of a [samples, *shape] tensor, which is dense when there is more than one.
View draw(const View& v, const Shape& shape, int64_t s) {
  View out = v;
  const int64_t bytes = v.dtype == DType::f64 ? 8 : v.dtype == DType::f32 ? 4 : 2;
  out.data = static_cast<char*>(v.data) + s * shape.numel * bytes;
  return out;
}

// Calls with(S{}), S being what the spread of a Gaussian is.
template <class With>
void with_parameterization(Parameterization p, With with) {
  switch (p) {
    case Parameterization::logvar: return with(math::LogVar{});
    case Parameterization::log_std: return with(math::LogStd{});
    case Parameterization::std: return with(math::Std{});
  }
}

// The priors of a block, as the formulas take them.
template <class T, class S>
class Priors {
 public:
  Priors(const GaussianArgs& args) : mu_(args.prior_mu, args.shape), spread_(args.prior_spread, args.shape) {
    if (spread_.constant()) prepare(spread_.load({args.shape, 0, kBlock<T>}), kBlock<T>);
  }
  void load(const Span& span) {
    mu = mu_.load(span);
    if (!spread_.constant()) prepare(spread_.load(span), span.n);
  }

  const T* mu = nullptr;
  T spread[kBlock<T>], inverse[kBlock<T>];

 private:
  void prepare(const T* s, int64_t n) {
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const math::Prior<T> prior = S::prepare(s[k]);
      spread[k] = prior.spread;
      inverse[k] = prior.inverse;
    }
  }

  BroadcastInput<T> mu_, spread_;
};

template <class T, class S>
void gaussian_forward(const GaussianArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Rows rows(shape);
  const bool wants_kl = args.kl || args.partial;
  Normals normals(args.noise);
  Input<T> mu_in, spread_in;
  std::optional<Priors<T, S>> priors;
  if (wants_kl && !args.standard) priors.emplace(args);
  Output<T> z_out, slope_out, kl_out;
  T std[kBlock<T>];
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{shape, i, n};
    const T* mu = mu_in.load(args.mu, span);
    const T* spread = spread_in.load(args.spread, span);
    if (args.z) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) std[k] = S::std(spread[k]);
      for (int64_t s = 0; s < args.samples; ++s) {
        const View to = draw(args.z, shape, s);
        const float* eps = normals.fill(s * shape.numel + i, n);
        T* z = z_out.open(to, span);
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k) z[k] = math::fma(std[k], static_cast<T>(eps[k]), mu[k]);
        z_out.close(to, span);
        if (args.dz_dspread) {
          T* slope = slope_out.open(args.dz_dspread, span);
          FGBG_SIMD
          for (int64_t k = 0; k < n; ++k) slope[k] = S::dz_dspread(std[k], static_cast<T>(eps[k]));
          slope_out.close(args.dz_dspread, span);
        }
      }
    }
    if (!wants_kl) return nullptr;
    T* kl = kl_out.open(args.kl, span);
    if (priors) {
      priors->load(span);
      const T *prior_mu = priors->mu, *prior_spread = priors->spread, *inverse = priors->inverse;
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        kl[k] = S::kl(mu[k], spread[k], prior_mu[k], math::Prior<T>{prior_spread[k], inverse[k]}).value;
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) kl[k] = S::standard_kl(mu[k], spread[k]).value;
    }
    kl_out.close(args.kl, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

// Accumulates, or for the first draw writes, the gradients through z of one draw.
template <bool kAdd, class T>
void draw_gradients(const T* grad, const T* slope, int64_t n, T* d_mu, T* d_spread) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    d_mu[k] = (kAdd ? d_mu[k] : T(0)) + grad[k];
    d_spread[k] = (kAdd ? d_spread[k] : T(0)) + grad[k] * slope[k];
  }
}

// Accumulates, or without a z writes, the gradients of a KL against N(0, 1).
template <bool kAdd, bool kValue, class S, class T>
void standard_kl_gradients(const T* mu, const T* spread, const T* grad, int64_t n, T* d_mu, T* d_spread,
                           T* kl) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    const auto to = S::standard_kl(mu[k], spread[k]);
    if (kValue) kl[k] = to.value;
    d_mu[k] = (kAdd ? d_mu[k] : T(0)) + grad[k] * to.d_mu;
    d_spread[k] = (kAdd ? d_spread[k] : T(0)) + grad[k] * to.d_spread;
  }
}

// d/d(mu, spread, prior_mu, prior_spread) of upstream_z . z + upstream_kl . kl; eps is recomputed from the
// seed unless forward has kept dz_dspread. If partial sums are wanted, the KL's as well.
template <class T, class S>
void gaussian_backward(const GaussianArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Rows rows(shape);
  const bool has_kl = args.grad_kl || args.grad_kl_elements;
  Normals normals(args.noise);
  Input<T> mu_in, spread_in, grad_z_in, slope_in;
  std::optional<Priors<T, S>> priors;
  if (has_kl && !args.standard) priors.emplace(args);
  Output<T> mu_out, spread_out, prior_mu_out, prior_spread_out;
  UpstreamBlocks<T> upstream(args.grad_kl_elements, args.grad_kl);
  T kl[kBlock<T>], std[kBlock<T>], made[kBlock<T>];
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{shape, i, n};
    const T* spread = spread_in.load(args.spread, span);
    T* d_mu = mu_out.open(args.grad_mu, span);
    T* d_spread = spread_out.open(args.grad_spread, span);
    if (args.grad_z && args.dz_dspread) {
      draw_gradients<false>(grad_z_in.load(args.grad_z, span), slope_in.load(args.dz_dspread, span), n, d_mu,
                            d_spread);
    } else if (args.grad_z) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) std[k] = S::std(spread[k]);
      for (int64_t s = 0; s < args.samples; ++s) {
        const T* grad = grad_z_in.load(draw(args.grad_z, shape, s), span);
        const float* eps = normals.fill(s * shape.numel + i, n);
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k) made[k] = S::dz_dspread(std[k], static_cast<T>(eps[k]));
        (s == 0 ? draw_gradients<false, T> : draw_gradients<true, T>)(grad, made, n, d_mu, d_spread);
      }
    } else if (!has_kl || priors) {  // otherwise the loop of the KL writes them
      for (int64_t k = 0; k < n; ++k) d_mu[k] = d_spread[k] = T(0);
    }
    if (has_kl && !priors) {
      const T* mu = mu_in.load(args.mu, span);
      const T* grad = upstream.load(span);
      if (args.grad_z)
        standard_kl_gradients<true, false, S>(mu, spread, grad, n, d_mu, d_spread, kl);
      else if (args.partial)
        standard_kl_gradients<false, true, S>(mu, spread, grad, n, d_mu, d_spread, kl);
      else
        standard_kl_gradients<false, false, S>(mu, spread, grad, n, d_mu, d_spread, kl);
    } else if (has_kl) {
      const T* mu = mu_in.load(args.mu, span);
      const T* grad = upstream.load(span);
      priors->load(span);
      const T *prior_mu = priors->mu, *prior_spread = priors->spread, *inverse = priors->inverse;
      T* d_prior_mu = prior_mu_out.open(args.grad_prior_mu, span);
      T* d_prior_spread = prior_spread_out.open(args.grad_prior_spread, span);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const auto to = S::kl(mu[k], spread[k], prior_mu[k], math::Prior<T>{prior_spread[k], inverse[k]});
        kl[k] = to.value;
        d_mu[k] += grad[k] * to.d_mu;
        d_spread[k] += grad[k] * to.d_spread;
        d_prior_mu[k] = -grad[k] * to.d_mu;
        d_prior_spread[k] = grad[k] * to.d_prior_spread;
      }
      prior_mu_out.close(args.grad_prior_mu, span);
      prior_spread_out.close(args.grad_prior_spread, span);
    } else {
      // The sample does not depend on the prior.
      T* d_prior_mu = prior_mu_out.open(args.grad_prior_mu, span);
      T* d_prior_spread = prior_spread_out.open(args.grad_prior_spread, span);
      for (int64_t k = 0; k < n; ++k) d_prior_mu[k] = d_prior_spread[k] = T(0);
      prior_mu_out.close(args.grad_prior_mu, span);
      prior_spread_out.close(args.grad_prior_spread, span);
    }
    mu_out.close(args.grad_mu, span);
    spread_out.close(args.grad_spread, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

// The mean and the spread of a block, as the formulas take them.
template <class T, class S>
class Densities {
 public:
  explicit Densities(const LogProbArgs& args) : mu_(args.mu, args.shape), spread_(args.spread, args.shape) {
    if (spread_.constant()) prepare(spread_.load({args.shape, 0, kBlock<T>}), kBlock<T>);
  }
  void load(const Span& span) {
    mu = mu_.load(span);
    if (!spread_.constant()) prepare(spread_.load(span), span.n);
  }

  const T* mu = nullptr;
  T inverse[kBlock<T>], constant[kBlock<T>];

 private:
  void prepare(const T* s, int64_t n) {
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const math::Density<T> density = S::prepare_density(s[k]);
      inverse[k] = density.inverse;
      constant[k] = density.constant;
    }
  }

  BroadcastInput<T> mu_, spread_;
};

template <class T, class S>
void log_prob_forward(const LogProbArgs& args, int64_t begin, int64_t end) {
  const Rows rows(args.shape);
  Input<T> z_in;
  Densities<T, S> densities(args);
  Output<T> out;
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{args.shape, i, n};
    const T* z = z_in.load(args.z, span);
    densities.load(span);
    const T *mu = densities.mu, *inverse = densities.inverse, *constant = densities.constant;
    T* log_prob = out.open(args.log_prob, span);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k)
      log_prob[k] = S::log_density(z[k], mu[k], math::Density<T>{inverse[k], constant[k]}).value;
    out.close(args.log_prob, span);
    return log_prob;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class T, class S>
void log_prob_backward(const LogProbArgs& args, int64_t begin, int64_t end) {
  const Rows rows(args.shape);
  Input<T> z_in;
  Densities<T, S> densities(args);
  Output<T> z_out, mu_out, spread_out;
  UpstreamBlocks<T> upstream(args.grad_elements, args.grad);
  T log_prob[kBlock<T>];
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{args.shape, i, n};
    const T* z = z_in.load(args.z, span);
    const T* grad = upstream.load(span);
    densities.load(span);
    const T *mu = densities.mu, *inverse = densities.inverse, *constant = densities.constant;
    T* d_z = z_out.open(args.grad_z, span);
    T* d_mu = mu_out.open(args.grad_mu, span);
    T* d_spread = spread_out.open(args.grad_spread, span);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const auto to = S::log_density(z[k], mu[k], math::Density<T>{inverse[k], constant[k]});
      log_prob[k] = to.value;
      d_z[k] = -grad[k] * to.d_mu;
      d_mu[k] = grad[k] * to.d_mu;
      d_spread[k] = grad[k] * to.d_spread;
    }
    z_out.close(args.grad_z, span);
    mu_out.close(args.grad_mu, span);
    spread_out.close(args.grad_spread, span);
    return log_prob;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class T>
void bernoulli_forward(const BernoulliArgs& args, int64_t begin, int64_t end) {
  const Rows rows(args.shape);
  Input<T> logits_in;
  BroadcastInput<T> prior_in(args.prior, args.shape);
  Output<T> kl_out;
  const auto number = math::bernoulli_prior(scale_at<T>(args.prior.number, 0));
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{args.shape, i, n};
    const T* logits = logits_in.load(args.logits, span);
    T* kl = kl_out.open(args.kl, span);
    if (prior_in.is_number()) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) kl[k] = math::bernoulli_kl(logits[k], number).value;
    } else {
      const T* prior = prior_in.load(span);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        kl[k] = math::bernoulli_kl(logits[k], math::bernoulli_prior(prior[k])).value;
    }
    kl_out.close(args.kl, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class T>
void bernoulli_backward(const BernoulliArgs& args, int64_t begin, int64_t end) {
  const Rows rows(args.shape);
  Input<T> logits_in;
  BroadcastInput<T> prior_in(args.prior, args.shape);
  Output<T> logits_out, prior_out;
  UpstreamBlocks<T> upstream(args.grad_kl_elements, args.grad_kl);
  T kl[kBlock<T>];
  const auto number = math::bernoulli_prior(scale_at<T>(args.prior.number, 0));
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{args.shape, i, n};
    const T* logits = logits_in.load(args.logits, span);
    const T* grad = upstream.load(span);
    T* d_logits = logits_out.open(args.grad_logits, span);
    if (prior_in.is_number() && !args.grad_prior) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const auto to = math::bernoulli_kl(logits[k], number);
        kl[k] = to.value;
        d_logits[k] = grad[k] * to.d_logit;
      }
    } else {
      const T* prior = prior_in.load(span);
      T* d_prior = prior_out.open(args.grad_prior, span);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const auto to = math::bernoulli_kl(logits[k], math::bernoulli_prior(prior[k]));
        kl[k] = to.value;
        d_logits[k] = grad[k] * to.d_logit;
        d_prior[k] = grad[k] * to.d_prior;
      }
      prior_out.close(args.grad_prior, span);
    }
    logits_out.close(args.grad_logits, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class Args>
int64_t row_tasks(const Args& args) {
  return Rows(args.shape).tasks();
}
template <class Args>
int64_t row_cost(const Args& args) {
  return args.shape.row < kSegment ? Rows(args.shape).rows_per_task * args.shape.row : kSegment;
}
int64_t normal_tasks(const NormalArgs& args) { return segments_of(args.numel, kSegment); }
int64_t normal_cost(const NormalArgs&) { return kSegment; }

// A kernel for both types of the computation, of whichever parameterization its arguments say.
#define FGBG_PARAMETERIZED_AS(kernel, Args, T)                                                               \
  [](const Args& args, int64_t begin, int64_t end) {                                                         \
    with_parameterization(args.parameterization, [&](auto s) { kernel<T, decltype(s)>(args, begin, end); }); \
  }
#define FGBG_PARAMETERIZED(kernel, Args) \
  {FGBG_PARAMETERIZED_AS(kernel, Args, float), FGBG_PARAMETERIZED_AS(kernel, Args, double)}

}  // namespace

void add_latents(Kernels& table) {
  table.normal = {normal_tasks, normal_cost, {normal<float>, normal<double>}};
  table.gaussian_forward = {row_tasks, row_cost, FGBG_PARAMETERIZED(gaussian_forward, GaussianArgs)};
  table.gaussian_backward = {row_tasks, row_cost, FGBG_PARAMETERIZED(gaussian_backward, GaussianArgs)};
  table.log_prob_forward = {row_tasks, row_cost, FGBG_PARAMETERIZED(log_prob_forward, LogProbArgs)};
  table.log_prob_backward = {row_tasks, row_cost, FGBG_PARAMETERIZED(log_prob_backward, LogProbArgs)};
  table.bernoulli_forward = {row_tasks, row_cost, {bernoulli_forward<float>, bernoulli_forward<double>}};
  table.bernoulli_backward = {row_tasks, row_cost, {bernoulli_backward<float>, bernoulli_backward<double>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
