// Blends of slots: values and, in one kernel with them, gradients. See slots.cuh for the mapping.
#include "slots.cuh"

namespace fgbg::cuda {
namespace {

// A blend of kCount channels that share their masks, of a kernel that does not take all: one pass over the
// slots for their shares, one for the blend, and one for the gradients. Adds the loss to `sum`.
template <int kCount, bool kGradient, class F, class L, class T>
__device__ __forceinline__ void blend_few(const SlotArgs& args, const Pixels<F>& px,
                                          const SlotScales<F, L>& scales, T& sum) {
  constexpr int V = F::V;
  const int slots = static_cast<int>(args.slots);
  const bool logits = args.mask_kind == MaskKind::logits;
  const math::Excluded<T> zeros = math::Excluded<T>::zeros_if(true);
  const OfSlots<F> shares(args, px);  // of logits to be multiplied by `inverse`
  T inverse[V];
  if (logits) {
    T base[V], base_of[V], masks[V] = {};
    largest_mask(args, px, slots, 0, base, base_of);
    for_slots(args.mask, px, slots, 0, [&](int k, const T(&mask)[V]) {
      T share[V];
#pragma unroll
      for (int j = 0; j < V; ++j) {
        share[j] = math::exp_minus_abs(mask[j] - base[j]);
        masks[j] += T(k) == base_of[j] ? T(0) : share[j];
      }
      shares.set(k, share);
    });
#pragma unroll
    for (int j = 0; j < V; ++j) inverse[j] = T(1) / (T(1) + masks[j]);
  } else {
    for_slots(args.mask, px, slots, 0, [&](int k, const T(&mask)[V]) {
      T share[V];
#pragma unroll
      for (int j = 0; j < V; ++j) share[j] = math::exp(mask[j]);
      shares.set(k, share);
    });
  }
  const auto share_of = [&](int k, T(&share)[V]) {
    shares.get(k, share);
    if (!logits) return;
#pragma unroll
    for (int j = 0; j < V; ++j) share[j] *= inverse[j];
  };

  T blend[kCount][V] = {}, d_blend[kCount][V];
  {
    SlotChannels<F, kCount, kAheadOfSlots<F, kGradient>, false> in(args, px, 0, kCount);
#pragma unroll 1
    for (int k = 0; k < slots; ++k) {
      T share[V];
      in.load(k + 1 == slots);
      share_of(k, share);
      in.for_channels([&](int c, const T(&x)[V]) {
#pragma unroll
        for (int j = 0; j < V; ++j)
          blend[c][j] += math::blend_term(share[j], x[j], math::slot_share(in.mask[j]));
      });
    }
  }
  Elements<F> element;
  element.load(args, px, 0);
  Raw<F> raw_target[kCount];
#pragma unroll
  for (int c = 0; c < kCount; ++c) fetch<F>(args.target, offset_of(args.target, px, c), raw_target[c]);
#pragma unroll
  for (int c = 0; c < kCount; ++c) {
    T target[V], loss[V];
    math::Scale<T> scale[V];
    unpack<F>(args.target, raw_target[c], target);
    scales.load(px, 0, c, true, scale);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const math::Nll<T> nll = L::eval(blend[c][j], target[j], scale[j]);
      loss[j] = nll.value;
      d_blend[c][j] = element.upstream[j] * nll.d_x;
      if (px.live) sum += nll.value;
    }
    store_channel(args.loss, px, c, loss);
  }
  if constexpr (kGradient) {
    SlotChannels<F, kCount, false, false> in(args, px, 0, kCount);
    Place<F> d_x_at(args.grad_x.first, px, 0), d_mask_at(args.grad_mask.first, px, 0);
#pragma unroll 1
    for (int k = 0; k < slots; ++k) {
      T share[V], d_share[V] = {}, d_mask[V];
      in.load(k + 1 == slots);
      share_of(k, share);
      Place<F> d_channel = d_x_at;
      in.for_channels([&](int c, const T(&x)[V]) {
        T d_x[V];
#pragma unroll
        for (int j = 0; j < V; ++j) {
          const T present = math::slot_share(in.mask[j]);
          d_x[j] = math::chain(d_blend[c][j], share[j], present, zeros);
          d_share[j] += math::selected(math::blend_d_share(x[j], logits ? blend[c][j] : T(0), d_blend[c][j]),
                                       present, zeros);
        }
        if (args.grad_x && px.live) d_channel.store(args.grad_x.first, d_x);
        d_channel.next_channel(args.grad_x.first);
      });
      d_x_at.step(args.grad_x.stride);
#pragma unroll
      for (int j = 0; j < V; ++j)
        d_mask[j] = math::chain(share[j], d_share[j], math::slot_share(in.mask[j]), zeros);
      if (args.grad_mask && px.live) d_mask_at.store(args.grad_mask.first, d_mask);
      d_mask_at.step(args.grad_mask.stride);
    }
  }
}

template <class F, class L, bool kGradient>
__global__ void __launch_bounds__(kThreads,
                                  kTakesAll<F> ? 1 : (kAheadOfSlots<F, kGradient> || kBeforeHopper ? 2 : 3))
    slot_blend_kernel(const __grid_constant__ SlotArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const int channels = static_cast<int>(args.shape.size[1]), slots = static_cast<int>(args.slots);
  const int group = args.mask_per_channel ? 1 : channels;
  const bool logits = args.mask_kind == MaskKind::logits;
  const bool others =
      kTakesAll<F> && kGradient && (args.grad_target || args.scale_partial || args.grad_scale_map);
  const math::Excluded<T> zeros = math::Excluded<T>::zeros_if(true);
  const SlotScales<F, L> scales(args);
  const SlotScaleSums scale_sums(args);
  T sums[1] = {};
  for_items<F>(args, args.shape.plane, [&](const Item& item) {
  // Every thread runs every round, since the sums of scales need whole warps.
#pragma unroll 1
    for (int round = 0; round < item.length; round += item.step) {
      const int at = round + item.lane * V;
      const bool live = at < item.length;
      const Pixels<F> px{args.shape, item.b, item.begin + (live ? at : 0), live};
      if constexpr (kColours<F, L> > 0) {
        if (group == kColours<F, L>) {
          blend_few<kColours<F, L>, kGradient>(args, px, scales, sums[0]);
          continue;
        }
      }
      const OfSlots<F> d_shares(args, px);
#pragma unroll 1
      for (int c0 = 0; c0 < channels; c0 += group) {
        T base[V] = {}, base_of[V], masks[V] = {};
        if (logits) {
          largest_mask(args, px, slots, c0, base, base_of);
          for_slots(args.mask, px, slots, c0, [&](int k, const T(&mask)[V]) {
#pragma unroll
            for (int j = 0; j < V; ++j)
              masks[j] += T(k) == base_of[j] ? T(0) : math::exp_minus_abs(mask[j] - base[j]);
          });
#pragma unroll
          for (int j = 0; j < V; ++j) masks[j] = T(1) / (T(1) + masks[j]);
        }
        // The share of a slot, whose mask is loaded.
        const auto share_of = [&](T mask, int j) {
          return logits ? math::exp_minus_abs(mask - base[j]) * masks[j] : math::exp(mask);
        };

        T reached[V] = {};  // whether a channel has a weight
#pragma unroll 1
        for (int c = c0; c < c0 + group; ++c) {
          T blend[V] = {}, target[V], loss[V], d_weight[V], d_blend[V];
          load_channel(args.target, px, c, target);
          for_masked_slots(args, px, slots, c, [&](int, const T(&mask)[V], const T(&x)[V]) {
#pragma unroll
            for (int j = 0; j < V; ++j)
              blend[j] += math::blend_term(share_of(mask[j], j), x[j], math::slot_share(mask[j]));
          });
          math::Scale<T> scale[V];
          scales.load(px, 0, c, true, scale);
          Elements<F> element;
          element.load(args, px, c);
          T d_target[V], d_scales[V], d_scale = T(0);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const math::Nll<T> nll = L::eval(blend[j], target[j], scale[j]);
            loss[j] = nll.value;
            if constexpr (kTakesAll<F>) {
              const T share = element.share(j);
              d_weight[j] = math::selected(element.upstream[j] * nll.value, share, zeros);
              loss[j] = math::selected(element.weight[j] * nll.value, share, zeros);
              element.upstream[j] = math::selected(element.weight[j] * element.upstream[j], share, zeros);
              reached[j] += share;
              d_blend[j] = math::chain(element.upstream[j], nll.d_x, share, zeros);
              d_target[j] = math::chain(element.upstream[j], nll.d_target, share, zeros);
              d_scales[j] = math::chain(element.upstream[j], nll.d_scale, share, zeros);
              d_scale += d_scales[j];
            } else {
              d_blend[j] = element.upstream[j] * nll.d_x;
            }
            if (live) sums[0] += loss[j];
          }
          store_channel(args.loss, px, c, loss);
          if constexpr (kGradient) {
            if constexpr (kTakesAll<F>) {
              store_channel(args.grad_weight, px, c, d_weight);
              store_channel(args.grad_target, px, c, d_target);
              store_slot(args.grad_scale_map, px, 0, c, d_scales);
              if (others && args.scale_partial) {
                const bool first = round == 0 && (!args.one_scale || c == 0);
                scale_sums.add(item, first, args.one_scale ? 0 : c, live ? d_scale : T(0));
              }
            }
            Place<F> d_x_at(args.grad_x.first, px, c);
            for_masked_slots(args, px, slots, c, [&](int k, const T(&mask)[V], const T(&x)[V]) {
              T d_x[V], d_share[V] = {};
              if (c > c0) d_shares.get(k, d_share);
#pragma unroll
              for (int j = 0; j < V; ++j) {
                const T of_slot = math::slot_share(mask[j]);
                const T present = kTakesAll<F> && element.weight[j] == T(0) ? T(0) : of_slot;
                d_x[j] = math::chain(d_blend[j], share_of(mask[j], j), present, zeros);
                d_share[j] += math::selected(math::blend_d_share(x[j], logits ? blend[j] : T(0), d_blend[j]),
                                             present, zeros);
              }
              if (args.grad_x && px.live) d_x_at.store(args.grad_x.first, d_x);
              d_x_at.step(args.grad_x.stride);
              d_shares.set(k, d_share);
            });
          }
        }
        if constexpr (kGradient) {
          if (!args.grad_mask) continue;
          Place<F> d_mask_at(args.grad_mask.first, px, c0);
          for_slots(args.mask, px, slots, c0, [&](int k, const T(&mask)[V]) {
            T d_share[V], d_mask[V];
            d_shares.get(k, d_share);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const T of_slot = math::slot_share(mask[j]);
              const T present = kTakesAll<F> && reached[j] == T(0) ? T(0) : of_slot;
              d_mask[j] = math::chain(share_of(mask[j], j), d_share[j], present, zeros);
            }
            if (px.live) d_mask_at.store(args.grad_mask.first, d_mask);
            d_mask_at.step(args.grad_mask.stride);
          });
        }
      }
    }
    if (others && args.scale_partial) scale_sums.write(item);
    if (args.partial) write_sums(item, sums, 1, items_of(args), args.partial);
  });
  final_reduction_if_last<T>(args);
}

template <class L, bool kGradient>
struct Blend {
  template <class F>
  static SlotKernel get() {
    return slot_blend_kernel<F, L, kGradient>;
  }
};

}  // namespace

template <class L>
void slot_blend_of(const SlotArgs& args, bool gradients, bool f64, Stream stream) {
  gradients ? launch_slots<Blend<L, true>>(args, f64, stream)
            : launch_slots<Blend<L, false>>(args, f64, stream);
}

#define FGBG_ENTRY(L, name) template void slot_blend_of<math::L>(const SlotArgs&, bool, bool, Stream);
FGBG_FOR_LIKELIHOODS_HERE(FGBG_ENTRY)
#undef FGBG_ENTRY

}  // namespace fgbg::cuda
