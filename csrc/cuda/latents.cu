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

// The minimum occupancy, in blocks per multiprocessor. The work on latents is mostly arithmetic on
// independent elements, which needs few registers, and many warps to hide the loads behind.
template <class F, bool kManyResults = false>
constexpr int kBlocksOfLatents = F::kMixed ? 2 : (kManyResults ? 3 : 4);
// Of gradients by way of draws and of a KL, where the same kernel has those of priors.
template <class F>
constexpr int kBlocksOfBoth = F::V == kVectorHalf ? 3 : 2;

// Where a sample is: its index along each of the leading dimensions.
struct Sample {
  int64_t index[kDims];

  __device__ Sample(const Shape& shape, int64_t b) {
    int64_t rest = b;
#pragma unroll
    for (int d = kDims - 1; d >= 1; --d) {  // usually there is one alone
      index[d] = 0;
      if (d >= shape.leading) continue;
      index[d] = rest % shape.size[d];
      rest /= shape.size[d];
    }
    index[0] = rest;
  }
};

// How far an element of a row is from the row's first. Not inlined: its divisions are long, and every operand
// has one.
__device__ __attribute__((noinline)) int64_t offset_in_row(const View& view, const Shape& shape,
                                                           int64_t element) {
  int64_t offset = 0;
#pragma unroll
  for (int d = kDims - 1; d >= 1; --d) {
    offset += (element % shape.size[d]) * view.stride[d];
    element /= shape.size[d];
  }
  return offset;
}

// What an item has of an operand. kHeld: everything that does not change within it is computed once, which
// takes a pair of registers.
template <class F, bool kHeld = true>
class Row {
  using T = typename F::T;
  static constexpr int V = F::V;

 public:
  __device__ Row(const View& view, const Shape& shape, const Sample& sample, int64_t begin)
      : view_(view), shape_(shape), begin_(begin), data_(nullptr) {
    int64_t first = sample.index[0] * view.stride[0];
    if (shape.leading > 1) {
#pragma unroll
      for (int d = 1; d < kDims; ++d) first += sample.index[d] * view.stride[d];
    }
    if (consecutive()) first += begin_;
    with_storage<F>(view.dtype, [&](auto s) { data_ = static_cast<decltype(s)*>(view.data) + first; });
    if (kHeld) data_ = held(data_);
  }

  // V elements from `at` on, counted from the item's first; `further`: elements between that and another
  // tensor of this shape.
  __device__ Raw<F> fetch(int at, int64_t further = 0) const {
    Raw<F> raw;
    with_storage<F>(view_.dtype, [&](auto s) { fetch_as<V, decltype(s)>(data_, offset(at) + further, raw); });
    return raw;
  }
  // Nothing where the operand is absent.
  __device__ Raw<F> fetch_if(int at) const { return view_ ? fetch(at) : Raw<F>{}; }
  __device__ void store(int at, const T (&in)[V], int64_t further = 0) const {
    if (!view_) return;
    with_storage<F>(view_.dtype, [&](auto s) { store_as<decltype(s)>(data_, offset(at) + further, in); });
  }

 private:
  __device__ bool consecutive() const { return V > 1 || view_.run >= shape_.row; }
  __device__ int64_t offset(int at) const {
    return consecutive() ? at : offset_in_row(view_, shape_, begin_ + at);
  }

  const View& view_;
  const Shape& shape_;
  const int64_t begin_;
  void* data_;
};

// Calls body(at) for the groups of this thread in an item.
template <class F, class Body>
__device__ __forceinline__ void for_groups(const Item& item, Body body) {
#pragma unroll 1
  for (int at = item.lane * F::V; at < item.length; at += item.step) body(at);
}

// Calls body(item) for this thread's items, and writes the partial sums of the KL that body accumulates, if
// wanted. The last block reduces them.
template <class F, class Args, class Body>
__device__ __forceinline__ void for_rows(const Args& args, typename F::T (&sum)[1], Body body) {
  for_items<F>(args, args.shape.row, [&](const Item& item) {
    body(item);
    if (args.partial) write_sums(item, sum, 1, 0, args.partial);
  });
  final_reduction_if_last<typename F::T>(args);
}

