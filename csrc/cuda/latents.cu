// Latent ops on CUDA: noise, reparameterised samples, the Gaussian and Bernoulli KL, and the Gaussian
// log-density.
//
// One pass over memory: forward reads mu and spread (and priors) once and writes z, the KL being summed in
// registers; backward reads them again with the gradients, recomputes eps from the seed, and also sums
// the KL if partial sums are wanted.
#include "../math/gaussian.h"
#include "../math/mask.h"
#include "../math/philox.h"
#include "final_reduction.cuh"
#include "kernels.h"
#include "teams.cuh"

namespace fgbg::cuda {
namespace {

// V elements of row b from element e on.
template <class F>
struct Group {
  using T = typename F::T;
  static constexpr int V = F::V;

  const Shape& shape;
  int64_t b, e;

  __device__ int64_t index() const { return b * shape.row + e; }
  __device__ int64_t offset(const View& v) const {
    int64_t offset = 0, sample = b;
    for (int d = shape.leading - 1; d >= 1; --d) {  // usually none
      offset += (sample % shape.size[d]) * v.stride[d];
      sample /= shape.size[d];
    }
    offset += sample * v.stride[0];
    if (V > 1 || v.run >= shape.row) return offset + e;
    int64_t rest = e;
#pragma unroll
    for (int d = kDims - 1; d >= 1; --d) {
      offset += (rest % shape.size[d]) * v.stride[d];
      rest /= shape.size[d];
    }
    return offset;
  }
  // `draw` counts whole tensors of this shape that follow each other.
  __device__ Raw<F> fetch(const View& v, int64_t draw = 0) const {
    Raw<F> raw;
    cuda::fetch<F>(v, draw * shape.numel + offset(v), raw);
    return raw;
  }
  // Nothing where the operand is absent.
  __device__ Raw<F> fetch_if(const View& v) const {
    Raw<F> raw = {};
    if (v) cuda::fetch<F>(v, offset(v), raw);
    return raw;
  }
  __device__ void store(const View& v, const T (&in)[V], int64_t draw = 0) const {
    if (v) cuda::store<F>(v, draw * shape.numel + offset(v), in);
  }
};

// Calls body(group) for the groups of this thread's items, and writes the partial sums of the KL that body
// accumulates, if wanted. The last block reduces them.
template <class F, class Args, class Body>
__device__ __forceinline__ void for_groups(const Args& args, typename F::T (&sum)[1], Body body) {
  for_items<F>(args, args.shape.row, [&](const Item& item) {
#pragma unroll 1
    for (int at = item.lane * F::V; at < item.length; at += item.step)
      body(Group<F>{args.shape, item.b, item.begin + at});
    if (args.partial) write_sums(item, sum, 1, 0, args.partial);
  });
  final_reduction_if_last<typename F::T>(args);
}

__device__ __forceinline__ uint64_t seed_of(const Noise& noise) {
  return static_cast<uint64_t>(noise.seed_on_device ? *noise.seed_on_device : noise.seed);
}

// Numbers start .. start + V - 1 of the stream; start is a multiple of 4 if V > 1.
template <int V>
__device__ __forceinline__ void normals(uint64_t seed, uint64_t start, float (&out)[V]) {
  if constexpr (V == 1) {
    const math::Normal4 quad = math::normal4(seed, start / 4);
    const int k = static_cast<int>(start % 4);
    out[0] = k == 0 ? quad.n[0] : (k == 1 ? quad.n[1] : (k == 2 ? quad.n[2] : quad.n[3]));
  } else {
#pragma unroll
    for (int q = 0; q < V / 4; ++q) {
      const math::Normal4 quad = math::normal4(seed, start / 4 + q);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[4 * q + k] = quad.n[k];
    }
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    normal_kernel(const __grid_constant__ NormalArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const uint64_t seed = seed_of(args.noise);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread * V; i < args.numel; i += threads * V) {
    float eps[V];
    normals(seed, args.noise.offset + static_cast<uint64_t>(i), eps);
    T out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = static_cast<T>(eps[j]);
    store<F>(args.out, i, out);
  }
}

template <class F, class T, int V>
__device__ __forceinline__ void unpack(const BroadcastView& from, const Raw<F>& raw, T (&out)[V]) {
  if (from.view) return unpack<F>(from.view, raw, out);
  const T number = scale_at<T>(from.number, 0);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = number;
}

// The KL of each element.
template <class S, class F, class T, int V>
__device__ __forceinline__ void kl_of(const GaussianArgs& args, const Raw<F>& raw_prior_mu,
                                      const Raw<F>& raw_prior_spread, const T (&mu)[V], const T (&spread)[V],
                                      math::GaussianKl<T> (&kl)[V]) {
  if (args.standard) {
#pragma unroll
    for (int j = 0; j < V; ++j) kl[j] = S::standard_kl(mu[j], spread[j]);
    return;
  }
  T prior_mu[V], prior_spread[V];
  unpack<F>(args.prior_mu, raw_prior_mu, prior_mu);
  unpack<F>(args.prior_spread, raw_prior_spread, prior_spread);
#pragma unroll
  for (int j = 0; j < V; ++j) kl[j] = S::kl(mu[j], spread[j], prior_mu[j], S::prepare(prior_spread[j]));
}

// kDraws: whether z is wanted.
template <class F, bool kDraws, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    gaussian_forward_kernel(const __grid_constant__ GaussianArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const bool wants_kl = args.kl || args.partial;
  const uint64_t seed = kDraws ? seed_of(args.noise) : 0;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    const Raw<F> raw_mu = g.fetch(args.mu), raw_spread = g.fetch(args.spread);
    const Raw<F> raw_prior_mu = g.fetch_if(args.prior_mu.view);
    const Raw<F> raw_prior_spread = g.fetch_if(args.prior_spread.view);
    T mu[V], spread[V];
    unpack<F>(args.mu, raw_mu, mu);
    unpack<F>(args.spread, raw_spread, spread);
    if constexpr (kDraws) {
      T deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = S::std(spread[j]);
#pragma unroll 1
      for (int64_t s = 0; s < args.samples; ++s) {
        float eps[V];
        normals(seed, args.noise.offset + static_cast<uint64_t>(s * args.shape.numel + g.index()), eps);
        T z[V];
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = math::fma(deviation[j], static_cast<T>(eps[j]), mu[j]);
        g.store(args.z, z, s);
      }
    }
    if (!wants_kl) return;
    math::GaussianKl<T> to[V];
    kl_of<S>(args, raw_prior_mu, raw_prior_spread, mu, spread, to);
    T kl[V];
#pragma unroll
    for (int j = 0; j < V; ++j) {
      kl[j] = to[j].value;
      sum[0] += kl[j];
    }
    g.store(args.kl, kl);
  });
}

// The upstream gradient of each element: of its own, if it has one, or that of its row.
template <class F, class T, int V>
__device__ __forceinline__ void unpack_upstream(const View& elements, const Upstream& reduced,
                                                const Group<F>& g, const Raw<F>& raw, T (&u)[V]) {
  if (elements) return unpack<F>(elements, raw, u);
  const T value = upstream<T>(reduced, g.b);
#pragma unroll
  for (int j = 0; j < V; ++j) u[j] = value;
}

// d/d(mu, spread, prior_mu, prior_spread) of upstream_z . z + upstream_kl . kl. kDraws: whether there is a z.
template <class F, bool kDraws, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    gaussian_backward_kernel(const __grid_constant__ GaussianArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const bool has_kl = args.grad_kl || args.grad_kl_elements;
  const uint64_t seed = kDraws ? seed_of(args.noise) : 0;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    T spread[V], d_mu[V] = {}, d_spread[V] = {}, d_prior_mu[V] = {}, d_prior_spread[V] = {};
    const Raw<F> raw_spread = g.fetch(args.spread);
    const Raw<F> raw_mu = g.fetch_if(args.mu), raw_elements = g.fetch_if(args.grad_kl_elements);
    const Raw<F> raw_prior_mu = g.fetch_if(args.prior_mu.view);
    const Raw<F> raw_prior_spread = g.fetch_if(args.prior_spread.view);
    Raw<F> raw_grad;
    if constexpr (kDraws) raw_grad = g.fetch(args.grad_z);
    unpack<F>(args.spread, raw_spread, spread);
    if constexpr (kDraws) {
      T deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = S::std(spread[j]);
#pragma unroll 1
      for (int64_t s = 0; s < args.samples; ++s) {
        if (s > 0) raw_grad = g.fetch(args.grad_z, s);
        float eps[V];
        normals(seed, args.noise.offset + static_cast<uint64_t>(s * args.shape.numel + g.index()), eps);
        T grad[V];
        unpack<F>(args.grad_z, raw_grad, grad);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          d_mu[j] += grad[j];
          d_spread[j] += grad[j] * S::dz_dspread(deviation[j], static_cast<T>(eps[j]));
        }
      }
    }
    if (has_kl) {
      T mu[V], u[V];
      unpack<F>(args.mu, raw_mu, mu);
      unpack_upstream(args.grad_kl_elements, args.grad_kl, g, raw_elements, u);
      math::GaussianKl<T> kl[V];
      kl_of<S>(args, raw_prior_mu, raw_prior_spread, mu, spread, kl);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        sum[0] += kl[j].value;
        d_mu[j] += u[j] * kl[j].d_mu;
        d_spread[j] += u[j] * kl[j].d_spread;
        d_prior_mu[j] = -u[j] * kl[j].d_mu;
        d_prior_spread[j] = u[j] * kl[j].d_prior_spread;
      }
    }
    g.store(args.grad_mu, d_mu);
    g.store(args.grad_spread, d_spread);
    g.store(args.grad_prior_mu, d_prior_mu);
    g.store(args.grad_prior_spread, d_prior_spread);
  });
}

