// Derivatives of the reconstruction losses with respect to every operand, in one pass, and where there is
// room for them the sums of the loss.
#include "reconstruction.cuh"

namespace fgbg::cuda {
namespace {

// Adds this warp's derivative to the scales of channel c; the slot belongs to the warp alone.
template <class T>
__device__ __forceinline__ void add_scale_gradient(const ReconstructionArgs& args, int64_t items,
                                                   int64_t item, int lane, int64_t c, bool first, T fg,
                                                   T bg) {
  const T total_fg = warp_sum(fg), total_bg = warp_sum(bg);
  if (lane != 0) return;
  double* slot_fg = args.scale_partial + c * items + item;
  double* slot_bg = slot_fg + args.shape.size[1] * items;
  *slot_fg = (first ? 0.0 : *slot_fg) + static_cast<double>(total_fg);
  *slot_bg = (first ? 0.0 : *slot_bg) + static_cast<double>(total_bg);
}

template <class T, int V, class L, Composition kind>
__global__ void __launch_bounds__(kThreads, kBlocks<V>)
    backward_kernel(const __grid_constant__ ReconstructionArgs args) {
  const Shape& shape = args.shape;
  const int64_t channels = shape.size[1];
  const int64_t segments = segments_of(shape.plane, args.segment), items = shape.size[0] * segments;
  const bool elements = static_cast<bool>(args.grad_loss_elements);
  T sums[kTerms] = {};
  for_pixel_groups<T, V>(args, sums, [&](const Pixels<T, V>& px, int64_t item, int lane) {
    const bool first = px.p - lane * V == item % segments * args.segment;
    const T g = upstream<T>(args.grad_loss, px.b);
    T per_fg = elements ? T(1) : g, per_bg = per_fg, term_fg = T(0), term_bg = T(0), per_area = T(0);
    if constexpr (kind == Composition::masked) {
      const auto slope = math::region_loss_gradient<T>(
          {term<T>(args, args.terms, 0, px.b), term<T>(args, args.terms, 1, px.b),
           term<T>(args, args.terms, 2, px.b), term<T>(args, args.terms, 3, px.b)},
          static_cast<T>(args.fg_weight), static_cast<T>(args.bg_weight), args.normalize_area,
          static_cast<T>(channels));
      per_fg = elements ? static_cast<T>(args.fg_weight) : g * slope.fg;
      per_bg = elements ? static_cast<T>(args.bg_weight) : g * slope.bg;
      term_fg = term<T>(args, args.grad_terms, 0, px.b);
      term_bg = term<T>(args, args.grad_terms, 1, px.b);
      // Per pixel of area; a mask with channels has 1/C of a pixel in each.
      per_area = g * (slope.fg_area - slope.bg_area) + term<T>(args, args.grad_terms, 2, px.b) -
                 term<T>(args, args.grad_terms, 3, px.b);
      if (args.mask_per_channel) per_area /= static_cast<T>(channels);
    }

    Operands<T, V, L> in;
    math::Mask<T> m[V];
    T weight_fg[V], weight_bg[V], d_mask[V];
    const bool joint = args.composition == Composition::mixture_joint;
    // The channels [c0, c1) that share responsibilities: all of them if joint, else one at a time.
    const int64_t step = kind == Composition::mixture_joint && joint ? channels : 1;
    for (int64_t c0 = 0; c0 < channels; c0 += step) {
      T u[V];
      if (elements) {
        px.load(args.grad_loss_elements, c0, u);
      } else {
#pragma unroll
        for (int j = 0; j < V; ++j) u[j] = T(1);
      }
      const bool new_mask = c0 == 0 || args.mask_per_channel;
      if (new_mask) {
#pragma unroll
        for (int j = 0; j < V; ++j) d_mask[j] = T(0);
      }
      if constexpr (kind == Composition::mixture_joint) {
        T fg[V] = {}, bg[V] = {};
        for (int64_t c = c0; c < c0 + step; ++c) {
          in.load(args, px, c, c == c0 && new_mask);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            fg[j] += L::eval(in.fg[j], in.target[j], in.fg_scale).value;
            bg[j] += L::eval(in.bg[j], in.target[j], in.bg_scale).value;
          }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const auto mix = math::mixture(in.mask[j], fg[j], bg[j]);
          if (px.live) sums[0] += mix.value;
          weight_fg[j] = u[j] * per_fg * mix.d_fg;
          weight_bg[j] = u[j] * per_fg * mix.d_bg;
          d_mask[j] += u[j] * per_fg * mix.d_logit;
        }
      } else {
        in.load(args, px, c0, new_mask);
        if (new_mask) {
          in.make_mask(args, m);
          const T share = args.mask_per_channel ? T(1) / static_cast<T>(channels) : T(1);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            if (!px.live || kind != Composition::masked) continue;
            sums[2] += share * m[j].on;
            sums[3] += share * m[j].off;
          }
        }
      }
      for (int64_t c = c0; c < c0 + step; ++c) {
        // Of a joint mixture the responsibilities needed all channels first: these come from cache.
        if (kind == Composition::mixture_joint && step > 1) in.load(args, px, c, false);
        T d_fg[V], d_bg[V], d_target[V], d_fg_scale = T(0), d_bg_scale = T(0);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const bool live = px.live;
          if constexpr (kind == Composition::blended) {
            const T blend = m[j].on * in.fg[j] + m[j].off * in.bg[j];
            const auto nll = L::eval(blend, in.target[j], in.fg_scale);
            const T w = u[j] * per_fg, d_blend = w * nll.d_x;
            if (live) sums[0] += nll.value;
            d_fg[j] = m[j].on * d_blend;
            d_bg[j] = m[j].off * d_blend;
            d_target[j] = w * nll.d_target;
            d_mask[j] += m[j].slope * (in.fg[j] - in.bg[j]) * d_blend;
            if (live) d_fg_scale += w * nll.d_scale;
          } else {
            const auto fg = L::eval(in.fg[j], in.target[j], in.fg_scale);
            const auto bg = L::eval(in.bg[j], in.target[j], in.bg_scale);
            if constexpr (kind == Composition::masked) {
              const T to_fg = u[j] * per_fg + term_fg, to_bg = u[j] * per_bg + term_bg;
              if (live) {
                sums[0] += m[j].on * fg.value;
                sums[1] += m[j].off * bg.value;
              }
              weight_fg[j] = to_fg * m[j].on;
              weight_bg[j] = to_bg * m[j].off;
              d_mask[j] += m[j].slope * (to_fg * fg.value - to_bg * bg.value + (new_mask ? per_area : T(0)));
            }
            d_fg[j] = weight_fg[j] * fg.d_x;
            d_bg[j] = weight_bg[j] * bg.d_x;
            d_target[j] = weight_fg[j] * fg.d_target + weight_bg[j] * bg.d_target;
            if (live) {
              d_fg_scale += weight_fg[j] * fg.d_scale;
              d_bg_scale += weight_bg[j] * bg.d_scale;
            }
          }
          if (!args.bg) d_fg[j] += d_bg[j];
        }
        px.store(args.grad_fg, c, d_fg);
        px.store(args.grad_bg, c, d_bg);
        px.store(args.grad_target, c, d_target);
        if (args.scale_partial) add_scale_gradient(args, items, item, lane, c, first, d_fg_scale, d_bg_scale);
      }
      if (args.mask_per_channel) px.store(args.grad_mask, c0, d_mask);
    }
    if (!args.mask_per_channel) px.store(args.grad_mask, 0, d_mask);
  });
}

struct Kernels {
  template <class T, int V, class L, Composition kind>
  static Kernel get() {
    return backward_kernel<T, V, L, kind>;
  }
};

}  // namespace

void reconstruction_backward(const ReconstructionArgs& args, bool f64, Stream stream) {
  run<Kernels>(args, f64, stream);
}

}  // namespace fgbg::cuda
