// Values of the reconstruction losses; see reconstruction.cuh for the mapping.
#include "reconstruction.cuh"

namespace fgbg::cuda {
namespace {

// Forward passes of operands of one type need so few registers that there is room for three blocks, but for
// those that convert float16, or compute much at a time.
template <class F, class L, Composition kind>
constexpr int kForwardBlocks =
    std::is_same_v<F, Float32> ||
            (std::is_same_v<F, BFloat16> && !std::is_same_v<L, math::Poisson> &&
             !(std::is_same_v<L, math::Bernoulli> && kind == Composition::mixture_joint))
        ? 3
        : kBlocks<F>;

template <class F, class L, Composition kind>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<F, L, kind>)
    forward_kernel(const __grid_constant__ ReconstructionArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const int channels = static_cast<int>(args.shape.size[1]);
  constexpr bool kMixture = kind == Composition::mixture_joint, kLayers = kind != Composition::plain;
  const math::Excluded<T> zeros = excluded_by_zeros<F>(args), of_mask = excluded_by_mask<F>(args);
  const Scales<T, L> scales(args);
  const bool joint = args.composition == Composition::mixture_joint;
  T sums[kTerms] = {};
  for_items<F>(args, args.shape.plane, [&](const Item& item) {
    Operands<F, L, false, kLayers> in(args, scales);
#pragma unroll 1
    for (int at = item.lane * V; at < item.length; at += item.step) {
      const Pixels<F> px{args.shape, item.b, item.begin + at, true};
      in.begin(px);
      math::Mask<T> m[V];
      T fg[V] = {}, bg[V] = {}, loss[V];
#pragma unroll 1
      for (int c = 0; c < channels; ++c) {
        const bool new_mask = c == 0 || args.mask_per_channel;
        in.load(c, new_mask);
        in.load_maps(c, px);
        if constexpr (kind == Composition::masked || kind == Composition::blended) {
          if (new_mask) {
            in.make_mask(m);
            if (kind == Composition::masked && args.areas && !(F::kMaps && args.weight)) {
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
            const Shares<T> of = in.shares(m[j], j);
            const T nll_fg = L::eval(in.fg[j], in.target[j], in.fg_scale(j)).value;
            const T nll_bg = L::eval(in.bg[j], in.target[j], in.bg_scale(j)).value;
            fg[j] = math::chain(of.on, nll_fg, of.select_on, zeros);
            bg[j] = math::chain(of.off, nll_bg, of.select_off, zeros);
            sums[0] += fg[j];
            sums[1] += bg[j];
            if (F::kMaps && args.weight) {
              sums[2] += math::selected(of.on, of.select_on, zeros);
              sums[3] += math::selected(of.off, of.select_off, zeros);
            }
          } else if constexpr (!kMixture) {
            T image = in.fg[j];
            if constexpr (kLayers) image = math::blend(m[j].on, m[j].off, image, in.bg[j], of_mask);
            loss[j] = in.weighted(L::eval(image, in.target[j], in.fg_scale(j)).value, j);
            sums[0] += loss[j];
          } else {
            fg[j] = (joint ? fg[j] : T(0)) + L::eval(in.fg[j], in.target[j], in.fg_scale(j)).value;
            bg[j] = (joint ? bg[j] : T(0)) + L::eval(in.bg[j], in.target[j], in.bg_scale(j)).value;
          }
        }
        if constexpr (kind == Composition::masked) {
          if (!args.loss) continue;
          const math::RegionWeights<T> weights = region_weights<T>(args);
          const math::ExcludedOfRegions<T> excluded = excluded_of_loss(weights, selects(args));
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const Shares<T> of = in.shares(m[j], j);
            loss[j] = math::masked_loss(of.select_on, of.select_off, weights.fg, weights.bg, fg[j], bg[j],
                                        excluded);
          }
        } else if constexpr (kMixture) {
          if (joint && c + 1 < channels) continue;
#pragma unroll
          for (int j = 0; j < V; ++j) {
            loss[j] = in.weighted(math::mixture(in.mask[j], fg[j], bg[j]).value, j);
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