// kGradients: d/d(z, mu, spread) as well.
template <class F, bool kGradients, class S>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    log_prob_kernel(const __grid_constant__ LogProbArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    const Raw<F> raw_z = g.fetch(args.z), raw_mu = g.fetch_if(args.mu.view);
    const Raw<F> raw_spread = g.fetch_if(args.spread.view);
    Raw<F> raw_elements;
    if constexpr (kGradients) raw_elements = g.fetch_if(args.grad_elements);
    T z[V], mu[V], spread[V], log_prob[V], u[V], d_z[V], d_mu[V], d_spread[V];
    unpack<F>(args.z, raw_z, z);
    unpack<F>(args.mu, raw_mu, mu);
    unpack<F>(args.spread, raw_spread, spread);
    if constexpr (kGradients) unpack_upstream(args.grad_elements, args.grad, g, raw_elements, u);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto to = S::log_density(z[j], mu[j], S::prepare_density(spread[j]));
      log_prob[j] = to.value;
      sum[0] += to.value;
      if constexpr (kGradients) {
        d_mu[j] = u[j] * to.d_mu;
        d_z[j] = -d_mu[j];
        d_spread[j] = u[j] * to.d_spread;
      }
    }
    if constexpr (kGradients) {
      g.store(args.grad_z, d_z);
      g.store(args.grad_mu, d_mu);
      g.store(args.grad_spread, d_spread);
    } else {
      g.store(args.log_prob, log_prob);
    }
  });
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    bernoulli_forward_kernel(const __grid_constant__ BernoulliArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    const Raw<F> raw_logits = g.fetch(args.logits), raw_prior = g.fetch_if(args.prior.view);
    T logits[V], prior[V], kl[V];
    unpack<F>(args.logits, raw_logits, logits);
    unpack<F>(args.prior, raw_prior, prior);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      kl[j] = math::bernoulli_kl(logits[j], math::bernoulli_prior(prior[j])).value;
      sum[0] += kl[j];
    }
    g.store(args.kl, kl);
  });
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    bernoulli_backward_kernel(const __grid_constant__ BernoulliArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    const Raw<F> raw_logits = g.fetch(args.logits), raw_prior = g.fetch_if(args.prior.view);
    const Raw<F> raw_elements = g.fetch_if(args.grad_kl_elements);
    T logits[V], prior[V], u[V], d_logits[V], d_prior[V];
    unpack<F>(args.logits, raw_logits, logits);
    unpack<F>(args.prior, raw_prior, prior);
    unpack_upstream(args.grad_kl_elements, args.grad_kl, g, raw_elements, u);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto kl = math::bernoulli_kl(logits[j], math::bernoulli_prior(prior[j]));
      sum[0] += kl.value;
      d_logits[j] = u[j] * kl.d_logit;
      d_prior[j] = u[j] * kl.d_prior;
    }
    g.store(args.grad_logits, d_logits);
    g.store(args.grad_prior, d_prior);
  });
}

