// Masked, blended and mixture reconstruction losses on CUDA.
//
// One pass over memory: forward reads fg, bg and target once and the mask once (per channel, if it has
// channels); backward reads the same and writes the gradients and, if partial sums are wanted, the sums
// of the loss. (A joint mixture of several channels reads the images twice in backward: the
// responsibilities need all channels first. The second read of a group's pixels comes from cache.)
// A warp takes a segment of the pixels of one sample, all channels; a lane V consecutive pixels at a
// time, so that the mask, its sigmoid and its gradient stay in registers across channels. Each warp
// writes its own partial sums, in an order fixed by the sizes.
#pragma once

#include "../math/composition.h"
#include "final_reduction.cuh"
#include "kernels.h"
#include "memory.cuh"

namespace fgbg::cuda {
namespace {

// V pixels of sample b from pixel p on. A lane beyond the end of its segment is not live: it computes on
// zeros, since every lane has to take part in the warp's shuffles.
template <class T, int V>
struct Pixels {
  const Shape& shape;
  int64_t b, p;
  bool live;

  __device__ int64_t offset(const View& v, int64_t c) const {
    const int64_t base = b * v.stride[0] + c * v.stride[1];
    if (V > 1) return base + p;
    if (v.plane_stride >= 0) return base + p * v.plane_stride;
    const int64_t x = p % shape.size[4], rest = p / shape.size[4];
    return base + x * v.stride[4] + (rest % shape.size[3]) * v.stride[3] +
           (rest / shape.size[3]) * v.stride[2];
  }
  __device__ Raw<V> fetch(const View& v, int64_t c) const {
    Raw<V> raw = {};
    if (live) cuda::fetch<T, V>(v, offset(v, c), raw);
    return raw;
  }
  __device__ void load(const View& v, int64_t c, T (&out)[V]) const { unpack<T, V>(v, fetch(v, c), out); }
  __device__ void store(const View& v, int64_t c, const T (&in)[V]) const {
    if (v && live) cuda::store<T, V>(v, offset(v, c), in);
  }
};

// The operands of one channel of a group of pixels. The mask is kept from the channel before if they share
// it.
template <class T, int V, class L>
struct Operands {
  T fg[V], bg[V], target[V], mask[V];
  math::Scale<T> fg_scale, bg_scale;

  __device__ void load(const ReconstructionArgs& args, const Pixels<T, V>& px, int64_t c, bool new_mask) {
    const Raw<V> raw_fg = px.fetch(args.fg, c), raw_target = px.fetch(args.target, c);
    Raw<V> raw_bg = raw_fg, raw_mask;
    if (args.bg) raw_bg = px.fetch(args.bg, c);
    if (new_mask) raw_mask = px.fetch(args.mask, c);
    fg_scale = L::prepare(scale_at<T>(args.fg_scale, c));
    bg_scale = L::prepare(scale_at<T>(args.bg_scale, c));
    unpack<T, V>(args.fg, raw_fg, fg);
    unpack<T, V>(args.bg ? args.bg : args.fg, raw_bg, bg);
    unpack<T, V>(args.target, raw_target, target);
    if (new_mask) unpack<T, V>(args.mask, raw_mask, mask);
  }
  __device__ void make_mask(const ReconstructionArgs& args, math::Mask<T> (&m)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j)
      m[j] = args.mask_kind == MaskKind::logits ? math::mask_from_logit(mask[j])
                                                : math::Mask<T>{mask[j], T(1) - mask[j], T(1)};
  }
};

// Calls body(pixels, item, lane) for the groups of this warp's segments, and writes the partial sums that
// body accumulates, if wanted. The last block reduces the partial sums.
template <class T, int V, class Body>
__device__ __forceinline__ void for_pixel_groups(const ReconstructionArgs& args, T (&sums)[kTerms],
                                                 Body body) {
  const Shape& shape = args.shape;
  const int64_t segments = segments_of(shape.plane, args.segment), items = shape.size[0] * segments;
  for_warp_items(items, [&](int64_t item, int lane) {
    const int64_t b = item / segments, begin = item % segments * args.segment;
    const int64_t end = begin + args.segment < shape.plane ? begin + args.segment : shape.plane;
    // Every lane runs every round, since body contains shuffles.
    for (int64_t round = begin; round < end; round += kWarp * V) {
      const int64_t p = round + lane * V;
      body(Pixels<T, V>{shape, b, p, p < end}, item, lane);
    }
    if (!args.partial) return;
#pragma unroll
    for (int t = 0; t < kTerms; ++t) {
      if (t >= args.final_reductions[0].terms) break;
      const T total = warp_sum(sums[t]);
      if (lane == 0) args.partial[t * items + item] = static_cast<double>(total);
      sums[t] = T(0);
    }
  });
  final_reduction_if_last<T>(args);
}

using Kernel = void (*)(ReconstructionArgs);

// float64 is meant for checking rather than speed, so it uses the general kernels.
// Kernels::get<T, V, L, kind>() is the forward or the backward kernel.
template <class Kernels, class L, Composition kind>
Kernel choose(bool f64, int width) {
  if (f64) return Kernels::template get<double, 1, L, kind>();
  if (width == 1) return Kernels::template get<float, 1, L, kind>();
  return width == kVector ? Kernels::template get<float, kVector, L, kind>()
                          : Kernels::template get<float, kVectorHalf, L, kind>();
}

template <class Kernels, class L>
Kernel choose(Composition kind, bool f64, int width) {
  if (kind == Composition::masked) return choose<Kernels, L, Composition::masked>(f64, width);
  if (kind == Composition::blended) return choose<Kernels, L, Composition::blended>(f64, width);
  // One kernel handles joint and independent channels, which differ at run time.
  return choose<Kernels, L, Composition::mixture_joint>(f64, width);
}

int vector_width(const ReconstructionArgs& a) {
  return common_width(a.shape.plane,
                      {a.fg, a.bg, a.target, a.mask, a.loss, a.grad_loss_elements, a.grad_fg, a.grad_bg,
                       a.grad_target, a.grad_mask},
                      [&](const View& v) { return v.plane_stride == 1 ? a.shape.plane : 1; });
}

template <class Kernels>
void run(ReconstructionArgs args, bool f64, Stream stream) {
  constexpr Kernel (*kTable[])(Composition, bool, int) = {
#define FGBG_ENTRY(L, name) choose<Kernels, math::L>,
      FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)
#undef FGBG_ENTRY
  };
  const Kernel kernel = kTable[static_cast<int>(args.likelihood)](args.composition, f64, vector_width(args));
  args.segment = segment_length(args.shape, args.shape.plane);
  launch(kernel, args.shape.size[0] * pixel_segments(args.shape), args, args.blocks_done, stream);
}

}  // namespace
}  // namespace fgbg::cuda
