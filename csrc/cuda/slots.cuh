// Mixtures and blends of slots on CUDA.
//
// One kernel for each direction. A team takes a segment of the pixels of one sample, all slots and channels;
// a thread V consecutive pixels at a time. It passes over the slots several times: for the masks, the nats,
// their sums and the gradients. All but the first come from cache, and one number of each slot and pixel is
// kept in shared memory (of many slots, in scratch memory): its nats or, of a blend, its share or the
// gradient of that.
#pragma once

#include "../math/slots.h"
#include "final_reduction.cuh"
#include "kernels.h"
#include "pixels.cuh"
#include "slots.h"
#include "teams.cuh"

namespace fgbg::cuda {
namespace {

// A slot of an operand at these pixels, channel c.
template <class F>
__device__ __forceinline__ int64_t slot_offset(const SlotView& v, const Pixels<F>& px, int64_t k, int c) {
  return offset_of(v.first, px, c) + k * v.stride;
}
template <class F, class T>
__device__ __forceinline__ void load_slot(const SlotView& v, const Pixels<F>& px, int64_t k, int c,
                                          T (&out)[F::V]) {
  Raw<F> raw;
  fetch<F>(v.first, slot_offset(v, px, k, c), raw);
  unpack<F>(v.first, raw, out);
}
template <class F, class T>
__device__ __forceinline__ void store_slot(const SlotView& v, const Pixels<F>& px, int64_t k, int c,
                                           const T (&in)[F::V]) {
  if (v && px.live) store<F>(v.first, slot_offset(v, px, k, c), in);
}

// Calls body(k, x) for every slot of an operand at these pixels, channel c. Several are loaded at a time.
template <class F, class Body>
__device__ __forceinline__ void for_slots(const SlotView& v, const Pixels<F>& px, int slots, int c,
                                          Body body) {
  constexpr int kMost = F::V > 1 ? 4 : 1;
  Place<F> place(v.first, px, c);
#pragma unroll 1
  for (int k0 = 0; k0 < slots; k0 += kMost) {
    Raw<F> raw[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (k0 + i >= slots) break;
      place.fetch(v.first, raw[i]);
      place.step(v.stride);
    }
    loads_first();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (k0 + i >= slots) break;
      typename F::T x[F::V];
      unpack<F>(v.first, raw[i], x);
      body(k0 + i, x);
    }
  }
}

// The same of the slots themselves: body(k, mask, x).
template <class F, class Body>
__device__ __forceinline__ void for_masked_slots(const SlotArgs& args, const Pixels<F>& px, int slots, int c,
                                                 Body body) {
  constexpr int kMost = F::V > 1 ? 4 : 1;
  Place<F> mask_at(args.mask.first, px, c), x_at(args.x.first, px, c);
#pragma unroll 1
  for (int k0 = 0; k0 < slots; k0 += kMost) {
    Raw<F> raw_mask[kMost], raw_x[kMost];
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (k0 + i >= slots) break;
      mask_at.fetch(args.mask.first, raw_mask[i]);
      x_at.fetch(args.x.first, raw_x[i]);
      mask_at.step(args.mask.stride);
      x_at.step(args.x.stride);
    }
    loads_first();
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (k0 + i >= slots) break;
      typename F::T mask[F::V], x[F::V];
      unpack<F>(args.mask.first, raw_mask[i], mask);
      unpack<F>(args.x.first, raw_x[i], x);
      body(k0 + i, mask, x);
    }
  }
}

// The largest logit at these pixels, and its slot.
template <class F, class T>
__device__ __forceinline__ void largest_mask(const SlotArgs& args, const Pixels<F>& px, int slots, int c,
                                             T (&largest)[F::V], T (&of)[F::V]) {
#pragma unroll
  for (int j = 0; j < F::V; ++j) {
    largest[j] = math::kNoMask<T>;
    of[j] = T(-1);
  }
  for_slots(args.mask, px, slots, c, [&](int k, const T(&mask)[F::V]) {
#pragma unroll
    for (int j = 0; j < F::V; ++j) {
      const bool more = mask[j] > largest[j];
      largest[j] = more ? mask[j] : largest[j];
      of[j] = more ? T(k) : of[j];
    }
  });
}

// Whether a kernel takes weights and maps of scales, has the gradients of target and scales, and takes an
// upstream gradient for each element. Those for operands of one type have none of it.
template <class F>
constexpr bool kTakesAll = F::kMaps;