// Calls body(std::true_type) where something usual holds, which a body compiled by itself is faster for.
// Operands of mixed types do without a second copy of the code; eight elements at a time there are no
// registers for what is unusual, and the host takes another format.
template <class F, class Body>
__device__ __forceinline__ void if_usual(bool usual, Body body) {
  if constexpr (F::V == kVectorHalf)
    body(std::true_type{});
  else if (!F::kMixed && usual)
    body(std::bool_constant<!F::kMixed>{});
  else
    body(std::false_type{});
}

// The keys of the noise, in registers: nvcc would otherwise add them up anew for each block of the stream.
__device__ __forceinline__ math::PhiloxKeys keys_of(const Noise& noise) {
  math::PhiloxKeys keys =
      math::philox_keys(static_cast<uint64_t>(noise.seed_on_device ? *noise.seed_on_device : noise.seed));
#if defined(__CUDA_ARCH__)
#pragma unroll
  for (int round = 0; round < math::kPhiloxRounds; ++round)
    asm volatile("" : "+r"(keys.key0[round]), "+r"(keys.key1[round]));
#endif
  return keys;
}

// Numbers start .. start + V - 1 of the stream; start is a multiple of 4 if V > 1.
template <int V>
__device__ __forceinline__ void normals(const math::PhiloxKeys& keys, uint64_t start, float (&out)[V]) {
  if constexpr (V == 1) {
    const math::Normal4 quad = math::normal4(keys, start / 4);
    const int k = static_cast<int>(start % 4);
    out[0] = k == 0 ? quad.n[0] : (k == 1 ? quad.n[1] : (k == 2 ? quad.n[2] : quad.n[3]));
  } else {
#pragma unroll
    for (int q = 0; q < V / 4; ++q) {
      const math::Normal4 quad = math::normal4(keys, start / 4 + q);
#pragma unroll
      for (int k = 0; k < 4; ++k) out[4 * q + k] = quad.n[k];
    }
  }
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocksOfLatents<F>)
    normal_kernel(const __grid_constant__ NormalArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const math::PhiloxKeys keys = keys_of(args.noise);
  const int64_t threads = static_cast<int64_t>(gridDim.x) * blockDim.x;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t i = thread * V; i < args.numel; i += threads * V) {
    float eps[V];
    normals(keys, args.noise.offset + static_cast<uint64_t>(i), eps);
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

// The KL of each element. standard: whether the prior is N(0, 1).
template <class S, class F, class T, int V>
__device__ __forceinline__ void kl_of(const GaussianArgs& args, bool standard, const Raw<F>& raw_prior_mu,
                                      const Raw<F>& raw_prior_spread, const T (&mu)[V], const T (&spread)[V],
                                      math::GaussianKl<T> (&kl)[V]) {
  if (standard) {
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

// The first number of the noise of a row.
__device__ __forceinline__ uint64_t noise_of(const GaussianArgs& args, const Item& item) {
  return held(args.noise.offset + static_cast<uint64_t>(item.b * args.shape.row + item.begin));
}

// kDraws: whether z is wanted; kKl: whether the KL is.
template <class F, bool kDraws, bool kKl, class S>
__global__ void __launch_bounds__(kThreads, kBlocksOfLatents<F, kDraws && kKl && kBeforeHopper>)
    gaussian_forward_kernel(const __grid_constant__ GaussianArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  math::PhiloxKeys keys;
  if constexpr (kDraws) keys = keys_of(args.noise);
  T sum[1] = {};
  for_rows<F>(args, sum, [&](const Item& item) {
    const Sample sample(args.shape, item.b);
    const auto row = [&](const View& v) { return Row<F>(v, args.shape, sample, item.begin); };
    const Row<F> row_mu = row(args.mu), row_spread = row(args.spread);
    const Row<F> row_prior_mu = row(args.prior_mu.view);
    const Row<F> row_prior_spread = row(args.prior_spread.view);
    const Row<F> row_z = row(args.z), row_kl = row(args.kl);
    const uint64_t noise = noise_of(args, item);
    if_usual<F>((args.standard || !kKl) && args.samples == 1, [&](auto usual) {
      const bool standard = decltype(usual)::value || args.standard;
      [[maybe_unused]] const int64_t samples = decltype(usual)::value ? 1 : args.samples;
      for_groups<F>(item, [&](int at) {
        const Raw<F> raw_mu = row_mu.fetch(at), raw_spread = row_spread.fetch(at);
        [[maybe_unused]] Raw<F> raw_prior_mu, raw_prior_spread;
        if (kKl && !standard) {
          raw_prior_mu = row_prior_mu.fetch_if(at);
          raw_prior_spread = row_prior_spread.fetch_if(at);
        }
        T mu[V], spread[V];
        unpack<F>(args.mu, raw_mu, mu);
        unpack<F>(args.spread, raw_spread, spread);
        if constexpr (kDraws) {
          T deviation[V];
#pragma unroll
          for (int j = 0; j < V; ++j) deviation[j] = S::std(spread[j]);
#pragma unroll 1
          for (int64_t s = 0; s < samples; ++s) {
            const int64_t further = s * args.shape.numel;
            float eps[V];
            normals(keys, noise + static_cast<uint64_t>(at + further), eps);
            T z[V];
#pragma unroll
            for (int j = 0; j < V; ++j) z[j] = math::fma(deviation[j], static_cast<T>(eps[j]), mu[j]);
            row_z.store(at, z, further);
          }
        }
        if constexpr (kKl) {
          math::GaussianKl<T> to[V];
          kl_of<S>(args, standard, raw_prior_mu, raw_prior_spread, mu, spread, to);
          T kl[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            kl[j] = to[j].value;
            sum[0] += kl[j];
          }
          row_kl.store(at, kl);
        }
      });
    });
  });
}

// The upstream gradient of each element: of its own, if it has one, or that of its row.
template <class F, class T, int V>
__device__ __forceinline__ void unpack_upstream(const View& elements, const Raw<F>& raw, T of_row,
                                                T (&u)[V]) {
  if (elements) return unpack<F>(elements, raw, u);
#pragma unroll
  for (int j = 0; j < V; ++j) u[j] = of_row;
}

// d/d(mu, spread, prior_mu, prior_spread) of upstream_z . z + upstream_kl . kl. kDraws: whether there is a z;
// kKl: whether there is a KL.
template <class F, bool kDraws, bool kKl, class S>
__global__ void __launch_bounds__(kThreads, kDraws&& kKl ? kBlocksOfBoth<F> : kBlocksOfLatents<F, kKl>)
    gaussian_backward_kernel(const __grid_constant__ GaussianArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  math::PhiloxKeys keys;
  if constexpr (kDraws) keys = keys_of(args.noise);
  T sum[1] = {};
  for_rows<F>(args, sum, [&](const Item& item) {
    const Sample sample(args.shape, item.b);
    const uint64_t noise = noise_of(args, item);
    const T of_row = upstream<T>(args.grad_kl, item.b);
    const bool usual_kl = !kKl || (args.standard && !args.grad_kl_elements);
    if_usual<F>(usual_kl && args.samples == 1, [&](auto is_usual) {
      constexpr bool usual = decltype(is_usual)::value;
      using RowHere = Row<F, usual>;
      const auto row = [&](const View& v) { return RowHere(v, args.shape, sample, item.begin); };
      const RowHere row_mu = row(args.mu), row_spread = row(args.spread), row_grad_z = row(args.grad_z);
      const RowHere row_d_mu = row(args.grad_mu), row_d_spread = row(args.grad_spread);
      // In the usual case there is none of these.
      using RarelyHere = Row<F, false>;
      const auto rare = [&](const View& v) { return RarelyHere(v, args.shape, sample, item.begin); };
      const RarelyHere row_elements = rare(args.grad_kl_elements);
      const RarelyHere row_prior_mu = rare(args.prior_mu.view),
                       row_prior_spread = rare(args.prior_spread.view);
      const RarelyHere row_d_prior_mu = rare(args.grad_prior_mu);
      const RarelyHere row_d_prior_spread = rare(args.grad_prior_spread);
      [[maybe_unused]] const int64_t samples = usual ? 1 : args.samples;
      for_groups<F>(item, [&](int at) {
        const Raw<F> raw_spread = row_spread.fetch(at);
        [[maybe_unused]] Raw<F> raw_mu, raw_grad, raw_elements, raw_prior_mu, raw_prior_spread;
        if constexpr (kKl) raw_mu = row_mu.fetch(at);
        if constexpr (kDraws) raw_grad = row_grad_z.fetch(at);
        if constexpr (kKl && !usual) {
          raw_elements = row_elements.fetch_if(at);
          raw_prior_mu = row_prior_mu.fetch_if(at);
          raw_prior_spread = row_prior_spread.fetch_if(at);
        }
        T spread[V], d_mu[V] = {}, d_spread[V] = {}, d_prior_mu[V] = {}, d_prior_spread[V] = {};
        unpack<F>(args.spread, raw_spread, spread);
        if constexpr (kDraws) {
          T deviation[V];
#pragma unroll
          for (int j = 0; j < V; ++j) deviation[j] = S::std(spread[j]);
#pragma unroll 1
          for (int64_t s = 0; s < samples; ++s) {
            const int64_t further = s * args.shape.numel;
            if (s > 0) raw_grad = row_grad_z.fetch(at, further);
            float eps[V];
            normals(keys, noise + static_cast<uint64_t>(at + further), eps);
            T grad[V];
            unpack<F>(args.grad_z, raw_grad, grad);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const T d = grad[j] * S::dz_dspread(deviation[j], static_cast<T>(eps[j]));
              d_mu[j] = usual ? grad[j] : d_mu[j] + grad[j];
              d_spread[j] = usual ? d : d_spread[j] + d;
            }
          }
        }
        if constexpr (kKl) {
          T mu[V], u[V];
          unpack<F>(args.mu, raw_mu, mu);
          unpack_upstream(usual ? View{} : args.grad_kl_elements, raw_elements, of_row, u);
          math::GaussianKl<T> kl[V];
          kl_of<S>(args, usual || args.standard, raw_prior_mu, raw_prior_spread, mu, spread, kl);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            sum[0] += kl[j].value;
            d_mu[j] += u[j] * kl[j].d_mu;
            d_spread[j] += u[j] * kl[j].d_spread;
            d_prior_mu[j] = -u[j] * kl[j].d_mu;
            d_prior_spread[j] = u[j] * kl[j].d_prior_spread;
          }
        }
        row_d_mu.store(at, d_mu);
        row_d_spread.store(at, d_spread);
        if constexpr (kKl && !usual) {
          row_d_prior_mu.store(at, d_prior_mu);
          row_d_prior_spread.store(at, d_prior_spread);
        }
      });
    });
  });
}

// kGradients: d/d(z, mu, spread) as well.
template <class F, bool kGradients, class S>
__global__ void __launch_bounds__(kThreads, kBlocksOfLatents<F>)
    log_prob_kernel(const __grid_constant__ LogProbArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  T sum[1] = {};
  for_rows<F>(args, sum, [&](const Item& item) {
    const Sample sample(args.shape, item.b);
    const auto row = [&](const View& v) { return Row<F>(v, args.shape, sample, item.begin); };
    const Row<F> row_z = row(args.z), row_mu = row(args.mu.view);
    const Row<F> row_spread = row(args.spread.view);
    const Row<F> row_elements = row(args.grad_elements);
    const Row<F> row_log_prob = row(args.log_prob);
    const Row<F> row_d_z = row(args.grad_z), row_d_mu = row(args.grad_mu);
    const Row<F> row_d_spread = row(args.grad_spread);
    const T of_row = upstream<T>(args.grad, item.b);
    for_groups<F>(item, [&](int at) {
      const Raw<F> raw_z = row_z.fetch(at), raw_mu = row_mu.fetch_if(at);
      const Raw<F> raw_spread = row_spread.fetch_if(at);
      Raw<F> raw_elements;
      if constexpr (kGradients) raw_elements = row_elements.fetch_if(at);
      T z[V], mu[V], spread[V], log_prob[V], u[V], d_z[V], d_mu[V], d_spread[V];
      unpack<F>(args.z, raw_z, z);
      unpack<F>(args.mu, raw_mu, mu);
      unpack<F>(args.spread, raw_spread, spread);
      if constexpr (kGradients) unpack_upstream(args.grad_elements, raw_elements, of_row, u);
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
        row_d_z.store(at, d_z);
        row_d_mu.store(at, d_mu);
        row_d_spread.store(at, d_spread);
      } else {
        row_log_prob.store(at, log_prob);
      }
    });
  });
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocksOfLatents<F>)
    bernoulli_forward_kernel(const __grid_constant__ BernoulliArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const math::BernoulliPrior<T> of_all = math::bernoulli_prior(scale_at<T>(args.prior.number, 0));
  T sum[1] = {};
  for_rows<F>(args, sum, [&](const Item& item) {
    const Sample sample(args.shape, item.b);
    const auto row = [&](const View& v) { return Row<F>(v, args.shape, sample, item.begin); };
    const Row<F> row_logits = row(args.logits), row_prior = row(args.prior.view);
    const Row<F> row_kl = row(args.kl);
    if_usual<F>(!args.prior.view, [&](auto usual) {
      const bool one_prior = decltype(usual)::value || !args.prior.view;
      for_groups<F>(item, [&](int at) {
        const Raw<F> raw_logits = row_logits.fetch(at);
        T logits[V], prior[V], kl[V];
        Raw<F> raw_prior;
        if (!one_prior) raw_prior = row_prior.fetch(at);
        unpack<F>(args.logits, raw_logits, logits);
        if (!one_prior) unpack<F>(args.prior.view, raw_prior, prior);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          kl[j] = math::bernoulli_kl(logits[j], one_prior ? of_all : math::bernoulli_prior(prior[j])).value;
          sum[0] += kl[j];
        }
        row_kl.store(at, kl);
      });
    });
  });
}

