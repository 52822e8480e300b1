// Latent ops on the CPU: noise, reparameterised samples, and the Gaussian and Bernoulli KL.
// One pass: every operand of a block is read once, all results of the block are written from it.
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
  const Shape shape = {{1, 1, 1, 1, args.numel}, args.numel, args.numel, args.numel};
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

template <class T>
void gaussian_forward(const GaussianArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Rows rows(shape);
  const bool wants_kl = args.kl || args.partial;
  Normals normals(args.noise);
  Input<T> mu_in, logvar_in, prior_mu_in, prior_logvar_in;
  Output<T> z_out, slope_out, kl_out;
  T zeros[kBlock<T>] = {}, std[kBlock<T>];
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{shape, i, n};
    const T* mu = mu_in.load(args.mu, span);
    const T* logvar = logvar_in.load(args.logvar, span);
    if (args.z) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) std[k] = math::std_from_logvar(logvar[k]);
      for (int64_t s = 0; s < args.samples; ++s) {
        const View to = draw(args.z, shape, s);
        const float* eps = normals.fill(s * shape.numel + i, n);
        T* z = z_out.open(to, span);
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k) z[k] = math::fma(std[k], static_cast<T>(eps[k]), mu[k]);
        z_out.close(to, span);
        if (args.dz_dlogvar) {
          T* slope = slope_out.open(args.dz_dlogvar, span);
          FGBG_SIMD
          for (int64_t k = 0; k < n; ++k) slope[k] = math::dz_dlogvar(std[k], static_cast<T>(eps[k]));
          slope_out.close(args.dz_dlogvar, span);
        }
      }
    }
    if (!wants_kl) return nullptr;
    T* kl = kl_out.open(args.kl, span);
    if (args.prior_mu || args.prior_logvar) {
      const T* prior_mu = args.prior_mu ? prior_mu_in.load(args.prior_mu, span) : zeros;
      const T* prior_logvar = args.prior_logvar ? prior_logvar_in.load(args.prior_logvar, span) : zeros;
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        kl[k] = math::gaussian_kl(mu[k], logvar[k], prior_mu[k], prior_logvar[k]).value;
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) kl[k] = math::gaussian_kl(mu[k], logvar[k]).value;
    }
    kl_out.close(args.kl, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

// Accumulates, or for the first draw writes, the gradients through z of one draw.
template <bool kAdd, class T>
void draw_gradients(const T* grad, const T* slope, int64_t n, T* d_mu, T* d_logvar) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    d_mu[k] = (kAdd ? d_mu[k] : T(0)) + grad[k];
    d_logvar[k] = (kAdd ? d_logvar[k] : T(0)) + grad[k] * slope[k];
  }
}

// Accumulates, or without a z writes, the gradients of a KL against N(0, 1).
template <bool kAdd, bool kValue, class T>
void standard_kl_gradients(const T* mu, const T* logvar, const T* grad, int64_t n, T* d_mu, T* d_logvar,
                           T* kl) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    const auto to = math::gaussian_kl(mu[k], logvar[k]);
    if (kValue) kl[k] = to.value;
    d_mu[k] = (kAdd ? d_mu[k] : T(0)) + grad[k] * to.d_mu;
    d_logvar[k] = (kAdd ? d_logvar[k] : T(0)) + grad[k] * to.d_logvar;
  }
}

