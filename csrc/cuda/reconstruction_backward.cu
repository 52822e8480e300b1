// The gradients of the reconstruction losses with respect to every operand, in one pass, and the sums of the
// loss if partial sums are wanted.
#include "reconstruction.cuh"

namespace fgbg::cuda {
namespace {

// The gradients of the scales, summed over an item: a slot for each of 2 C sums and each warp, in shared
// memory; or, with so many channels that there is no room, the partial sums themselves, which only this warp
// then writes.
class ScaleSums {
 public:
  __device__ explicit ScaleSums(const ReconstructionArgs& args) : args_(args) {}

  // Every lane of the warp has to call it.
  template <class T>
  __device__ void add(const Item& item, bool first, int c, T fg, T bg) const {
    const double total_fg = static_cast<double>(warp_sum(fg)), total_bg = static_cast<double>(warp_sum(bg));
    if (thread_of_block() % kWarp != 0) return;
    double* slot_fg = slot(item, c);
    double* slot_bg = slot(item, static_cast<int>(args_.shape.size[1]) + c);
    *slot_fg = first ? total_fg : *slot_fg + total_fg;
    *slot_bg = first ? total_bg : *slot_bg + total_bg;
  }

  // After the last round of an item. Every thread of the team has to call it.
  __device__ void write(const Item& item) const {
    if (!args_.scale_slots) return;
    synchronize(item);
    const int first_warp = thread_of_block() / item.team * (item.team / kWarp);
    for (int64_t k = item.lane; k < 2 * args_.shape.size[1]; k += item.team) {
      double total = 0.0;
      for (int w = 0; w < item.team / kWarp; ++w) total += slots()[k * kWarps + first_warp + w];
      args_.scale_partial[k * items_of(args_) + item.number] = total;
    }
    synchronize(item);
  }