FormatOf format_of(const Shape& shape, bool f64, std::initializer_list<View> views) {
  return choose_format(f64, shape.row, views, [](const View& v) { return v.run; });
}

FormatOf format_of(const GaussianArgs& a, bool f64) {
  const FormatOf format =
      format_of(a.shape, f64,
                {a.mu, a.spread, a.prior_mu.view, a.prior_spread.view, a.z, a.kl, a.grad_z,
                 a.grad_kl_elements, a.grad_mu, a.grad_spread, a.grad_prior_mu, a.grad_prior_spread});
  // Four numbers come from one block of the stream.
  return a.noise.offset % 4 != 0 && format != FormatOf::float64 ? FormatOf::general : format;
}

FormatOf format_of(const LogProbArgs& a, bool f64) {
  return format_of(
      a.shape, f64,
      {a.z, a.mu.view, a.spread.view, a.log_prob, a.grad_elements, a.grad_z, a.grad_mu, a.grad_spread});
}

FormatOf format_of(const BernoulliArgs& a, bool f64) {
  return format_of(a.shape, f64,
                   {a.logits, a.prior.view, a.kl, a.grad_kl_elements, a.grad_logits, a.grad_prior});
}

// A kernel in every format.
#define FGBG_KERNELS(Name, Args, ...)     \
  struct Name {                           \
    template <class F>                    \
    static auto get() {                   \
      void (*kernel)(Args) = __VA_ARGS__; \
      return kernel;                      \
    }                                     \
  };
