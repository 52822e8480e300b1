// The KL of K outcomes on CUDA: a thread takes a group of outcomes, and goes over them several times, the
// first time from memory and then from the cache.
#include "../math/categorical.h"
#include "final_reduction.cuh"
#include "kernels.h"
#include "teams.cuh"

namespace fgbg::cuda {
namespace {

// The group at element e of sample b.
template <class T>
struct Outcomes {
  __device__ Outcomes(const View& v, int64_t step, const Shape& shape, int64_t b, int64_t e)
      : view(v), step(step), first(0) {
    int64_t rest = b * shape.row + e;
#pragma unroll
    for (int d = kDims - 1; d >= 1; --d) {
      first += (rest % shape.size[d]) * v.stride[d];
      rest /= shape.size[d];
    }
    first += rest * v.stride[0];
  }
  __device__ T get(int64_t k) const { return read<T>(view.data, view.dtype, first + k * step); }
  __device__ void set(int64_t k, T x) const { write(x, view.data, view.dtype, first + k * step); }

  const View& view;
  int64_t step, first;
};

// kPrior: whether there is one that is not uniform; kGradients: whether they are wanted, times `upstream`.
template <class T, bool kPrior, bool kGradients>
__device__ __forceinline__ T categorical(const CategoricalArgs& args, int64_t b, int64_t e, T upstream) {
  const Outcomes<T> logits(args.logits, args.logits_step, args.shape, b, e);
  const Outcomes<T> priors(args.prior, args.prior_step, args.shape, b, e);
  const int64_t outcomes = args.outcomes;
  auto prior = [&](int64_t k) { return kPrior ? priors.get(k) : T(0); };

  T largest = -math::kInf<T>, shift = T(0);
  for (int64_t k = 0; k < outcomes; ++k) {
    const T a = logits.get(k);
    if (a > largest) {
      largest = a;
      shift = a - prior(k);
    }
  }
  T total = T(0), mean = T(0);
  for (int64_t k = 0; k < outcomes; ++k) {
    const T a = logits.get(k), weight = math::outcome_weight(a, largest);
    total += weight;
    mean += math::outcome_mean(weight, (a - prior(k)) - shift);
  }
  const T inverse = T(1) / total;
  mean *= inverse;
  auto p_of = [&](T a) { return math::outcome_weight(a, largest) * inverse; };
  auto x_of = [&](T a, T b) { return mean - ((a - b) - shift); };
  T kl = T(0);
  bool far = false;
  for (int64_t k = 0; k < outcomes; ++k) {
    const T a = logits.get(k), x = x_of(a, prior(k));
    kl += math::outcome_growth(p_of(a), x);
    far |= math::is_far(x);
  }
  T largest_prior = -math::kInf<T>, total_prior = T(0);
  auto q_of = [&](T b) { return math::outcome_weight(b, largest_prior) / total_prior; };
  if (!far) {
    kl = math::log1p(kl);
  } else {
    for (int64_t k = 0; k < outcomes; ++k)
      largest_prior = prior(k) > largest_prior ? prior(k) : largest_prior;
    for (int64_t k = 0; k < outcomes; ++k) total_prior += math::outcome_weight(prior(k), largest_prior);
    math::OutcomeSums<T> sums;
    for (int64_t k = 0; k < outcomes; ++k) {
      const T a = logits.get(k), b = prior(k);
      math::add_outcome(a, largest, b, largest_prior, p_of(a), x_of(a, b), q_of(b), sums);
    }
    kl = math::categorical_kl(sums, total, total_prior);
  }
  if constexpr (kGradients) {
    const Outcomes<T> d_logits(args.grad_logits, args.grad_logits_step, args.shape, b, e);
    const Outcomes<T> d_priors(args.grad_prior, args.grad_prior_step, args.shape, b, e);
    for (int64_t k = 0; k < outcomes; ++k) {
      const T a = logits.get(k), b = prior(k), p = p_of(a), x = x_of(a, b);
      if (args.grad_logits) d_logits.set(k, upstream * math::d_outcome_logit(p, x));
      if (args.grad_prior) d_priors.set(k, upstream * math::d_outcome_prior(p, x, kl, far ? q_of(b) : T(0)));
    }
  }
  return kl;
}

template <class T, bool kPrior, bool kGradients>
__global__ void __launch_bounds__(kThreads, 2)
    categorical_kernel(const __grid_constant__ CategoricalArgs args) {
  T sum[1] = {};
  for_items<Format<T, 1, Any>>(args, args.shape.row, [&](const Item& item) {
#pragma unroll 1
    for (int at = item.lane; at < item.length; at += item.step) {
      const int64_t e = item.begin + at;
      T u = T(0);
      if constexpr (kGradients)
        u = args.grad_kl_elements ? Outcomes<T>(args.grad_kl_elements, 0, args.shape, item.b, e).get(0)
                                  : upstream<T>(args.grad_kl, item.b);
      const T kl = categorical<T, kPrior, kGradients>(args, item.b, e, u);
      sum[0] += kl;
      if (args.kl) Outcomes<T>(args.kl, 0, args.shape, item.b, e).set(0, kl);
    }
    if (args.partial) write_sums(item, sum, 1, 0, args.partial);
  });
  final_reduction_if_last<T>(args);
}

template <class T, bool kGradients>
void run(CategoricalArgs args, Stream stream) {
  const Cut cut = cut_of(args.shape, args.shape.row);
  args.segment = cut.segment;
  args.team = cut.team;
  launch(args.prior ? categorical_kernel<T, true, kGradients> : categorical_kernel<T, false, kGradients>,
         args.shape.samples * row_segments(args.shape), cut.team, args, args.blocks_done, 0, stream);
}

}  // namespace

void categorical_forward(const CategoricalArgs& args, bool f64, Stream stream) {
  f64 ? run<double, false>(args, stream) : run<float, false>(args, stream);
}

void categorical_backward(const CategoricalArgs& args, bool f64, Stream stream) {
  f64 ? run<double, true>(args, stream) : run<float, true>(args, stream);
}

}  // namespace fgbg::cuda