template <class F>
__global__ void __launch_bounds__(kThreads, kBlocksOfLatents<F>)
    bernoulli_backward_kernel(const __grid_constant__ BernoulliArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const math::BernoulliPrior<T> of_all = math::bernoulli_prior(scale_at<T>(args.prior.number, 0));
  T sum[1] = {};
  for_rows<F>(args, sum, [&](const Item& item) {
    const Sample sample(args.shape, item.b);
    const auto row = [&](const View& v) { return Row<F>(v, args.shape, sample, item.begin); };
    const Row<F> row_logits = row(args.logits), row_prior = row(args.prior.view);
    const Row<F> row_elements = row(args.grad_kl_elements);
    const Row<F> row_d_logits = row(args.grad_logits);
    const Row<F> row_d_prior = row(args.grad_prior);
    const T of_row = upstream<T>(args.grad_kl, item.b);
    if_usual<F>(!args.prior.view, [&](auto usual) {
      const bool one_prior = decltype(usual)::value || !args.prior.view;
      for_groups<F>(item, [&](int at) {
        const Raw<F> raw_logits = row_logits.fetch(at), raw_elements = row_elements.fetch_if(at);
        Raw<F> raw_prior;
        if (!one_prior) raw_prior = row_prior.fetch(at);
        T logits[V], prior[V], u[V], d_logits[V], d_prior[V];
        unpack<F>(args.logits, raw_logits, logits);
        if (!one_prior) unpack<F>(args.prior.view, raw_prior, prior);
        unpack_upstream(args.grad_kl_elements, raw_elements, of_row, u);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const auto kl = math::bernoulli_kl(logits[j], one_prior ? of_all : math::bernoulli_prior(prior[j]));
          sum[0] += kl.value;
          d_logits[j] = u[j] * kl.d_logit;
          d_prior[j] = u[j] * kl.d_prior;
        }
        row_d_logits.store(at, d_logits);
        row_d_prior.store(at, d_prior);
      });
    });
  });
}

