// Values of the reconstruction losses; see reconstruction.cuh for the mapping.
#include "reconstruction.cuh"

namespace fgbg::cuda {
namespace {

template <class F, class L, Composition kind>
__global__ void __launch_bounds__(kThreads, kBlocks<F, true>)
    forward_kernel(const __grid_constant__ ReconstructionArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const int channels = static_cast<int>(args.shape.size[1]);
  const math::Excluded<T> zeros = excluded_by_mask<F>(args);
  const Scales<T, L> scales(args);
  const bool joint = args.composition == Composition::mixture_joint;
  T sums[kTerms] = {};
  for_items<F>(args, args.shape.plane, [&](const Item& item) {
    Operands<F, L, kAheadInForward<F>> in(args, scales);
#pragma unroll 1
    for (int at = item.lane * V; at < item.length; at += item.step) {
      const Pixels<F> px{args.shape, item.b, item.begin + at, true};
      const Pixels<F> next{args.shape, item.b, px.p + item.step, at + item.step < item.length};
      in.begin(px, at < item.step);
      math::Mask<T> m[V];
      T fg[V] = {}, bg[V] = {}, loss[V];
#pragma unroll 1
      for (int c = 0; c < channels; ++c) {
        // Of a mixture always, from cache: nvcc would put a branch for the mask's load, which is used last,
        // behind the wait for the others.
        const bool new_mask = kind == Composition::mixture_joint || c == 0 || args.mask_per_channel;
        in.load(c, new_mask, next);
        if constexpr (kind == Composition::masked || kind == Composition::blended) {
          if (new_mask) {
            in.make_mask(m);
            if (kind == Composition::masked && args.areas) {
#pragma unroll
              for (int j = 0; j < V; ++j) {
                sums[2] += m[j].on;
                sums[3] += m[j].off;
              }
            }
          }
        }
#pragma unroll
        for (int j = 0; j < V; ++j) {
          if constexpr (kind == Composition::masked) {
            const T on = m[j].on, off = m[j].off;
            fg[j] = math::masked_value(on, L::eval(in.fg[j], in.target[j], in.fg_scale).value, zeros);
            bg[j] = math::masked_value(off, L::eval(in.bg[j], in.target[j], in.bg_scale).value, zeros);
            sums[0] += fg[j];
            sums[1] += bg[j];
          } else if constexpr (kind == Composition::blended) {
            const T blend = math::blend(m[j].on, m[j].off, in.fg[j], in.bg[j], zeros);
            loss[j] = L::eval(blend, in.target[j], in.fg_scale).value;
            sums[0] += loss[j];
          } else {
            fg[j] = (joint ? fg[j] : T(0)) + L::eval(in.fg[j], in.target[j], in.fg_scale).value;
            bg[j] = (joint ? bg[j] : T(0)) + L::eval(in.bg[j], in.target[j], in.bg_scale).value;
          }
        }
        if constexpr (kind == Composition::masked) {
          if (!args.loss) continue;
          const math::RegionWeights<T> weights = region_weights<T>(args);
          const math::ExcludedOfRegions<T> excluded = excluded_of_loss(weights, hard_mask(args));
#pragma unroll
          for (int j = 0; j < V; ++j)
            loss[j] = math::masked_loss(m[j].on, m[j].off, weights.fg, weights.bg, fg[j], bg[j], excluded);
        } else if constexpr (kind == Composition::mixture_joint) {
          if (joint && c + 1 < channels) continue;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            loss[j] = math::mixture(in.mask[j], fg[j], bg[j]).value;
            sums[0] += loss[j];
          }
        }
        store_channel(args.loss, px, c, loss);
      }
    }
    if (args.partial) write_terms(args, item, sums);
  });
  final_reduction_if_last<T>(args);
}

template <class L, Composition kind>
struct Forward {
  template <class F>
  static Kernel get() {
    return forward_kernel<F, L, kind>;
  }
};

}  // namespace

template <class L>
void forward_of(const ReconstructionArgs& args, bool f64, Stream stream) {
  launch_reconstruction<Forward, L>(args, f64, stream);
}

#define FGBG_ENTRY(L, name) template void forward_of<math::L>(const ReconstructionArgs&, bool, Stream);
FGBG_FOR_LIKELIHOODS_HERE(FGBG_ENTRY)
#undef FGBG_ENTRY

}  // namespace fgbg::cuda