 private:
  static __device__ double* slots() {
    extern __shared__ double scale_slots[];
    return scale_slots;
  }
  static __device__ void synchronize(const Item& item) {
    if (item.team == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }
  __device__ double* slot(const Item& item, int k) const {
    return args_.scale_slots ? slots() + k * kWarps + thread_of_block() / kWarp
                             : args_.scale_partial + k * items_of(args_) + item.number;
  }

  const ReconstructionArgs& args_;
};

// A mixture's gradients of operands of several types need more registers than two blocks leave.
template <class F, Composition kind>
constexpr int kBackwardBlocks = F::kMixed && kind == Composition::mixture_joint ? 1 : kBlocks<F>;

template <class F, class L, Composition kind>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<F, kind>)
    backward_kernel(const __grid_constant__ ReconstructionArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  constexpr bool kMasked = kind == Composition::masked, kMixture = kind == Composition::mixture_joint;
  constexpr bool kBlended = !kMasked && !kMixture, kLayers = kind != Composition::plain;
  const int channels = static_cast<int>(args.shape.size[1]);
  const bool elements = kHasAll<F> && args.grad_loss_elements;
  const bool others = kHasAll<F> && (args.grad_target || args.scale_partial ||
                                     (F::kMaps && (args.grad_fg_scale_map || args.grad_bg_scale_map)));
  const math::Excluded<T> zeros = excluded_by_zeros<F>(args), of_hard_mask = excluded_by_mask<F>(args);
  const bool weighted = F::kMaps && args.weight;
  const Scales<T, L> scales(args);
  const ScaleSums scale_sums(args);
  // Channels that share a mask, or a mixture's responsibilities, which need all of them first.
  const bool apart = kMixture && (args.composition != Composition::mixture_joint || args.mask_per_channel);
  const int group = apart ? 1 : channels, last_group = kMixture ? channels - group : 0;
  T sums[kTerms] = {};
  for_items<F>(args, args.shape.plane, [&](const Item& item) {
    math::RegionUpstream<T> to{};
    T per_loss = T(0);  // times the upstream gradient of an element, where the loss is not reduced
    if constexpr (kMasked)
      to = region_upstream<T>(args, item.b);
    else
      per_loss = elements ? T(1) : upstream<T>(args.grad_loss, item.b);

    const T all_fg = math::masked_to_sum(T(1), to.fg, to.fg_term);
    const T all_bg = math::masked_to_sum(T(1), to.bg, to.bg_term);
    const bool is_plain =
        !F::kMixed && !elements && zeros.nothing() && to.excluded.fg.nothing() && to.excluded.bg.nothing();

    // Every thread runs every round, since the sums of scales need whole warps.
#pragma unroll 1
    for (int round = 0; round < item.length; round += item.step) {
      const int at = round + item.lane * V;
      const bool live = at < item.length;
      const Pixels<F> px{args.shape, item.b, item.begin + (live ? at : 0), live};
      math::Mask<T> m[V];
      T weight_fg[V], weight_bg[V], d_mask[V] = {};
      [[maybe_unused]] T d_weight[V], magnitudes[V] = {};  // magnitudes: summed over the channels of a mask
      // The upstream gradients of the elements of channel c, or 1.
      const auto load_upstream = [&](int c, T(&u)[V]) {
        if (elements) return load_channel(args.grad_loss_elements, px, c, u);
#pragma unroll
        for (int j = 0; j < V; ++j) u[j] = T(1);
      };
#pragma unroll 1
      for (int c0 = 0; c0 <= last_group; c0 += kMixture ? group : 1) {
        if constexpr (kMixture) {
          T u[V], fg[V] = {}, bg[V] = {};
          load_upstream(c0, u);
          Operands<F, L, F::V == kVectorHalf, kLayers> in(args, scales);
          in.begin(px, c0);
#pragma unroll 1
          for (int c = c0; c < c0 + group; c += kTogether<F>) {
            in.load_together(c, c0 + group, c == c0, px, [&] {
#pragma unroll
              for (int j = 0; j < V; ++j) {
                fg[j] += L::eval(in.fg[j], in.target[j], in.fg_scale(j)).value;
                bg[j] += L::eval(in.bg[j], in.target[j], in.bg_scale(j)).value;
              }
            });
          }
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const auto mix = math::mixture(in.mask[j], fg[j], bg[j]);
            const T w = u[j] * per_loss;
            if (live) sums[0] += in.weighted(mix.value, j);
            weight_fg[j] = in.weighted(w * mix.d_fg, j);
            weight_bg[j] = in.weighted(w * mix.d_bg, j);
            d_mask[j] += in.weighted(w * mix.d_logit, j);
            d_weight[j] = in.unless_left_out(w * mix.value, j);
          }
          if constexpr (F::kMaps) store_channel(args.grad_weight, px, c0, d_weight);
        }
        Operands<F, L, !kMixture && kAheadInBackward<F>, kLayers> in(args, scales);
        in.begin(px, c0);  // of a mixture, for the second time: from cache
#pragma unroll 1
        for (int c = c0; c < c0 + group; ++c) {
          const bool new_mask = !kMixture && (c == 0 || args.mask_per_channel);
          in.load(c, new_mask);
          in.load_maps(c, px);
          if (kLayers && new_mask) {
            in.make_mask(m);
            if (kMasked && args.areas && live && !weighted) {
#pragma unroll
              for (int j = 0; j < V; ++j) {
                sums[2] += m[j].on;
                sums[3] += m[j].off;
              }
            }
          }
          T d_fg[V], d_bg[V];
          // Most losses are reduced and exclude nothing: all that then is constant, or selects nothing, drops
          // out.
          const auto gradients = [&](auto plain) {
            constexpr bool kPlain = decltype(plain)::value;
            [[maybe_unused]] const math::Excluded<T> none, of_mask = kPlain ? none : of_hard_mask;
            [[maybe_unused]] const math::Excluded<T> of_zeros = kPlain ? none : zeros;
            [[maybe_unused]] const math::ExcludedOfRegions<T> excluded =
                kPlain ? math::ExcludedOfRegions<T>{} : to.excluded;
            T u[V];
            if (!kPlain && !kMixture) load_upstream(c, u);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              if constexpr (kBlended) {
                T image = in.fg[j];
                if constexpr (kLayers) image = math::blend(m[j].on, m[j].off, image, in.bg[j], of_mask);
                const auto nll = L::eval(image, in.target[j], in.fg_scale(j));
                const T per_nat = kPlain ? per_loss : u[j] * per_loss;
                const T d_image = in.weighted(per_nat * nll.d_x, j);
                if (live) sums[0] += in.weighted(nll.value, j);
                d_weight[j] = in.unless_left_out(per_nat * nll.value, j);
                if constexpr (kLayers) {
                  const Shares<T> of = in.shares(m[j], j);
                  d_fg[j] = math::chain(d_image, m[j].on, of.select_on, of_zeros);
                  d_bg[j] = math::chain(d_image, m[j].off, of.select_off, of_zeros);
                  d_mask[j] += in.unless_left_out(math::blend_d_mask(in.fg[j], in.bg[j], d_image), j);
                  magnitudes[j] += in.magnitude(j);
                } else {
                  d_fg[j] = d_image;
                }
              } else {
                const auto fg = L::eval(in.fg[j], in.target[j], in.fg_scale(j));
                const auto bg = L::eval(in.bg[j], in.target[j], in.bg_scale(j));
                T on = in.magnitude(j), off = on;  // of a mixture, whose weights are 0 where it is left out
                if constexpr (kMasked) {
                  const Shares<T> of = in.shares(m[j], j);
                  on = of.select_on;
                  off = of.select_off;
                  const T per_fg = kPlain ? all_fg : math::masked_to_sum(u[j], to.fg, to.fg_term);
                  const T per_bg = kPlain ? all_bg : math::masked_to_sum(u[j], to.bg, to.bg_term);
                  if (live) {
                    sums[0] += math::chain(of.on, fg.value, on, of_zeros);
                    sums[1] += math::chain(of.off, bg.value, off, of_zeros);
                    if (weighted) {
                      sums[2] += math::selected(of.on, on, of_zeros);
                      sums[3] += math::selected(of.off, off, of_zeros);
                    }
                  }
                  weight_fg[j] = math::masked_weight(per_fg, of.on);
                  weight_bg[j] = math::masked_weight(per_bg, of.off);
                  const T d = math::masked_d_mask(on, off, per_fg, per_bg, fg.value, bg.value, excluded);
                  if (weighted) {
                    d_mask[j] += in.weighted(d + to.mask(), j);
                    magnitudes[j] += in.magnitude(j);
                    const T by_nats = math::chain(per_fg * m[j].on, fg.value, on, excluded.fg) +
                                      math::chain(per_bg * m[j].off, bg.value, off, excluded.bg);
                    const T by_areas = m[j].on * to.fg_area + m[j].off * to.bg_area;
                    d_weight[j] = in.unless_left_out(by_nats + by_areas, j);
                  } else {
                    d_mask[j] += d;
                  }
                }
                d_fg[j] = math::chain(weight_fg[j], fg.d_x, on, kMixture ? of_zeros : excluded.fg);
                d_bg[j] = math::chain(weight_bg[j], bg.d_x, off, kMixture ? of_zeros : excluded.bg);
              }
              if (args.one_image) d_fg[j] += d_bg[j];
            }
          };
          if constexpr (F::kMixed)  // without a second copy of the code
            gradients(std::false_type{});
          else if (is_plain)
            gradients(std::true_type{});
          else
            gradients(std::false_type{});
          store_channel(args.grad_fg, px, c, d_fg);
          if constexpr (kLayers) store_channel(args.grad_bg, px, c, d_bg);
          if constexpr (F::kMaps && !kMixture) store_channel(args.grad_weight, px, c, d_weight);
          if (others) {
            T u[V], d_target[V], d_fg_scale[V], d_bg_scale[V] = {};
            if (!kMixture) load_upstream(c, u);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              if constexpr (kBlended) {
                T image = in.fg[j];
                if constexpr (kLayers) image = math::blend(m[j].on, m[j].off, image, in.bg[j], of_hard_mask);
                const auto nll = L::eval(image, in.target[j], in.fg_scale(j));
                d_target[j] = in.weighted(u[j] * per_loss * nll.d_target, j);
                d_fg_scale[j] = in.weighted(u[j] * per_loss * nll.d_scale, j);
              } else {
                const auto fg = L::eval(in.fg[j], in.target[j], in.fg_scale(j));
                const auto bg = L::eval(in.bg[j], in.target[j], in.bg_scale(j));
                T on = in.magnitude(j), off = on;
                if constexpr (kMasked) {
                  const Shares<T> of = in.shares(m[j], j);
                  on = of.select_on;
                  off = of.select_off;
                  weight_fg[j] = math::masked_weight(math::masked_to_sum(u[j], to.fg, to.fg_term), of.on);
                  weight_bg[j] = math::masked_weight(math::masked_to_sum(u[j], to.bg, to.bg_term), of.off);
                }
                const math::Excluded<T> fg_excluded = kMixture ? zeros : to.excluded.fg;
                const math::Excluded<T> bg_excluded = kMixture ? zeros : to.excluded.bg;
                const auto by_fg = [&](T d) { return math::chain(weight_fg[j], d, on, fg_excluded); };
                const auto by_bg = [&](T d) { return math::chain(weight_bg[j], d, off, bg_excluded); };
                d_target[j] = by_fg(fg.d_target) + by_bg(bg.d_target);
                d_fg_scale[j] = by_fg(fg.d_scale);
                d_bg_scale[j] = by_bg(bg.d_scale);
              }
            }
            store_channel(args.grad_target, px, c, d_target);
            if constexpr (F::kMaps) {
              store_channel(args.grad_fg_scale_map, px, c, d_fg_scale);
              store_channel(args.grad_bg_scale_map, px, c, d_bg_scale);
            }
            if (args.scale_partial) {
              T sum_fg = T(0), sum_bg = T(0);
#pragma unroll
              for (int j = 0; j < V; ++j) {
                sum_fg += live ? d_fg_scale[j] : T(0);
                sum_bg += live ? d_bg_scale[j] : T(0);
              }
              scale_sums.add(item, round == 0, c, sum_fg, sum_bg);
            }
          }
          if (kLayers && (args.mask_per_channel || c + 1 == channels)) {
            if constexpr (!kMixture) {
#pragma unroll
              for (int j = 0; j < V; ++j) {
                const T slope =
                    args.mask_kind == MaskKind::logits ? math::mask_slope(m[j].on, m[j].off) : T(1);
                d_mask[j] = slope * (d_mask[j] + (weighted ? T(0) : to.mask()));
                if (weighted)  // whatever the mask is where all its elements are left out
                  d_mask[j] = math::selected(d_mask[j], magnitudes[j], math::Excluded<T>::zeros_if(true));
                magnitudes[j] = T(0);
              }
            }
            store_channel(args.grad_mask, px, c, d_mask);
#pragma unroll
            for (int j = 0; j < V; ++j) d_mask[j] = T(0);
          }
        }
      }
    }
    if (others && args.scale_partial) scale_sums.write(item);
    if (args.partial) write_terms(args, item, sums);
  });
  final_reduction_if_last<T>(args);
}

template <class L, Composition kind>
struct Backward {
  template <class F>
  static Kernel get() {
    return backward_kernel<F, L, kind>;
  }
};

}  // namespace

template <class L>
void backward_of(const ReconstructionArgs& args, bool f64, Stream stream) {
  launch_reconstruction<Backward, L>(args, f64, stream);
}

#define FGBG_ENTRY(L, name) template void backward_of<math::L>(const ReconstructionArgs&, bool, Stream);
FGBG_FOR_LIKELIHOODS_HERE(FGBG_ENTRY)
#undef FGBG_ENTRY

}  // namespace fgbg::cuda