FGBG_KERNELS(Normal, NormalArgs, normal_kernel<F>)
FGBG_KERNELS(BernoulliForward, BernoulliArgs, bernoulli_forward_kernel<F>)
FGBG_KERNELS(BernoulliBackward, BernoulliArgs, bernoulli_backward_kernel<F>)
template <bool kDraws, class S>
FGBG_KERNELS(GaussianForward, GaussianArgs, gaussian_forward_kernel<F, kDraws, S>)
template <bool kDraws, class S>
FGBG_KERNELS(GaussianBackward, GaussianArgs, gaussian_backward_kernel<F, kDraws, S>)
template <bool kGradients, class S>
FGBG_KERNELS(LogProb, LogProbArgs, log_prob_kernel<F, kGradients, S>)
#undef FGBG_KERNELS

template <class Kernels, class Args>
void run_rows(Args args, bool f64, Stream stream) {
  const Cut cut = cut_of(args.shape, args.shape.row);
  args.segment = cut.segment;
  args.team = cut.team;
  launch(kernel_for<Kernels>(format_of(args, f64)), args.shape.samples * row_segments(args.shape), cut.team,
         args, args.blocks_done, 0, stream);
}

// Kernels of whichever parameterization the arguments say. kFlag: their second parameter.
template <template <bool, class> class Kernels, bool kFlag, class Args>
void run_parameterized(const Args& args, bool f64, Stream stream) {
  switch (args.parameterization) {
    case Parameterization::logvar: return run_rows<Kernels<kFlag, math::LogVar>>(args, f64, stream);
    case Parameterization::log_std: return run_rows<Kernels<kFlag, math::LogStd>>(args, f64, stream);
    case Parameterization::std: return run_rows<Kernels<kFlag, math::Std>>(args, f64, stream);
  }
}

}  // namespace

int64_t row_segments(const Shape& shape) { return segments_of(shape.row, cut_of(shape, shape.row).segment); }

void normal(const NormalArgs& args, bool f64, Stream stream) {
  FormatOf format = choose_format(f64, args.numel, {args.out}, [&](const View&) { return args.numel; });
  if (args.noise.offset % 4 != 0 && format != FormatOf::float64) format = FormatOf::general;
  launch(kernel_for<Normal>(format), segments_of(args.numel, kWarp * width_of(format)), kWarp, args, false, 0,
         stream);
}

void gaussian_forward(const GaussianArgs& args, bool f64, Stream stream) {
  args.z ? run_parameterized<GaussianForward, true>(args, f64, stream)
         : run_parameterized<GaussianForward, false>(args, f64, stream);
}

void gaussian_backward(const GaussianArgs& args, bool f64, Stream stream) {
  args.grad_z ? run_parameterized<GaussianBackward, true>(args, f64, stream)
              : run_parameterized<GaussianBackward, false>(args, f64, stream);
}

void log_prob_forward(const LogProbArgs& args, bool f64, Stream stream) {
  run_parameterized<LogProb, false>(args, f64, stream);
}

void log_prob_backward(const LogProbArgs& args, bool f64, Stream stream) {
  run_parameterized<LogProb, true>(args, f64, stream);
}

void bernoulli_forward(const BernoulliArgs& args, bool f64, Stream stream) {
  run_rows<BernoulliForward>(args, f64, stream);
}

void bernoulli_backward(const BernoulliArgs& args, bool f64, Stream stream) {
  run_rows<BernoulliBackward>(args, f64, stream);
}

}  // namespace fgbg::cuda
