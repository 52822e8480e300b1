// Gradients for an upstream gradient of one, multiplied in place by the one that arrived; nothing is read or
// written where that is one. A block takes tasks of consecutive elements of one gradient in turn, a thread 16
// bytes at a time where a task is aligned.
#include "kernels.h"
#include "launch.cuh"

namespace fgbg::cuda {
namespace {

template <class T, int V, class S>
__device__ __forceinline__ void scale_span(const ScalingArgs& args, int which, int64_t begin, int64_t end) {
  const auto& gradient = args.gradients[which];
  S* data = static_cast<S*>(gradient.data);
  T factor = upstream<T>(args.upstream, 0);
  for (int64_t i = begin + threadIdx.x * V; i < end; i += kThreads * V) {
    if (args.upstream.stride != 0) {
      factor = upstream<T>(args.upstream, i / gradient.row);
      if (factor == T(1)) continue;
    }
    using Word = typename Bytes<V * sizeof(S)>::type;
    Word word = *reinterpret_cast<const Word*>(data + i);
    S numbers[V];
    memcpy(numbers, &word, sizeof word);
#pragma unroll
    for (int j = 0; j < V; ++j) narrow(widen<T>(numbers[j]) * factor, numbers[j]);
    memcpy(&word, numbers, sizeof word);
    put(word, reinterpret_cast<Word*>(data + i));
  }
}

template <class T, class S>
__device__ __forceinline__ void scale_task(const ScalingArgs& args, int which, int64_t task) {
  const auto& gradient = args.gradients[which];
  const int64_t begin = task * ScalingArgs::kTask;
  const int64_t end =
      begin + ScalingArgs::kTask < gradient.numel ? begin + ScalingArgs::kTask : gradient.numel;
  constexpr int kWide = 16 / static_cast<int>(sizeof(S));
  const bool aligned = reinterpret_cast<uintptr_t>(gradient.data) % 16 == 0 && gradient.row % kWide == 0;
  if (aligned)
    scale_span<T, kWide, S>(args, which, begin, end);
  else
    scale_span<T, 1, S>(args, which, begin, end);
}

template <class T>
__global__ void __launch_bounds__(kThreads) scale_kernel(const __grid_constant__ ScalingArgs args) {
  // Of one upstream gradient for all samples.
  if (args.upstream.stride == 0 && upstream<T>(args.upstream, 0) == T(1)) return;
  for (int64_t task = blockIdx.x; task < args.tasks; task += gridDim.x) {
    int64_t rest = task;
    int which = 0;
    for (;; ++which) {
      const int64_t tasks = segments_of(args.gradients[which].numel, ScalingArgs::kTask);
      if (rest < tasks) break;
      rest -= tasks;
    }
    switch (args.gradients[which].dtype) {
      case DType::f64:
        if constexpr (sizeof(T) == 8) scale_task<T, double>(args, which, rest);
        break;
      case DType::f32: scale_task<T, float>(args, which, rest); break;
      case DType::bf16: scale_task<T, math::bf16>(args, which, rest); break;
      case DType::f16: scale_task<T, math::f16>(args, which, rest); break;
      case DType::u8: break;
    }
  }
}

}  // namespace

void scale(const ScalingArgs& args, bool f64, Stream stream) {
  launch(f64 ? scale_kernel<double> : scale_kernel<float>, args.tasks, kThreads, args, false, 0, stream);
}

}  // namespace fgbg::cuda
