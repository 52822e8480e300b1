// Masked, blended and mixture reconstruction losses on CUDA.
//
// One pass over memory: forward reads fg, bg and target once and the mask once (per channel, if it has
// channels); backward reads the same and writes the gradients, and the sums of the loss as well where
// both are made in one go. (A joint mixture of several channels reads the images twice in backward: the
// responsibilities need all channels first. The second read of a group's pixels comes from cache.)
// A warp takes a segment of kSegment pixels of one sample, all channels; a lane V consecutive pixels at a
// time, so that the mask, its sigmoid and its gradient stay in registers across channels. Each warp
// writes its own partial sums: no atomics, no barriers, and an order fixed by the sizes.
#pragma once

#include <initializer_list>

#include "../math/likelihood.h"
#include "kernels.h"
#include "memory.cuh"

namespace fgbg::cuda {
namespace {

// V pixels of sample b from pixel p on. A lane beyond the end of its segment is not live: it computes on
// zeros, so that it is there when the warp sums.
template <class T, int V>
struct Pixels {
  const Shape& shape;
  int64_t b, p;
  bool live;

  __device__ int64_t offset(const View& v, int64_t c) const {
    const int64_t base = b * v.stride[0] + c * v.stride[1];
    if (v.plane_stride >= 0) return base + p * v.plane_stride;
    const int64_t x = p % shape.size[4], rest = p / shape.size[4];
    return base + x * v.stride[4] + (rest % shape.size[3]) * v.stride[3] +
           (rest / shape.size[3]) * v.stride[2];
  }
  __device__ void load(const View& v, int64_t c, T (&out)[V]) const {
    if (live) return cuda::load<T, V>(v, offset(v, c), out);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = T(0);
  }
  __device__ void store(const View& v, int64_t c, const T (&in)[V]) const {
    if (v && live) cuda::store<T, V>(v, offset(v, c), in);
  }
};

// The operands of one channel of a group of pixels.
template <class T, int V, class L>
struct Images {
  T fg[V], bg[V], target[V];
  math::Scale<T> fg_scale, bg_scale;

  __device__ void load(const ReconstructionArgs& args, const Pixels<T, V>& px, int64_t c) {
    px.load(args.fg, c, fg);
    if (args.bg) {
      px.load(args.bg, c, bg);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) bg[j] = fg[j];
    }
    px.load(args.target, c, target);
    fg_scale = L::prepare(scale_at<T>(args.fg_scale, c));
    bg_scale = L::prepare(scale_at<T>(args.bg_scale, c));
  }
};

template <class T, int V>
__device__ __forceinline__ void load_mask(const ReconstructionArgs& args, const Pixels<T, V>& px, int64_t c,
                                          math::Mask<T> (&m)[V]) {
  T raw[V];
  px.load(args.mask, c, raw);
#pragma unroll
  for (int j = 0; j < V; ++j)
    m[j] = args.mask_kind == MaskKind::logits ? math::mask_from_logit(raw[j])
                                              : math::Mask<T>{raw[j], T(1) - raw[j], T(1)};
}

template <class T>
__device__ __forceinline__ T term(const ReconstructionArgs& args, const void* terms, int t, int64_t b) {
  return terms ? static_cast<const T*>(terms)[t * args.shape.size[0] + b] : T(0);
}

// body(pixels, item) for the groups of this warp's segments whose results are not stored; after them the sums
// that body has added to, if they are wanted.
template <class T, int V, class Body>
__device__ __forceinline__ void for_pixel_groups(const ReconstructionArgs& args, T (&sums)[kTerms],
                                                 Body body) {
  const Shape& shape = args.shape;
  const int64_t segments = segments_of(shape.plane, kSegment), items = shape.size[0] * segments;
  for_warp_items(items, [&](int64_t item, int lane) {
    const int64_t b = item / segments, begin = item % segments * kSegment;
    const int64_t end = begin + kSegment < shape.plane ? begin + kSegment : shape.plane;
    if (stored<T>(args.grad_loss, b)) return;
    // All lanes stay for every round, since warps sum inside.
    for (int64_t round = begin; round < end; round += kWarp * V) {
      const int64_t p = round + lane * V;
      body(Pixels<T, V>{shape, b, p, p < end}, item, lane);
    }
    if (!args.partial) return;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      const T total = warp_sum(sums[t]);
      if (lane == 0) args.partial[t * items + item] = static_cast<double>(total);
      sums[t] = T(0);
    }
  });
}

using Kernel = void (*)(ReconstructionArgs);

// float64 is for checking, not for speed: it takes the general kernels.
// Kernels::get<T, V, L, kind>() is the forward or the backward kernel.
template <class Kernels, class L, Composition kind>
Kernel choose(bool f64, bool vector) {
  if (f64) return Kernels::template get<double, 1, L, kind>();
  return vector ? Kernels::template get<float, kVector, L, kind>()
                : Kernels::template get<float, 1, L, kind>();
}

template <class Kernels, class L>
Kernel choose(Composition kind, bool f64, bool vector) {
  if (kind == Composition::masked) return choose<Kernels, L, Composition::masked>(f64, vector);
  if (kind == Composition::blended) return choose<Kernels, L, Composition::blended>(f64, vector);
  // Joint or independent channels are a run-time property of one kernel.
  return choose<Kernels, L, Composition::mixture_joint>(f64, vector);
}

// Whether 8 pixels at a time are 8 consecutive, aligned numbers in every operand that is present.
bool vectorizable(const ReconstructionArgs& a) {
  if (a.shape.plane % kVector != 0) return false;
  for (const View& v : {a.fg, a.bg, a.target, a.mask, a.loss, a.grad_loss_elements, a.grad_fg, a.grad_bg,
                        a.grad_target, a.grad_mask})
    if (v && !(v.plane_stride == 1 && v.vector_aligned)) return false;
  return true;
}

template <class Kernels>
void run(const ReconstructionArgs& args, bool f64, Stream stream) {
  constexpr Kernel (*kTable[])(Composition, bool, bool) = {
#define FGBG_ENTRY(L, name) choose<Kernels, math::L>,
      FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)
#undef FGBG_ENTRY
  };
  const Kernel kernel = kTable[static_cast<int>(args.likelihood)](args.composition, f64, vectorizable(args));
  launch(kernel, args.shape.size[0] * pixel_segments(args.shape), args, stream);
}

}  // namespace
}  // namespace fgbg::cuda