// The channels of one slot after the other, of a mixture, and those of the target. kCount: how many there
// are, if that is known when this is compiled: a slot is then loaded at once, with its mask; else 0. kAhead:
// whether the next one is loaded while one is computed with, and the target, if wanted, stays in registers.
template <class F, int kCount, bool kAhead, bool kTarget = true>
class SlotChannels {
  using T = typename F::T;
  static constexpr int V = F::V, kMost = kCount > 0 ? kCount : 1;

 public:
  T mask[V];  // of the slot

  __device__ SlotChannels(const SlotArgs& args, const Pixels<F>& px, int c0, int count)
      : args_(args),
        px_(px),
        c0_(c0),
        count_(count),
        x_(args.x.first, px, c0),
        mask_(args.mask.first, px, c0) {
    if constexpr (kCount > 0 && kAhead) {
      if (kTarget) fetch_target();
      fetch();
    }
  }

  // The next slot, in order. last: whether none comes after it.
  __device__ void load(bool last) {
    if constexpr (kCount == 0) mask_.fetch(args_.mask.first, raw_mask_);
    if constexpr (kCount > 0 && !kAhead) fetch();
    unpack<F>(args_.mask.first, raw_mask_, mask);
    mask_.step(args_.mask.stride);
    if constexpr (kCount > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) unpack<F>(args_.x.first, raw_x_[i], x[i]);
      x_.step(args_.x.stride);
      if (kAhead && !last) fetch();
    }
  }
  // Calls body(c, x, target) for the channels of the slot, without a target body(c, x).
  template <class Body>
  __device__ void for_channels(Body body) {
    [[maybe_unused]] T target[V];
    if constexpr (!kTarget) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) body(i, x[i]);
    } else if constexpr (kCount > 0 && kAhead) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        unpack<F>(args_.target, raw_target_[i], target);
        body(c0_ + i, x[i], target);
      }
    } else if constexpr (kCount > 0) {
      Place<F> target_at(args_.target, px_, c0_);  // from cache
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        target_at.fetch(args_.target, raw_target_[0]);
        loads_first();
        target_at.next_channel(args_.target);
        unpack<F>(args_.target, raw_target_[0], target);
        body(c0_ + i, x[i], target);
      }
    } else {
      Place<F> at = x_, target_at(args_.target, px_, c0_);
#pragma unroll 1
      for (int i = 0; i < count_; ++i) {
        at.fetch(args_.x.first, raw_x_[0]);
        target_at.fetch(args_.target, raw_target_[0]);
        loads_first();
        at.next_channel(args_.x.first);
        target_at.next_channel(args_.target);
        unpack<F>(args_.x.first, raw_x_[0], x[0]);
        unpack<F>(args_.target, raw_target_[0], target);
        body(c0_ + i, x[0], target);
      }
      x_.step(args_.x.stride);
    }
  }

 private:
  __device__ void fetch() {
    Place<F> at = x_;
    mask_.fetch(args_.mask.first, raw_mask_);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      at.fetch(args_.x.first, raw_x_[i]);
      at.next_channel(args_.x.first);
    }
    loads_first();
  }
  __device__ void fetch_target() {
    Place<F> target(args_.target, px_, c0_);
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      target.fetch(args_.target, raw_target_[i]);
      target.next_channel(args_.target);
    }
  }

  const SlotArgs& args_;
  const Pixels<F>& px_;
  const int c0_, count_;
  Place<F> x_, mask_;
  Raw<F> raw_x_[kMost], raw_target_[kMost], raw_mask_;
  T x[kMost][V];
};

// Whether a slot of a blend is loaded ahead, for which there are registers if fewer warps will do.
template <class F, bool kGradient>
constexpr bool kAheadOfSlots = kGradient || !std::is_same_v<F, BFloat16Four>;

// How many channels kernels have a path of their own for, besides that for any number: those of colour
// images, or 0. (Three times the formulas of Poisson would not fit into the registers.)
template <class F, class L>
constexpr int kColours = kTakesAll<F> || std::is_same_v<L, math::Poisson> ? 0 : 3;

// Calls body(std::integral_constant<int, n>{}) for that number of channels, or else for 0.
template <class F, class L, class Body>
__device__ __forceinline__ void for_channel_count(int channels, Body body) {
  if (kColours<F, L> > 0 && channels == kColours<F, L>)
    body(std::integral_constant<int, kColours<F, L>>{});
  else
    body(std::integral_constant<int, 0>{});
}

// The number of each slot at the pixels of a thread.
template <class F>
class OfSlots {
  using T = typename F::T;

