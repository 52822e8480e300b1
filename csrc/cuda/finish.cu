// The second stage of every reduction, in one block: a sample's partial sums are added by one thread (few
// segments) or one warp (many), the samples' values by their thread in order, and the threads' totals by
// a tree in shared memory. Everything in float64 and in an order fixed by the sizes.
#include "../math/mask.h"
#include "kernels.h"
#include "memory.cuh"

namespace fgbg::cuda {
namespace {

constexpr int kFinishThreads = 512;

template <class T>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(FinishArgs args) {
  __shared__ double totals[kFinishThreads];
  const int lanes = args.segments >= kWarp ? kWarp : 1;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  T* loss = static_cast<T*>(args.loss);
  T* terms = static_cast<T*>(args.out_terms);
  double total = 0.0;
  for (int64_t b = threadIdx.x / lanes; b < args.batch; b += blockDim.x / lanes) {
    double sums[kTerms] = {};
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      if (t >= args.terms) continue;
      const double* partial = args.partial + (t * args.batch + b) * args.segments;
      for (int64_t k = lane; k < args.segments; k += lanes) sums[t] += partial[k];
      if (lanes > 1) sums[t] = warp_sum(sums[t]);
      if (terms && lane == 0) terms[t * args.batch + b] = static_cast<T>(sums[t]);
    }
    if (lane != 0) continue;
    const double value = math::region_loss<double>({sums[0], sums[1], sums[2], sums[3]}, args.fg_weight,
                                                   args.bg_weight, args.normalize_area, args.channels);
    if (loss && args.reduction == Reduction::sample) loss[b] = static_cast<T>(value);
    total += value;
  }
  totals[threadIdx.x] = total;
  for (int width = kFinishThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < width) totals[threadIdx.x] += totals[threadIdx.x + width];
  }
  if (threadIdx.x == 0 && loss && args.reduction != Reduction::sample)
    *loss = static_cast<T>(totals[0] * args.factor);
}

}  // namespace

void finish_reduction(const FinishArgs& args, Stream stream) {
  if (args.dtype == DType::f64)
    finish_kernel<double><<<1, kFinishThreads, 0, stream>>>(args);
  else
    finish_kernel<float><<<1, kFinishThreads, 0, stream>>>(args);
}

}  // namespace fgbg::cuda
