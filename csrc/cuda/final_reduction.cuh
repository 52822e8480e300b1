// The second stage of every reduction, run by the last block to finish, which saves a kernel launch. It does
// not matter which block that is: it reads the partial sums of all blocks and adds them, in float64, in an
// order that depends on the sizes alone.
#pragma once

#include "../regions.h"
#include "launch.cuh"

namespace fgbg::cuda {
namespace {

// What is not inlined here would be most of the code of every kernel, and of what nvcc has to compile. It
// runs once.
#define FGBG_CALLED __device__ __attribute__((noinline))

FGBG_CALLED double loss_of(const FinalReduction& args, double fg, double bg, double fg_area, double bg_area) {
  return math::region_loss<double>({fg, bg, fg_area, bg_area}, region_weights<double>(args));
}

// The sum of every `step`-th of `count` partial sums from the first on. They are read through L2, since other
// multiprocessors wrote them, with several loads in flight.
FGBG_CALLED double sum_of(const double* partial, int64_t count, int first, int step) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t k = first; k < count; k += step) sum += __ldcg(partial + k);
  return sum;
}
__device__ __forceinline__ void add_partial(const FinalReduction& args, const double* partial, int64_t row,
                                            int64_t count, int first, int step, double (&sums)[kTerms]) {
#pragma unroll
  for (int t = 0; t < kTerms; ++t) {
    if (t >= args.terms) break;
    sums[t] = sum_of(partial + t * row, count, first, step);
  }
}

// Writes the requested results of a sample, and returns its loss.
template <class T>
__device__ __forceinline__ double write_sample(const FinalReduction& args, int64_t b,
                                               const double (&sums)[kTerms]) {
  T* terms = static_cast<T*>(args.out_terms);
#pragma unroll
  for (int t = 0; t < kTerms; ++t)
    if (terms && t < args.terms) terms[t * args.batch + b] = static_cast<T>(sums[t]);
  const double loss = loss_of(args, sums[0], sums[1], sums[2], sums[3]);
  if (args.loss && args.reduction == Reduction::sample) write(static_cast<T>(loss), args.loss, args.dtype, b);
  return loss;
}

// Writes each sample's results, and returns the sum of this thread's losses. If there are fewer samples than
// threads, a power of two of threads shares each.
template <class T>
__device__ double reduce_samples(const FinalReduction& args, double* totals) {
  const int thread = thread_of_block();
  const int64_t row = args.batch * args.segments;
  int lanes = kThreads;
  while (lanes > 1 && lanes * args.batch > kThreads) lanes /= 2;
  const int lane = thread % lanes;
  double loss = 0.0;
#pragma unroll 1
  for (int64_t first = 0; first < args.batch; first += kThreads / lanes) {
    const int64_t b = first + thread / lanes;
    double sums[kTerms] = {};
    if (b < args.batch)
      add_partial(args, args.partial + b * args.segments, row, args.segments, lane, lanes, sums);
#pragma unroll
    for (int t = 0; t < kTerms; ++t) totals[t * kThreads + thread] = sums[t];
    for (int width = lanes / 2; width > 0; width /= 2) {
      __syncthreads();
      if (lane >= width) continue;
#pragma unroll
      for (int t = 0; t < kTerms; ++t) totals[t * kThreads + thread] += totals[t * kThreads + thread + width];
    }
#pragma unroll
    for (int t = 0; t < kTerms; ++t) sums[t] = totals[t * kThreads + thread];
    if (b < args.batch && lane == 0) loss += write_sample<T>(args, b, sums);
  }
  return loss;
}

template <class T>
FGBG_CALLED void final_reduction(const FinalReduction& args) {
  __shared__ double totals[kTerms * kThreads];
  const int thread = thread_of_block();
  const bool one_loss = args.loss && args.reduction != Reduction::sample;
  // Without areas the loss is linear in the sums. It has the same bits whether terms are wanted or not.
  const bool linear = one_loss && !args.normalize_area;
  double loss = !linear || args.out_terms ? reduce_samples<T>(args, totals) : 0.0;
  if (linear) {
    const int64_t row = args.batch * args.segments;
    double sums[kTerms] = {};
    add_partial(args, args.partial, row, row, thread, kThreads, sums);
    loss = loss_of(args, sums[0], sums[1], sums[2], sums[3]);
  }
  __syncthreads();
  totals[thread] = loss;
  for (int width = kThreads / 2; width > 0; width /= 2) {
    __syncthreads();
    if (thread < width) totals[thread] += totals[thread + width];
  }
  if (thread == 0 && one_loss) write(static_cast<T>(totals[0] * args.factor), args.loss, args.dtype, 0);
  __syncthreads();
}

// Adds 1 and returns what was there. Release: this block's partial sums are visible before its count is.
// Acquire: those of the blocks that counted before are visible to what follows.
__device__ __forceinline__ uint32_t count_done(uint32_t* blocks) {
#if defined(__CUDA_ARCH__)
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(blocks))
               : "memory");
  return before;
#else
  return atomicAdd(blocks, 1u);
#endif
}

// Every thread has to call it, after its last partial sum.
template <class T>
__device__ __forceinline__ void final_reduction_if_last(const Sums& args) {
  if (!args.blocks_done) return;
  __shared__ bool last;
  __syncthreads();
  if (thread_of_block() == 0) last = count_done(args.blocks_done) == gridDim.x - 1;
  __syncthreads();
  if (!last) return;
#pragma unroll 1
  for (const FinalReduction& f : args.final_reductions)
    if (f) final_reduction<T>(f);
  if (thread_of_block() == 0) *args.blocks_done = 0;
}

#undef FGBG_CALLED

}  // namespace
}  // namespace fgbg::cuda
