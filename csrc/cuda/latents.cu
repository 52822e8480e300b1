// Latent ops on CUDA: noise, reparameterised samples, and the Gaussian and Bernoulli KL.
//
// One pass over memory: forward reads mu and logvar (and priors) once and writes z, the KL being summed in
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
    int64_t offset = b * v.stride[0];
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

// The KL of an element, and the priors that it takes.
template <class T>
__device__ __forceinline__ math::GaussianKl<T> kl_of(const GaussianArgs& args, T mu, T logvar, T prior_mu,
                                                     T prior_logvar) {
  if (!args.prior_mu && !args.prior_logvar) return math::gaussian_kl(mu, logvar);
  return math::gaussian_kl(mu, logvar, prior_mu, prior_logvar);
}
template <class F, class T, int V>
__device__ __forceinline__ void unpack_if(const View& v, const Raw<F>& raw, T (&out)[V]) {
  if (v) return unpack<F>(v, raw, out);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] = T(0);
}

// kDraws: whether z is wanted.
template <class F, bool kDraws>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    gaussian_forward_kernel(const __grid_constant__ GaussianArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const bool wants_kl = args.kl || args.partial;
  const uint64_t seed = kDraws ? seed_of(args.noise) : 0;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    const Raw<F> raw_mu = g.fetch(args.mu), raw_logvar = g.fetch(args.logvar);
    const Raw<F> raw_prior_mu = g.fetch_if(args.prior_mu), raw_prior_logvar = g.fetch_if(args.prior_logvar);
    T mu[V], logvar[V];
    unpack<F>(args.mu, raw_mu, mu);
    unpack<F>(args.logvar, raw_logvar, logvar);
    if constexpr (kDraws) {
      T deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = math::std_from_logvar(logvar[j]);
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
    T prior_mu[V], prior_logvar[V], kl[V];
    unpack_if(args.prior_mu, raw_prior_mu, prior_mu);
    unpack_if(args.prior_logvar, raw_prior_logvar, prior_logvar);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      kl[j] = kl_of(args, mu[j], logvar[j], prior_mu[j], prior_logvar[j]).value;
      sum[0] += kl[j];
    }
    g.store(args.kl, kl);
  });
}

// The upstream gradient of each element of a KL: of its own, if it has one, or that of its row.
template <class F, class Args, class T, int V>
__device__ __forceinline__ void unpack_upstream(const Args& args, const Group<F>& g, const Raw<F>& raw,
                                                T (&u)[V]) {
  if (args.grad_kl_elements) return unpack<F>(args.grad_kl_elements, raw, u);
  const T value = upstream<T>(args.grad_kl, g.b);
#pragma unroll
  for (int j = 0; j < V; ++j) u[j] = value;
}

// d/d(mu, logvar, prior_mu, prior_logvar) of upstream_z . z + upstream_kl . kl. kDraws: whether there is a z.
template <class F, bool kDraws>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    gaussian_backward_kernel(const __grid_constant__ GaussianArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const bool has_kl = args.grad_kl || args.grad_kl_elements;
  const uint64_t seed = kDraws ? seed_of(args.noise) : 0;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    T logvar[V], d_mu[V] = {}, d_logvar[V] = {}, d_prior_mu[V] = {}, d_prior_logvar[V] = {};
    const Raw<F> raw_logvar = g.fetch(args.logvar);
    const Raw<F> raw_mu = g.fetch_if(args.mu), raw_elements = g.fetch_if(args.grad_kl_elements);
    const Raw<F> raw_prior_mu = g.fetch_if(args.prior_mu), raw_prior_logvar = g.fetch_if(args.prior_logvar);
    Raw<F> raw_grad;
    if constexpr (kDraws) raw_grad = g.fetch(args.grad_z);
    unpack<F>(args.logvar, raw_logvar, logvar);
    if constexpr (kDraws) {
      T deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = math::std_from_logvar(logvar[j]);
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
          d_logvar[j] += grad[j] * math::dz_dlogvar(deviation[j], static_cast<T>(eps[j]));
        }
      }
    }
    if (has_kl) {
      T mu[V], prior_mu[V], prior_logvar[V], u[V];
      unpack<F>(args.mu, raw_mu, mu);
      unpack_if(args.prior_mu, raw_prior_mu, prior_mu);
      unpack_if(args.prior_logvar, raw_prior_logvar, prior_logvar);
      unpack_upstream(args, g, raw_elements, u);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const auto kl = kl_of(args, mu[j], logvar[j], prior_mu[j], prior_logvar[j]);
        sum[0] += kl.value;
        d_mu[j] += u[j] * kl.d_mu;
        d_logvar[j] += u[j] * kl.d_logvar;
        d_prior_mu[j] = -u[j] * kl.d_mu;
        d_prior_logvar[j] = u[j] * kl.d_prior_logvar;
      }
    }
    g.store(args.grad_mu, d_mu);
    g.store(args.grad_logvar, d_logvar);
    g.store(args.grad_prior_mu, d_prior_mu);
    g.store(args.grad_prior_logvar, d_prior_logvar);
  });
}