 public:
  __device__ OfSlots(const SlotArgs& args, const Pixels<F>& px)
      : live_(px.live),
        scratch_(static_cast<T*>(args.scratch)),
        stride_(args.shape.size[0] * args.shape.plane) {
    if (scratch_) scratch_ += px.b * args.shape.plane + px.p;
  }
  __device__ void get(int64_t k, T (&x)[F::V]) const {
    if (scratch_)
      copy(scratch_ + k * stride_, x);
    else
      copy(in_shared(k), x);
  }
  // Threads that are not live share their pixels in scratch memory with one that is.
  __device__ void set(int64_t k, const T (&x)[F::V]) const {
    if (!scratch_)
      copy(x, in_shared(k));
    else if (live_)
      copy(x, scratch_ + k * stride_);
  }

 private:
  // (Not a pointer to either: accesses of shared memory are another instruction.)
  static __device__ T* in_shared(int64_t k) {
    extern __shared__ double shared[];
    return reinterpret_cast<T*>(shared) + (static_cast<int>(k) * kThreads + thread_of_block()) * F::V;
  }
  static __device__ void copy(const T* from, T* to) {
#pragma unroll
    for (int j = 0; j < F::V; ++j) to[j] = from[j];
  }

  const bool live_;
  T* scratch_;
  int64_t stride_;
};

// The scale of each slot (of a blend, each channel), prepared once by a block, or that of each element.
template <class F, class L>
class SlotScales {
  using T = typename F::T;
  static constexpr int kTable = 64, V = F::V;

 public:
  __device__ explicit SlotScales(const SlotArgs& args) : args_(args), alike_(args.scale.stride == 0) {
    if constexpr (L::kScaled) {
      const int count =
          static_cast<int>(args.composition == Composition::blended ? args.shape.size[1] : args.slots);
      for (int k = static_cast<int>(threadIdx.x); k < count && k < kTable; k += kThreads) {
        const math::Scale<T> s = L::prepare(scale_at<T>(args.scale, k));
        table()[2 * k] = s.inverse;
        table()[2 * k + 1] = s.constant;
      }
      __syncthreads();
    }
  }
  // Whether those of all slots (of a blend, channels) are the same.
  __device__ bool alike() const { return alike_ && !(kTakesAll<F> && args_.scale_map); }
  // Of slot k and channel c; which of the two has the scale, where there is no map.
  __device__ void load(const Pixels<F>& px, int64_t k, int c, bool by_channel, math::Scale<T> (&s)[V]) const {
    if constexpr (kTakesAll<F> && L::kScaled) {
      if (args_.scale_map) {
        T scale[V];
        load_slot(args_.scale_map, px, k, c, scale);
#pragma unroll
        for (int j = 0; j < V; ++j) s[j] = L::prepare(scale[j]);
        return;
      }
    }
    const math::Scale<T> all = of(by_channel ? c : k);
#pragma unroll
    for (int j = 0; j < V; ++j) s[j] = all;
  }

 private:
  __device__ static T* table() {
    __shared__ T of_table[2 * kTable];
    return of_table;
  }
  __device__ math::Scale<T> of(int64_t k) const {
    if constexpr (!L::kScaled) return L::prepare(T(1));
    return k < kTable ? math::Scale<T>{table()[2 * k], table()[2 * k + 1]}
                      : L::prepare(scale_at<T>(args_.scale, k));
  }

  const SlotArgs& args_;
  const bool alike_;
};

__device__ __forceinline__ int64_t items_of(const SlotArgs& args) {
  return args.shape.size[0] * segments_of(args.shape.plane, args.segment);
}

// How many scales get a gradient that is summed.
FGBG_FN int64_t scales_of(const SlotArgs& args) {
  if (args.one_scale) return 1;
  return args.composition == Composition::blended ? args.shape.size[1] : args.slots;
}

// The gradients of the scales, summed over an item: a place for each scale and each warp, in shared memory;
// or, of so many that there is no room, the partial sums themselves, which only this warp then writes.
class SlotScaleSums {
 public:
  __device__ explicit SlotScaleSums(const SlotArgs& args) : args_(args), scales_(scales_of(args)) {
    extern __shared__ double shared[];
    places_ = shared + args.scratch_shared / sizeof(double);
  }

  // Every lane of the warp has to call it.
  template <class T>
  __device__ void add(const Item& item, bool first, int64_t k, T x) const {
    const double total = static_cast<double>(warp_sum(x));
    if (thread_of_block() % kWarp != 0) return;
    double* to = args_.scale_slots ? places_ + k * kWarps + thread_of_block() / kWarp
                                   : args_.scale_partial + k * items_of(args_) + item.number;
    *to = first ? total : *to + total;
  }

