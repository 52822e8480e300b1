#include "../regions.h"
#include "kernels.h"

namespace fgbg::cpu {
namespace {

template <class T>
void reduce(const FinalReduction& args) {
  T* terms = static_cast<T*>(args.out_terms);
  const math::RegionWeights<double> weights = region_weights<double>(args);
  // By blocks of samples, so that many samples do not make a long chain of roundings.
  constexpr int64_t kSamples = 64;
  double total = 0.0, block = 0.0;
  for (int64_t b = 0; b < args.batch; ++b) {
    double sums[kTerms] = {};
    for (int t = 0; t < args.terms; ++t) {
      const double* partial = args.partial + (t * args.batch + b) * args.segments;
      for (int64_t k = 0; k < args.segments; ++k) sums[t] += partial[k];
      if (terms) terms[t * args.batch + b] = static_cast<T>(sums[t]);
    }
    const double value = math::region_loss<double>({sums[0], sums[1], sums[2], sums[3]}, weights);
    if (args.loss && args.reduction == Reduction::sample)
      write(static_cast<T>(value), args.loss, args.dtype, b);
    block += value;
    if (b % kSamples < kSamples - 1 && b + 1 < args.batch) continue;
    total += block;
    block = 0.0;
  }
  if (args.loss && args.reduction != Reduction::sample)
    write(static_cast<T>(total * args.factor), args.loss, args.dtype, 0);
}

}  // namespace

void final_reduction(const FinalReduction& args) {
  args.dtype == DType::f64 ? reduce<double>(args) : reduce<float>(args);
}

}  // namespace fgbg::cpu