template <class F, class T, int V>
__device__ __forceinline__ void unpack_prior(const BernoulliArgs& args, const Raw<F>& raw, T (&prior)[V]) {
  if (args.prior) return unpack<F>(args.prior, raw, prior);
#pragma unroll
  for (int j = 0; j < V; ++j) prior[j] = static_cast<T>(args.prior_logit);
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocks<F>)
    bernoulli_forward_kernel(const __grid_constant__ BernoulliArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  T sum[1] = {};
  for_groups<F>(args, sum, [&](const Group<F>& g) {
    const Raw<F> raw_logits = g.fetch(args.logits), raw_prior = g.fetch_if(args.prior);
    T logits[V], prior[V], kl[V];
    unpack<F>(args.logits, raw_logits, logits);
    unpack_prior(args, raw_prior, prior);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      kl[j] = math::bernoulli_kl(logits[j], prior[j]).value;
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
    const Raw<F> raw_logits = g.fetch(args.logits), raw_prior = g.fetch_if(args.prior);
    const Raw<F> raw_elements = g.fetch_if(args.grad_kl_elements);
    T logits[V], prior[V], u[V], d_logits[V], d_prior[V];
    unpack<F>(args.logits, raw_logits, logits);
    unpack_prior(args, raw_prior, prior);
    unpack_upstream(args, g, raw_elements, u);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto kl = math::bernoulli_kl(logits[j], prior[j]);
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
                {a.mu, a.logvar, a.prior_mu, a.prior_logvar, a.z, a.kl, a.grad_z, a.grad_kl_elements,
                 a.grad_mu, a.grad_logvar, a.grad_prior_mu, a.grad_prior_logvar});
  // Four numbers come from one block of the stream.
  return a.noise.offset % 4 != 0 && format != FormatOf::float64 ? FormatOf::general : format;
}

FormatOf format_of(const BernoulliArgs& a, bool f64) {
  return format_of(a.shape, f64, {a.logits, a.prior, a.kl, a.grad_kl_elements, a.grad_logits, a.grad_prior});
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
FGBG_KERNELS(GaussianForward, GaussianArgs, gaussian_forward_kernel<F, false>)
FGBG_KERNELS(GaussianForwardDraws, GaussianArgs, gaussian_forward_kernel<F, true>)
FGBG_KERNELS(GaussianBackward, GaussianArgs, gaussian_backward_kernel<F, false>)
FGBG_KERNELS(GaussianBackwardDraws, GaussianArgs, gaussian_backward_kernel<F, true>)
FGBG_KERNELS(BernoulliForward, BernoulliArgs, bernoulli_forward_kernel<F>)
FGBG_KERNELS(BernoulliBackward, BernoulliArgs, bernoulli_backward_kernel<F>)
#undef FGBG_KERNELS

template <class Kernels, class Args>
void run_rows(Args args, bool f64, Stream stream) {
  const Cut cut = cut_of(args.shape, args.shape.row);
  args.segment = cut.segment;
  args.team = cut.team;
  launch(kernel_for<Kernels>(format_of(args, f64)), args.shape.size[0] * row_segments(args.shape), cut.team,
         args, args.blocks_done, 0, stream);
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
  args.z ? run_rows<GaussianForwardDraws>(args, f64, stream) : run_rows<GaussianForward>(args, f64, stream);
}

void gaussian_backward(const GaussianArgs& args, bool f64, Stream stream) {
  args.grad_z ? run_rows<GaussianBackwardDraws>(args, f64, stream)
              : run_rows<GaussianBackward>(args, f64, stream);
}

void bernoulli_forward(const BernoulliArgs& args, bool f64, Stream stream) {
  run_rows<BernoulliForward>(args, f64, stream);
}

void bernoulli_backward(const BernoulliArgs& args, bool f64, Stream stream) {
  run_rows<BernoulliBackward>(args, f64, stream);
}

}  // namespace fgbg::cuda