  // After the last round of an item. Every thread of the team has to call it.
  __device__ void write(const Item& item) const {
    if (!args_.scale_slots) return;
    synchronize(item);
    const int first_warp = thread_of_block() / item.team * (item.team / kWarp);
    for (int64_t k = item.lane; k < scales_; k += item.team) {
      double total = 0.0;
      for (int w = 0; w < item.team / kWarp; ++w) total += places_[k * kWarps + first_warp + w];
      args_.scale_partial[k * items_of(args_) + item.number] = total;
    }
    synchronize(item);
  }

 private:
  static __device__ void synchronize(const Item& item) {
    if (item.team == kWarp)
      __syncwarp();
    else
      __syncthreads();
  }

  const SlotArgs& args_;
  const int64_t scales_;
  double* places_;
};

// What is known of the elements of a channel but for the slots: the weight, and the upstream gradient.
template <class F>
struct Elements {
  using T = typename F::T;
  static constexpr int V = F::V;
  T weight[V], upstream[V];

  __device__ void load(const SlotArgs& args, const Pixels<F>& px, int c) {
    const T all = args.grad_loss ? fgbg::upstream<T>(args.grad_loss, px.b) : T(1);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      weight[j] = T(1);
      upstream[j] = all;
    }
    if constexpr (kTakesAll<F>) {
      if (args.grad_loss_elements) load_channel(args.grad_loss_elements, px, c, upstream);
      if (args.weight) {
        Raw<F> raw;
        fetch_mask<F>(args.weight, offset_of(args.weight, px, c), raw);
        unpack_mask<F>(args.weight, raw, weight);
      }
    }
  }
  // The share of an element in the loss, as selected() takes it.
  __device__ T share(int j) const { return math::abs(weight[j]); }
};

using SlotKernel = void (*)(SlotArgs);

// The format, and whether the kernel is one that takes all.
inline std::pair<FormatOf, bool> format_of(const SlotArgs& a, bool f64) {
  const auto run = [&](const View& v) { return v.plane_stride == 1 ? a.shape.plane : 1; };
  FormatOf format = choose_format(f64, a.shape.plane,
                                  {a.x.first, a.mask.first, a.target, a.weight, a.scale_map.first, a.loss,
                                   a.responsibilities.first, a.grad_loss_elements, a.grad_x.first,
                                   a.grad_mask.first, a.grad_target, a.grad_weight, a.grad_scale_map.first},
                                  run);
  if (width_of(format) > 1 && !fits_pixels(a.shape)) format = FormatOf::general;
  const bool half = width_of(format) == kVectorHalf;
  const bool all = a.weight || a.scale_map || a.grad_target || a.scale_partial || a.grad_loss_elements ||
                   (format != FormatOf::float32 && !half);
  if (all && half) format = FormatOf::mixed;
  return {format, all};
}

template <class Kernels>
SlotKernel slot_kernel(const SlotArgs& args, bool f64) {
  const auto [format, all] = format_of(args, f64);
  if (all) return kernel_with_maps_for<Kernels>(format);
  if (format == FormatOf::bfloat16) return Kernels::template get<BFloat16Four>();
  if (format == FormatOf::float16) return Kernels::template get<Float16Four>();
  return Kernels::template get<Float32>();
}

template <class Kernels>
void launch_slots(SlotArgs args, bool f64, Stream stream) {
  const Cut cut = cut_of(args.shape, args.shape.plane);
  args.segment = cut.segment;
  args.team = cut.team;
  const int64_t scales = scales_of(args) * kWarps * static_cast<int64_t>(sizeof(double));
  // Beside the terms of the slots, which may take all of kMaxScratch, and what a kernel has of its own.
  const bool room = scales <= kMaxScratch / 8;
  // Whether gradients of scales are wanted or not, so that a loss has the same bits.
  if (!room) args.team = kWarp;
  args.scale_slots = args.scale_partial && room;
  args.scratch_shared = args.scratch ? 0 : args.slots * kThreads * kScratch;
  const int64_t shared = args.scratch_shared + (args.scale_slots ? scales : 0);
  launch(slot_kernel<Kernels>(args, f64), args.shape.size[0] * segments_of(args.shape.plane, args.segment),
         args.team, args, args.blocks_done, static_cast<size_t>(shared), stream);
}

// The likelihoods that a file is compiled for: the build compiles it once for each, all at the same time.
#ifdef FGBG_LIKELIHOOD
#define FGBG_FOR_LIKELIHOODS_HERE(_) _(FGBG_LIKELIHOOD, "")
#else
#define FGBG_FOR_LIKELIHOODS_HERE(_) FGBG_FOR_EACH_LIKELIHOOD(_)
#endif

}  // namespace
}  // namespace fgbg::cuda
