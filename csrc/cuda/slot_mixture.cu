// Mixtures of slots: values and, in one kernel with them, gradients. See slots.cuh for the mapping.
#include "slots.cuh"

namespace fgbg::cuda {
namespace {

template <class F, class L, bool kGradient>
__global__ void __launch_bounds__(kThreads, kTakesAll<F> ? 1 : 2)
    slot_mixture_kernel(const __grid_constant__ SlotArgs args) {
  using T = typename F::T;
  constexpr int V = F::V;
  const int channels = static_cast<int>(args.shape.size[1]), slots = static_cast<int>(args.slots);
  const int group = args.composition == Composition::mixture_joint ? channels : 1;
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
      const OfSlots<F> nats_of_slots(args, px);
      math::Scale<T> scale[V];
      scales.load(px, 0, 0, false, scale);
      for_channel_count<F, L>(group, [&](auto count) {
        constexpr int kCount = decltype(count)::value;
        constexpr bool kAhead = !kGradient;  // for gradients there are not enough registers
#pragma unroll 1
        for (int c0 = 0; c0 < channels; c0 += group) {
          T base[V], base_of[V], u_of[V], nats_of[V], of[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            base[j] = T(0);
            of[j] = T(-1);
            u_of[j] = math::kNoMask<T>;
            nats_of[j] = math::kNoNats<T>;
          }
          if (logits) largest_mask(args, px, slots, c0, base, base_of);
          {
            SlotChannels<F, kCount, kAhead> channels_of(args, px, c0, group);
#pragma unroll 1
            for (int k = 0; k < slots; ++k) {
              T nats[V] = {};
              channels_of.load(k + 1 == slots);
              if (!scales.alike()) scales.load(px, k, c0, false, scale);
              channels_of.for_channels([&](int c, const T(&x)[V], const T(&target)[V]) {
                if (kTakesAll<F> && c > c0) scales.load(px, k, c, false, scale);
#pragma unroll
                for (int j = 0; j < V; ++j) nats[j] += L::eval(x[j], target[j], scale[j]).value;
              });
#pragma unroll
              for (int j = 0; j < V; ++j) {
                const T u = channels_of.mask[j] - base[j];
                nats[j] = math::selected(nats[j], math::slot_share(channels_of.mask[j]), zeros);
                const bool more = math::relative_term(u, nats[j], u_of[j], nats_of[j]) > T(0);
                u_of[j] = more ? u : u_of[j];
                nats_of[j] = more ? nats[j] : nats_of[j];
                of[j] = more ? T(k) : of[j];
              }
              nats_of_slots.set(k, nats);
            }
          }

          T terms[V] = {}, masks[V] = {}, gains[V] = {};
          for_slots(args.mask, px, slots, c0, [&](int k, const T(&mask)[V]) {
            T nats[V];
            nats_of_slots.get(k, nats);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const T u = mask[j] - base[j], share = math::slot_share(mask[j]);
              const T term =
                  math::slot_term(math::relative_term(u, nats[j], u_of[j], nats_of[j]), share, nats[j]);
              terms[j] += T(k) == of[j] ? T(0) : term;
            }
            if (!logits) return;
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const T p = math::exp_minus_abs(mask[j] - base[j]);
              masks[j] += T(k) == base_of[j] ? T(0) : p;
              if (kGradient) gains[j] += p * math::slot_gain(nats[j], nats_of[j], math::slot_share(mask[j]));
            }
          });

          Elements<F> element;
          element.load(args, px, c0);
          T loss[V], per_term[V];
          [[maybe_unused]] T d_weight[V];
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const T value = math::slot_mixture_loss(nats_of[j], u_of[j], masks[j], terms[j]);
            loss[j] = value;
            per_term[j] = math::responsibility_per_term(terms[j], of[j]);
            if constexpr (kTakesAll<F>) {
              d_weight[j] = math::selected(element.upstream[j] * value, element.share(j), zeros);
              loss[j] = math::selected(element.weight[j] * value, element.share(j), zeros);
              element.upstream[j] =
                  math::selected(element.weight[j] * element.upstream[j], element.share(j), zeros);
            }
            if (live) sums[0] += loss[j];
          }
          store_channel(args.loss, px, c0, loss);
          if constexpr (kTakesAll<F> && kGradient) store_channel(args.grad_weight, px, c0, d_weight);
          if (!kGradient && !args.responsibilities) continue;

          T per_mask[V], per_gain[V];
          if (kGradient && logits) {
#pragma unroll
            for (int j = 0; j < V; ++j) {
              per_mask[j] = T(1) / (T(1) + masks[j]);
              gains[j] *= per_mask[j];
              per_gain[j] = T(1) / (T(1) + gains[j]);
            }
          }
          SlotChannels<F, kGradient ? kCount : 0, false> channels_of(args, px, c0, group);
          Place<F> d_mask_of(args.grad_mask.first, px, c0);
          Place<F> d_x_of(args.grad_x.first, px, c0);
#pragma unroll 1
          for (int k = 0; k < slots; ++k) {
            T nats[V], r[V], share[V];
            [[maybe_unused]] T d_mask[V];
            channels_of.load(k + 1 == slots);
            const T(&mask)[V] = channels_of.mask;
            nats_of_slots.get(k, nats);
#pragma unroll
            for (int j = 0; j < V; ++j) {
              const T u = mask[j] - base[j], present = math::slot_share(mask[j]);
              const T term =
                  math::slot_term(math::relative_term(u, nats[j], u_of[j], nats_of[j]), present, nats[j]);
              r[j] = math::slot_responsibility(term, per_term[j], present);
              share[j] = kTakesAll<F> && element.weight[j] == T(0) ? T(0) : present;
              if constexpr (kGradient) {
                T d = -r[j];
                if (logits)
                  d = math::slot_d_logit(math::exp_minus_abs(u) * per_mask[j], r[j],
                                         math::slot_gain(nats[j], nats_of[j], present), gains[j],
                                         per_gain[j]);
                d_mask[j] = math::chain(element.upstream[j], d, share[j], zeros);
              }
            }
            store_slot(args.responsibilities, px, k, c0, r);
            if constexpr (kGradient) {
              if (args.grad_mask && px.live) d_mask_of.store(args.grad_mask.first, d_mask);
              d_mask_of.step(args.grad_mask.stride);
#pragma unroll
              for (int j = 0; j < V; ++j) r[j] *= element.upstream[j];
              T d_scale = T(0);
              if (!scales.alike()) scales.load(px, k, c0, false, scale);
              Place<F> d_channel = d_x_of;
              d_x_of.step(args.grad_x.stride);
              channels_of.for_channels([&](int c, const T(&x)[V], const T(&target)[V]) {
                if (kTakesAll<F> && c > c0) scales.load(px, k, c, false, scale);
                T d_x[V], d_target[V], d_scales[V];
                if constexpr (kTakesAll<F>)
                  if (others && args.grad_target && k > 0) load_channel(args.grad_target, px, c, d_target);
#pragma unroll
                for (int j = 0; j < V; ++j) {
                  const math::Nll<T> nll = L::eval(x[j], target[j], scale[j]);
                  d_x[j] = math::chain(r[j], nll.d_x, share[j], zeros);
                  if (!kTakesAll<F> || !others) continue;
                  const T d = math::chain(r[j], nll.d_target, share[j], zeros);
                  d_target[j] = k > 0 ? d_target[j] + d : d;
                  d_scales[j] = math::chain(r[j], nll.d_scale, share[j], zeros);
                  d_scale += d_scales[j];
                }
                if (args.grad_x && px.live) d_channel.store(args.grad_x.first, d_x);
                d_channel.next_channel(args.grad_x.first);
                if (!kTakesAll<F> || !others) return;
                store_channel(args.grad_target, px, c, d_target);
                store_slot(args.grad_scale_map, px, k, c, d_scales);
              });
              if (others && args.scale_partial) {
                const bool first = round == 0 && c0 == 0 && (!args.one_scale || k == 0);
                scale_sums.add(item, first, args.one_scale ? 0 : k, live ? d_scale : T(0));
              }
            }
          }
        }
      });
    }
    if (others && args.scale_partial) scale_sums.write(item);
    if (args.partial) write_sums(item, sums, 1, items_of(args), args.partial);
  });
  final_reduction_if_last<T>(args);
}

template <class L, bool kGradient>
struct Mixture {
  template <class F>
  static SlotKernel get() {
    return slot_mixture_kernel<F, L, kGradient>;
  }
};

}  // namespace

template <class L>
void slot_mixture_of(const SlotArgs& args, bool gradients, bool f64, Stream stream) {
  gradients ? launch_slots<Mixture<L, true>>(args, f64, stream)
            : launch_slots<Mixture<L, false>>(args, f64, stream);
}

#define FGBG_ENTRY(L, name) template void slot_mixture_of<math::L>(const SlotArgs&, bool, bool, Stream);
FGBG_FOR_LIKELIHOODS_HERE(FGBG_ENTRY)
#undef FGBG_ENTRY

}  // namespace fgbg::cuda
