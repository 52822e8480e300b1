// Values of the reconstruction losses; see reconstruction.cuh for the mapping.
#include "reconstruction.cuh"

namespace fgbg::cuda {
namespace {

template <class T, int V, class L, Composition kind>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    forward_kernel(const __grid_constant__ ReconstructionArgs args) {
  const int64_t channels = args.shape.size[1];
  const math::RegionWeights<T> weights = region_weights<T>(args);
  const math::Excluded<T> zeros = math::Excluded<T>::zeros_if(hard_mask(args));
  const math::ExcludedOfRegions<T> excluded = excluded_of_loss(weights, hard_mask(args));
  T sums[kTerms] = {};
  for_pixel_groups<T, V>(args, sums, [&](const Pixels<T, V>& px, int64_t, int) {
    Operands<T, V, L> in;
    if constexpr (kind == Composition::masked || kind == Composition::blended) {
      math::Mask<T> m[V];
      T area_on = T(0), area_off = T(0);
      for (int64_t c = 0; c < channels; ++c) {
        const bool new_mask = c == 0 || args.mask_per_channel;
        in.load(args, px, c, new_mask);
        if (new_mask) in.make_mask(args, m);
        T loss[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if constexpr (kind == Composition::masked) {
            const T on = m[j].on, off = m[j].off;
            const T fg = math::masked_value(on, L::eval(in.fg[j], in.target[j], in.fg_scale).value, zeros);
            const T bg = math::masked_value(off, L::eval(in.bg[j], in.target[j], in.bg_scale).value, zeros);
            loss[j] = math::masked_loss(on, off, weights.fg, weights.bg, fg, bg, excluded);
            if (px.live) {
              sums[0] += fg;
              sums[1] += bg;
              if (new_mask) {
                area_on += m[j].on;
                area_off += m[j].off;
              }
            }
          } else {
            const T blend = math::blend(m[j].on, m[j].off, in.fg[j], in.bg[j], zeros);
            loss[j] = L::eval(blend, in.target[j], in.fg_scale).value;
            if (px.live) sums[0] += loss[j];
          }
        }
        px.store(args.loss, c, loss);
      }
      const T share = args.mask_per_channel ? T(1) / static_cast<T>(channels) : T(1);
      sums[2] += share * area_on;
      sums[3] += share * area_off;
    } else {
      const bool joint = args.composition == Composition::mixture_joint;
      T fg[V] = {}, bg[V] = {};
      for (int64_t c = 0; c < channels; ++c) {
        in.load(args, px, c, c == 0 || args.mask_per_channel);
        T loss[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          fg[j] = (joint ? fg[j] : T(0)) + L::eval(in.fg[j], in.target[j], in.fg_scale).value;
          bg[j] = (joint ? bg[j] : T(0)) + L::eval(in.bg[j], in.target[j], in.bg_scale).value;
        }
        if (joint && c + 1 < channels) continue;
#pragma unroll
        for (int j = 0; j < V; ++j) {
          loss[j] = math::mixture(in.mask[j], fg[j], bg[j]).value;
          if (px.live) sums[0] += loss[j];
        }
        px.store(args.loss, joint ? 0 : c, loss);
      }
    }
  });
}

struct Kernels {
  template <class T, int V, class L, Composition kind>
  static Kernel get() {
    return forward_kernel<T, V, L, kind>;
  }
};

}  // namespace

void reconstruction_forward(const ReconstructionArgs& args, bool f64, Stream stream) {
  run<Kernels>(args, f64, stream);
}

int64_t pixel_segments(const Shape& shape) {
  return segments_of(shape.plane, segment_length(shape, shape.plane));
}

}  // namespace fgbg::cuda