// d/d(mu, logvar, prior_mu, prior_logvar) of upstream_z . z + upstream_kl . kl; eps is
// recomputed from the seed unless forward has kept dz_dlogvar. If partial sums are wanted, the KL's as well.
template <class T>
void gaussian_backward(const GaussianArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Rows rows(shape);
  const bool has_kl = args.grad_kl || args.grad_kl_elements;
  const bool standard = !args.prior_mu && !args.prior_logvar;
  Normals normals(args.noise);
  Input<T> mu_in, logvar_in, prior_mu_in, prior_logvar_in, grad_z_in, slope_in;
  Output<T> mu_out, logvar_out, prior_mu_out, prior_logvar_out;
  UpstreamBlocks<T> upstream(args.grad_kl_elements, args.grad_kl);
  T zeros[kBlock<T>] = {}, kl[kBlock<T>], std[kBlock<T>], made[kBlock<T>];
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{shape, i, n};
    const T* logvar = logvar_in.load(args.logvar, span);
    T* d_mu = mu_out.open(args.grad_mu, span);
    T* d_logvar = logvar_out.open(args.grad_logvar, span);
    if (args.grad_z && args.dz_dlogvar) {
      draw_gradients<false>(grad_z_in.load(args.grad_z, span), slope_in.load(args.dz_dlogvar, span), n, d_mu,
                            d_logvar);
    } else if (args.grad_z) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) std[k] = math::std_from_logvar(logvar[k]);
      for (int64_t s = 0; s < args.samples; ++s) {
        const T* grad = grad_z_in.load(draw(args.grad_z, shape, s), span);
        const float* eps = normals.fill(s * shape.numel + i, n);
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k) made[k] = math::dz_dlogvar(std[k], static_cast<T>(eps[k]));
        (s == 0 ? draw_gradients<false, T> : draw_gradients<true, T>)(grad, made, n, d_mu, d_logvar);
      }
    } else if (!has_kl || !standard) {  // otherwise the loop of the KL writes them
      for (int64_t k = 0; k < n; ++k) d_mu[k] = d_logvar[k] = T(0);
    }
    if (has_kl && standard) {
      const T* mu = mu_in.load(args.mu, span);
      const T* grad = upstream.load(span);
      if (args.grad_z)
        standard_kl_gradients<true, false>(mu, logvar, grad, n, d_mu, d_logvar, kl);
      else if (args.partial)
        standard_kl_gradients<false, true>(mu, logvar, grad, n, d_mu, d_logvar, kl);
      else
        standard_kl_gradients<false, false>(mu, logvar, grad, n, d_mu, d_logvar, kl);
    } else if (has_kl) {
      const T* mu = mu_in.load(args.mu, span);
      const T* grad = upstream.load(span);
      const T* prior_mu = args.prior_mu ? prior_mu_in.load(args.prior_mu, span) : zeros;
      const T* prior_logvar = args.prior_logvar ? prior_logvar_in.load(args.prior_logvar, span) : zeros;
      T* d_prior_mu = prior_mu_out.open(args.grad_prior_mu, span);
      T* d_prior_logvar = prior_logvar_out.open(args.grad_prior_logvar, span);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const auto to = math::gaussian_kl(mu[k], logvar[k], prior_mu[k], prior_logvar[k]);
        kl[k] = to.value;
        d_mu[k] += grad[k] * to.d_mu;
        d_logvar[k] += grad[k] * to.d_logvar;
        d_prior_mu[k] = -grad[k] * to.d_mu;
        d_prior_logvar[k] = grad[k] * to.d_prior_logvar;
      }
      prior_mu_out.close(args.grad_prior_mu, span);
      prior_logvar_out.close(args.grad_prior_logvar, span);
    } else {
      // The sample does not depend on the prior.
      T* d_prior_mu = prior_mu_out.open(args.grad_prior_mu, span);
      T* d_prior_logvar = prior_logvar_out.open(args.grad_prior_logvar, span);
      for (int64_t k = 0; k < n; ++k) d_prior_mu[k] = d_prior_logvar[k] = T(0);
      prior_mu_out.close(args.grad_prior_mu, span);
      prior_logvar_out.close(args.grad_prior_logvar, span);
    }
    mu_out.close(args.grad_mu, span);
    logvar_out.close(args.grad_logvar, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class T>
void bernoulli_forward(const BernoulliArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Rows rows(shape);
  Input<T> logits_in, prior_in;
  Output<T> kl_out;
  const T constant = static_cast<T>(args.prior_logit);
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{shape, i, n};
    const T* logits = logits_in.load(args.logits, span);
    T* kl = kl_out.open(args.kl, span);
    if (args.prior) {
      const T* prior = prior_in.load(args.prior, span);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) kl[k] = math::bernoulli_kl(logits[k], prior[k]).value;
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) kl[k] = math::bernoulli_kl(logits[k], constant).value;
    }
    kl_out.close(args.kl, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class T>
void bernoulli_backward(const BernoulliArgs& args, int64_t begin, int64_t end) {
  const Shape& shape = args.shape;
  const Rows rows(shape);
  Input<T> logits_in, prior_in;
  Output<T> logits_out, prior_out;
  UpstreamBlocks<T> upstream(args.grad_kl_elements, args.grad_kl);
  T kl[kBlock<T>];
  const T constant = static_cast<T>(args.prior_logit);
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{shape, i, n};
    const T* logits = logits_in.load(args.logits, span);
    const T* grad = upstream.load(span);
    T* d_logits = logits_out.open(args.grad_logits, span);
    if (args.prior) {
      const T* prior = prior_in.load(args.prior, span);
      T* d_prior = prior_out.open(args.grad_prior, span);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const auto to = math::bernoulli_kl(logits[k], prior[k]);
        kl[k] = to.value;
        d_logits[k] = grad[k] * to.d_logit;
        d_prior[k] = grad[k] * to.d_prior;
      }
      prior_out.close(args.grad_prior, span);
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const auto to = math::bernoulli_kl(logits[k], constant);
        kl[k] = to.value;
        d_logits[k] = grad[k] * to.d_logit;
      }
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

}  // namespace

void add_latents(Kernels& table) {
  table.normal = {normal_tasks, normal_cost, {normal<float>, normal<double>}};
  table.gaussian_forward = {row_tasks, row_cost, {gaussian_forward<float>, gaussian_forward<double>}};
  table.gaussian_backward = {row_tasks, row_cost, {gaussian_backward<float>, gaussian_backward<double>}};
  table.bernoulli_forward = {row_tasks, row_cost, {bernoulli_forward<float>, bernoulli_forward<double>}};
  table.bernoulli_backward = {row_tasks, row_cost, {bernoulli_backward<float>, bernoulli_backward<double>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
