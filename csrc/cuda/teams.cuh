// The device's side of launch.cuh: the items of a team, and what it sums.
#pragma once

#include "launch.cuh"

namespace fgbg::cuda {
namespace {

// The sum over a warp, in lane 0; always the same tree.
template <class T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int width = kWarp / 2; width > 0; width /= 2) x += __shfl_down_sync(0xffffffffu, x, width);
  return x;
}

// `length` elements of sample b from `begin` on. A thread takes V of them from lane * V on, then every
// `step`-th V.
struct Item {
  int64_t number, b, begin;
  int length, lane, team, step;
};

// Calls body(item) for the items of this thread's team.
template <class F, class Args, class Body>
__device__ __forceinline__ void for_items(const Args& args, int64_t extent, Body body) {
  const int team = args.team, of_block = kThreads / team;
  const int thread = static_cast<int>(threadIdx.x), lane = thread & (team - 1);
  const int64_t segments = segments_of(extent, args.segment), items = args.shape.samples * segments;
  const int64_t teams = static_cast<int64_t>(gridDim.x) * of_block;
  int64_t number = static_cast<int64_t>(blockIdx.x) * of_block + thread / team;
  for (; number < items; number += teams) {
    const int64_t b = number / segments, begin = (number - b * segments) * args.segment;
    const int64_t left = extent - begin;
    const int length = static_cast<int>(args.segment < left ? args.segment : left);
    body(Item{number, b, begin, length, lane, team, team * F::V});
  }
}

// Writes the team's sums of an item, `terms` of them, each `stride` after the one before, and zeroes them.
// Every thread of the team has to call it.
template <class T, int N>
__device__ __forceinline__ void write_sums(const Item& item, T (&sums)[N], int terms, int64_t stride,
                                           double* partial) {
  __shared__ double of_warps[N * kWarps];
  const int thread = thread_of_block();
#pragma unroll
  for (int t = 0; t < N; ++t) {
    if (t >= terms) break;
    const double total = static_cast<double>(warp_sum(sums[t]));
    sums[t] = T(0);
    if (thread % kWarp != 0) continue;
    if (item.team == kWarp)
      partial[t * stride + item.number] = total;
    else
      of_warps[t * kWarps + thread / kWarp] = total;
  }
  if (item.team == kWarp) return;
  __syncthreads();
  if (thread < terms) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += of_warps[thread * kWarps + w];
    partial[thread * stride + item.number] = total;
  }
  __syncthreads();
}

}  // namespace
}  // namespace fgbg::cuda