FormatOf format_of(const Shape& shape, bool f64, std::initializer_list<View> views) {
  return choose_format(f64, shape.row, views, [](const View& v) { return v.run; });
}

// For a kernel that takes eight elements at a time in what is usual alone: see if_usual.
FormatOf without_eight(FormatOf format, bool usual) {
  return !usual && width_of(format) == kVectorHalf ? FormatOf::mixed : format;
}

// Whether there is a KL, or what is a gradient of it alone: 0, where the KL has no upstream gradient.
bool has_kl(const GaussianArgs& a) {
  return a.kl || a.partial || a.grad_kl || a.grad_kl_elements || a.grad_prior_mu || a.grad_prior_spread;
}

FormatOf format_of(const GaussianArgs& a, bool f64) {
  const FormatOf format =
      format_of(a.shape, f64,
                {a.mu, a.spread, a.prior_mu.view, a.prior_spread.view, a.z, a.kl, a.grad_z,
                 a.grad_kl_elements, a.grad_mu, a.grad_spread, a.grad_prior_mu, a.grad_prior_spread});
  // Four numbers come from one block of the stream.
  if (a.noise.offset % 4 != 0 && format != FormatOf::float64) return FormatOf::general;
  return without_eight(format, a.samples == 1 && !(has_kl(a) && !a.standard) && !a.grad_kl_elements);
}

