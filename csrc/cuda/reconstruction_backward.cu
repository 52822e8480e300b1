// The gradients of the reconstruction losses with respect to every operand, in one pass, and the sums of the
// loss if partial sums are wanted.
#include "reconstruction.cuh"

namespace fgbg::cuda {
namespace {

// Accumulates the gradients of the scales of channel c in slots that this warp alone writes.
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
  const math::Excluded<T> zeros = math::Excluded<T>::zeros_if(hard_mask(args));
  T sums[kTerms] = {};
  for_pixel_groups<T, V>(args, sums, [&](const Pixels<T, V>& px, int64_t item, int lane) {
    const bool first = px.p - lane * V == item % segments * args.segment;
    math::RegionUpstream<T> to{};
    T per_loss = T(0);  // times the upstream gradient of an element, where the loss is not reduced
    if constexpr (kind == Composition::masked)
      to = region_upstream<T>(args, px.b);
    else
      per_loss = elements ? T(1) : upstream<T>(args.grad_loss, px.b);

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
          weight_fg[j] = u[j] * per_loss * mix.d_fg;
          weight_bg[j] = u[j] * per_loss * mix.d_bg;
          d_mask[j] += u[j] * per_loss * mix.d_logit;
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
        // The responsibilities of a joint mixture needed all channels first; this second read hits the cache.
        if (kind == Composition::mixture_joint && step > 1) in.load(args, px, c, false);
        T d_fg[V], d_bg[V], d_target[V], d_fg_scale = T(0), d_bg_scale = T(0);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const bool live = px.live;
          if constexpr (kind == Composition::blended) {
            const T blend = math::blend(m[j].on, m[j].off, in.fg[j], in.bg[j], zeros);
            const auto nll = L::eval(blend, in.target[j], in.fg_scale);
            const T w = u[j] * per_loss;
            const T d_blend = w * nll.d_x;
            if (live) sums[0] += nll.value;
            d_fg[j] = math::chain(d_blend, m[j].on, m[j].on, zeros);
            d_bg[j] = math::chain(d_blend, m[j].off, m[j].off, zeros);
            d_target[j] = w * nll.d_target;
            d_mask[j] += m[j].slope * math::blend_d_mask(in.fg[j], in.bg[j], d_blend);
            if (live) d_fg_scale += w * nll.d_scale;
          } else {
            const auto fg = L::eval(in.fg[j], in.target[j], in.fg_scale);
            const auto bg = L::eval(in.bg[j], in.target[j], in.bg_scale);
            T on = T(1), off = T(1);
            if constexpr (kind == Composition::masked) {
              on = m[j].on;
              off = m[j].off;
              const T to_fg = math::masked_to_sum(u[j], to.fg, to.fg_term);
              const T to_bg = math::masked_to_sum(u[j], to.bg, to.bg_term);
              if (live) {
                sums[0] += math::masked_value(on, fg.value, zeros);
                sums[1] += math::masked_value(off, bg.value, zeros);
              }
              weight_fg[j] = math::masked_weight(to_fg, on);
              weight_bg[j] = math::masked_weight(to_bg, off);
              d_mask[j] +=
                  m[j].slope * (math::masked_d_mask(on, off, to_fg, to_bg, fg.value, bg.value, to.excluded) +
                                (new_mask ? to.mask : T(0)));
            }
            const auto to_fg = [&](T d) { return math::chain(weight_fg[j], d, on, to.excluded.fg); };
            const auto to_bg = [&](T d) { return math::chain(weight_bg[j], d, off, to.excluded.bg); };
            d_fg[j] = to_fg(fg.d_x);
            d_bg[j] = to_bg(bg.d_x);
            d_target[j] = to_fg(fg.d_target) + to_bg(bg.d_target);
            if (live) {
              d_fg_scale += to_fg(fg.d_scale);
              d_bg_scale += to_bg(bg.d_scale);
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
