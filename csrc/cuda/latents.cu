// Latent ops on CUDA: noise, reparameterised samples, and the Gaussian and Bernoulli KL.
//
// One pass over memory: forward reads mu and logvar (and priors) once and writes z, the KL being summed in
// registers; backward reads them again with the gradients , recomputes eps from the seed, and also sums
// the KL if partial sums are wanted.
// A warp takes a segment of one sample, and writes its own partial sum of it.
#include "../math/gaussian.h"
#include "../math/mask.h"
#include "../math/philox.h"
#include "final_reduction.cuh"
#include "kernels.h"
#include "memory.cuh"

namespace fgbg::cuda {
namespace {

// V elements of row b from element e on.
template <class T, int V>
struct Group {
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
  __device__ Raw<V> fetch(const View& v, int64_t draw = 0) const {
    Raw<V> raw;
    cuda::fetch<T, V>(v, draw * shape.numel + offset(v), raw);
    return raw;
  }
  __device__ void load(const View& v, T (&out)[V], int64_t draw = 0) const {
    unpack<T, V>(v, fetch(v, draw), out);
  }
  __device__ void store(const View& v, const T (&in)[V], int64_t draw = 0) const {
    if (v) cuda::store<T, V>(v, draw * shape.numel + offset(v), in);
  }
};

// Calls body(group) for the groups of this warp's segments, and writes the
// partial sum of the KL that body accumulates, if wanted. The last block reduces the partial sums.
template <class T, int V, class Args, class Body>
__device__ __forceinline__ void for_row_groups(const Args& args, T& sum, Body body) {
  const Shape& shape = args.shape;
  const int64_t segments = segments_of(shape.row, args.segment);
  for_warp_items(shape.size[0] * segments, [&](int64_t item, int lane) {
    const int64_t b = item / segments, begin = item % segments * args.segment;
    const int64_t end = begin + args.segment < shape.row ? begin + args.segment : shape.row;
    for (int64_t e = begin + lane * V; e < end; e += kWarp * V) body(Group<T, V>{shape, b, e});
    if (!args.partial) return;
    const T total = warp_sum(sum);
    if (lane == 0) args.partial[item] = static_cast<double>(total);
    sum = T(0);
  });
  final_reduction_if_last<T>(args);
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

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    normal_kernel(const __grid_constant__ NormalArgs args) {
  const uint64_t seed = static_cast<uint64_t>(*args.noise.seed);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread * V; i < args.numel; i += threads * V) {
    float eps[V];
    normals(seed, args.noise.offset + static_cast<uint64_t>(i), eps);
    T out[V];
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = static_cast<T>(eps[j]);
    store<T, V>(args.out, i, out);
  }
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    gaussian_forward_kernel(const __grid_constant__ GaussianArgs args) {
  const Shape& shape = args.shape;
  const bool wants_kl = args.kl || args.partial;
  const uint64_t seed = args.z ? static_cast<uint64_t>(*args.noise.seed) : 0;
  T sum = T(0);
  for_row_groups<T, V>(args, sum, [&](const Group<T, V>& g) {
    const Raw<V> raw_mu = g.fetch(args.mu), raw_logvar = g.fetch(args.logvar);
    T mu[V], logvar[V];
    unpack<T, V>(args.mu, raw_mu, mu);
    unpack<T, V>(args.logvar, raw_logvar, logvar);
    if (args.z) {
      T deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = math::std_from_logvar(logvar[j]);
      for (int64_t s = 0; s < args.samples; ++s) {
        float eps[V];
        normals(seed, args.noise.offset + static_cast<uint64_t>(s * shape.numel + g.index()), eps);
        T z[V];
#pragma unroll
        for (int j = 0; j < V; ++j) z[j] = math::fma(deviation[j], static_cast<T>(eps[j]), mu[j]);
        g.store(args.z, z, s);
      }
    }
    if (!wants_kl) return;
    T prior_mu[V] = {}, prior_logvar[V] = {}, kl[V];
    if (args.prior_mu) g.load(args.prior_mu, prior_mu);
    if (args.prior_logvar) g.load(args.prior_logvar, prior_logvar);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      kl[j] = math::gaussian_kl(mu[j], logvar[j], prior_mu[j], prior_logvar[j]).value;
      sum += kl[j];
    }
    g.store(args.kl, kl);
  });
}

// The upstream gradient of each element of a KL.
template <class T, int V, class Args>
__device__ __forceinline__ void load_upstream(const Args& args, const Group<T, V>& g, T (&u)[V]) {
  if (args.grad_kl_elements) return g.load(args.grad_kl_elements, u);
  const T value = upstream<T>(args.grad_kl, g.b);
#pragma unroll
  for (int j = 0; j < V; ++j) u[j] = value;
}

// d/d(mu, logvar, prior_mu, prior_logvar) of upstream_z . z + upstream_kl . kl.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    gaussian_backward_kernel(const __grid_constant__ GaussianArgs args) {
  const Shape& shape = args.shape;
  const bool has_kl = args.grad_kl || args.grad_kl_elements;
  const uint64_t seed = args.grad_z ? static_cast<uint64_t>(*args.noise.seed) : 0;
  T sum = T(0);
  for_row_groups<T, V>(args, sum, [&](const Group<T, V>& g) {
    T logvar[V], d_mu[V] = {}, d_logvar[V] = {}, d_prior_mu[V] = {}, d_prior_logvar[V] = {};
    const Raw<V> raw_logvar = g.fetch(args.logvar);
    Raw<V> raw_mu;
    if (has_kl) raw_mu = g.fetch(args.mu);
    unpack<T, V>(args.logvar, raw_logvar, logvar);
    if (args.grad_z) {
      T deviation[V];
#pragma unroll
      for (int j = 0; j < V; ++j) deviation[j] = math::std_from_logvar(logvar[j]);
      for (int64_t s = 0; s < args.samples; ++s) {
        const Raw<V> raw_grad = g.fetch(args.grad_z, s);
        float eps[V];
        normals(seed, args.noise.offset + static_cast<uint64_t>(s * shape.numel + g.index()), eps);
        T grad[V];
        unpack<T, V>(args.grad_z, raw_grad, grad);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          d_mu[j] += grad[j];
          d_logvar[j] += grad[j] * math::dz_dlogvar(deviation[j], static_cast<T>(eps[j]));
        }
      }
    }
    if (has_kl) {
      T mu[V], prior_mu[V] = {}, prior_logvar[V] = {}, u[V];
      unpack<T, V>(args.mu, raw_mu, mu);
      if (args.prior_mu) g.load(args.prior_mu, prior_mu);
      if (args.prior_logvar) g.load(args.prior_logvar, prior_logvar);
      load_upstream(args, g, u);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const auto kl = math::gaussian_kl(mu[j], logvar[j], prior_mu[j], prior_logvar[j]);
        sum += kl.value;
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

template <class T, int V>
__device__ __forceinline__ void load_prior(const BernoulliArgs& args, const Group<T, V>& g, T (&prior)[V]) {
  if (args.prior) return g.load(args.prior, prior);
#pragma unroll
  for (int j = 0; j < V; ++j) prior[j] = static_cast<T>(args.prior_logit);
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    bernoulli_forward_kernel(const __grid_constant__ BernoulliArgs args) {
  T sum = T(0);
  for_row_groups<T, V>(args, sum, [&](const Group<T, V>& g) {
    T logits[V], prior[V], kl[V];
    g.load(args.logits, logits);
    load_prior(args, g, prior);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      kl[j] = math::bernoulli_kl(logits[j], prior[j]).value;
      sum += kl[j];
    }
    g.store(args.kl, kl);
  });
}

template <class T, int V>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    bernoulli_backward_kernel(const __grid_constant__ BernoulliArgs args) {
  T sum = T(0);
  for_row_groups<T, V>(args, sum, [&](const Group<T, V>& g) {
    T logits[V], prior[V], u[V], d_logits[V], d_prior[V];
    g.load(args.logits, logits);
    load_prior(args, g, prior);
    load_upstream(args, g, u);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const auto kl = math::bernoulli_kl(logits[j], prior[j]);
      sum += kl.value;
      d_logits[j] = u[j] * kl.d_logit;
      d_prior[j] = u[j] * kl.d_prior;
    }
    g.store(args.grad_logits, d_logits);
    g.store(args.grad_prior, d_prior);
  });
}

int vector_width(const Shape& shape, std::initializer_list<View> views) {
  return common_width(shape.row, views, [](const View& v) { return v.run; });
}

int vector_width(const GaussianArgs& a) {
  if (a.noise.offset % 4 != 0) return 1;
  return vector_width(a.shape,
                      {a.mu, a.logvar, a.prior_mu, a.prior_logvar, a.z, a.kl, a.grad_z, a.grad_kl_elements,
                       a.grad_mu, a.grad_logvar, a.grad_prior_mu, a.grad_prior_logvar});
}

int vector_width(const BernoulliArgs& a) {
  return vector_width(a.shape, {a.logits, a.prior, a.kl, a.grad_kl_elements, a.grad_logits, a.grad_prior});
}

// float64 is meant for checking rather than speed, so it uses the general kernels.
#define FGBG_CHOOSE(kernel, f64, width)          \
  ((f64)                ? kernel<double, 1>      \
   : (width) == 1       ? kernel<float, 1>       \
   : (width) == kVector ? kernel<float, kVector> \
                        : kernel<float, kVectorHalf>)

template <class Args>
void run_rows(void (*kernel)(Args), Args args, Stream stream) {
  args.segment = segment_length(args.shape, args.shape.row);
  launch(kernel, args.shape.size[0] * row_segments(args.shape), args, args.blocks_done, stream);
}

}  // namespace

int64_t row_segments(const Shape& shape) { return segments_of(shape.row, segment_length(shape, shape.row)); }

void normal(const NormalArgs& args, bool f64, Stream stream) {
  const bool aligned = !f64 && args.noise.offset % 4 == 0;
  const int width =
      aligned ? common_width(args.numel, {args.out}, [&](const View&) { return args.numel; }) : 1;
  launch(FGBG_CHOOSE(normal_kernel, f64, width), segments_of(args.numel, kWarp * width), args, false, stream);
}

void gaussian_forward(const GaussianArgs& args, bool f64, Stream stream) {
  run_rows(FGBG_CHOOSE(gaussian_forward_kernel, f64, vector_width(args)), args, stream);
}

void gaussian_backward(const GaussianArgs& args, bool f64, Stream stream) {
  run_rows(FGBG_CHOOSE(gaussian_backward_kernel, f64, vector_width(args)), args, stream);
}

void bernoulli_forward(const BernoulliArgs& args, bool f64, Stream stream) {
  run_rows(FGBG_CHOOSE(bernoulli_forward_kernel, f64, vector_width(args)), args, stream);
}

void bernoulli_backward(const BernoulliArgs& args, bool f64, Stream stream) {
  run_rows(FGBG_CHOOSE(bernoulli_backward_kernel, f64, vector_width(args)), args, stream);
}

}  // namespace fgbg::cuda