FormatOf format_of(const LogProbArgs& a, bool f64) {
  return format_of(
      a.shape, f64,
      {a.z, a.mu.view, a.spread.view, a.log_prob, a.grad_elements, a.grad_z, a.grad_mu, a.grad_spread});
}

FormatOf format_of(const BernoulliArgs& a, bool f64) {
  return without_eight(
      format_of(a.shape, f64,
                {a.logits, a.prior.view, a.kl, a.grad_kl_elements, a.grad_logits, a.grad_prior}),
      !a.prior.view);
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
template <class S, bool kDraws, bool kKl>
FGBG_KERNELS(GaussianForward, GaussianArgs, gaussian_forward_kernel<F, kDraws, kKl, S>)
template <class S, bool kDraws, bool kKl>
FGBG_KERNELS(GaussianBackward, GaussianArgs, gaussian_backward_kernel<F, kDraws, kKl, S>)
template <class S, bool kGradients>
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

// Kernels of whichever parameterization the arguments say.
template <template <class, bool...> class Kernels, bool... kFlags, class Args>
void run_parameterized(const Args& args, bool f64, Stream stream) {
  switch (args.parameterization) {
    case Parameterization::logvar: return run_rows<Kernels<math::LogVar, kFlags...>>(args, f64, stream);
    case Parameterization::log_std: return run_rows<Kernels<math::LogStd, kFlags...>>(args, f64, stream);
    case Parameterization::std: return run_rows<Kernels<math::Std, kFlags...>>(args, f64, stream);
  }
}

template <template <class, bool, bool> class Kernels>
void run_gaussian(const GaussianArgs& args, bool draws, bool kl, bool f64, Stream stream) {
  if (draws)
    kl ? run_parameterized<Kernels, true, true>(args, f64, stream)
       : run_parameterized<Kernels, true, false>(args, f64, stream);
  else
    run_parameterized<Kernels, false, true>(args, f64, stream);
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
  run_gaussian<GaussianForward>(args, static_cast<bool>(args.z), has_kl(args), f64, stream);
}

void gaussian_backward(const GaussianArgs& args, bool f64, Stream stream) {
  run_gaussian<GaussianBackward>(args, static_cast<bool>(args.grad_z), has_kl(args), f64, stream);
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
