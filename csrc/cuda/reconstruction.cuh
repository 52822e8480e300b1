// Reconstruction losses of one or two layers on CUDA.
//
// One pass over memory: forward reads fg, bg and target once and the mask once (per channel, if it has
// channels); backward reads the same and writes the gradients and, if partial sums are wanted, the sums
// of the loss. (A mixture reads the images twice in backward: the responsibilities need all channels
// first. The second read of a group's pixels comes from cache.)
// A team takes a segment of the pixels of one sample, all channels; a thread V consecutive pixels at a
// time, so that the mask, its sigmoid and its gradient stay in registers across channels.
#pragma once

#include "../math/composition.h"
#include "final_reduction.cuh"
#include "kernels.h"
#include "pixels.cuh"
#include "teams.cuh"

namespace fgbg::cuda {
namespace {

// The scales of both layers.
template <class T>
struct BothScales {
  math::Scale<T> fg, bg;
};

// The scales of each channel, prepared once by a block rather than for each group of pixels.
template <class T, class L>
class Scales {
 public:
  __device__ explicit Scales(const ReconstructionArgs& args)
      : args_(args), alike_(args.fg_scale.stride == 0 && args.bg_scale.stride == 0) {
    if constexpr (L::kScaled) {
      for (int c = static_cast<int>(threadIdx.x); c < static_cast<int>(args.shape.size[1]) && c < kTable;
           c += kThreads) {
        const BothScales<T> s = prepared(c);
        T* to = table() + 4 * c;
        to[0] = s.fg.inverse;
        to[1] = s.fg.constant;
        to[2] = s.bg.inverse;
        to[3] = s.bg.constant;
      }
      __syncthreads();
    }
  }
  // Whether those of all channels are the same.
  __device__ bool alike() const { return alike_; }
  __device__ BothScales<T> of(int c) const {
    if constexpr (!L::kScaled) return {L::prepare(T(1)), L::prepare(T(1))};
    if (c >= kTable) return prepared(c);
    const T* from = table() + 4 * c;
    return {{from[0], from[1]}, {from[2], from[3]}};
  }

 private:
  static constexpr int kTable = 64;
  __device__ static T* table() {
    __shared__ T of_table[4 * kTable];
    return of_table;
  }
  __device__ BothScales<T> prepared(int c) const {
    return {L::prepare(scale_at<T>(args_.fg_scale, c)), L::prepare(scale_at<T>(args_.bg_scale, c))};
  }

  const ReconstructionArgs& args_;
  const bool alike_;
};

// Whether a kernel takes masks of bytes, has the gradients of target and scales, and takes an upstream
// gradient for each element. There are not enough registers for that where a thread has eight elements. (The
// loss of an element, and its gradient, are no half precision numbers anyway.)
template <class F>
constexpr bool kHasAll = F::V < kVectorHalf;

// What a mask of zeros and ones leaves out; and a weight, for kernels that take one.
template <class F>
__device__ __forceinline__ math::Excluded<typename F::T> excluded_by_mask(const ReconstructionArgs& args) {
  return math::Excluded<typename F::T>::zeros_if(kHasAll<F> && hard_mask(args));
}
template <class F>
__device__ __forceinline__ math::Excluded<typename F::T> excluded_by_zeros(const ReconstructionArgs& args) {
  return math::Excluded<typename F::T>::zeros_if(kHasAll<F> &&
                                                 (hard_mask(args) || (F::kMaps && args.weight)));
}

// Whether the next channel is loaded while one is computed with, for which there are registers in backward: a
// forward pass has more warps instead.
template <class F>
constexpr bool kAheadInBackward = std::is_same_v<F, Float32>;

// So many channels of a mixture, which needs all of them first, are loaded at a time, as far as there are
// registers.
template <class F>
constexpr int kTogether = std::is_same_v<F, Float32> ? 3 : 1;

// Two shares of the mask in an element: what multiplies, and what says whether it is left out.
template <class T>
struct Shares {
  T on, off, select_on, select_off;
};

// The operands of a thread's groups of pixels, one channel after the other. The mask is kept from the channel
// before if they share it. kLayers: whether there are two layers and a mask.
template <class F, class L, bool kAhead, bool kLayers>
class Operands {
  using T = typename F::T;
  static constexpr int V = F::V;

 public:
  T fg[V], bg[V], target[V], mask[V];

  __device__ Operands(const ReconstructionArgs& args, const Scales<T, L>& scales)
      : args_(args), scales_(scales) {
    set_scales(scales.of(0));
  }

  // Begins with these pixels, in channel c.
  __device__ void begin(const Pixels<F>& px, int c = 0) {
    fg_.start(args_.fg, px, c);
    target_.start(args_.target, px, c);
    if constexpr (kLayers) {
      bg_.start(args_.bg, px, c);
      mask_.start(args_.mask, px, c);
    }
    if (kAhead) fetch(true);
  }

  // Channel c, in order.
  __device__ void load(int c, bool new_mask) {
    if (!kAhead) fetch(new_mask);
    unpack<F>(args_.fg, raw_fg_, fg);
    if constexpr (kLayers) unpack<F>(args_.bg, raw_bg_, bg);
    unpack<F>(args_.target, raw_target_, target);
    if (kLayers && new_mask) unpack_mask<F>(args_.mask, raw_mask_, mask);
    if (L::kScaled && !scales_.alike()) set_scales(scales_.of(c));
    if (c + 1 == static_cast<int>(args_.shape.size[1])) return;
    fg_.next_channel(args_.fg);
    target_.next_channel(args_.target);
    if constexpr (kLayers) {
      bg_.next_channel(args_.bg);
      if (args_.mask_per_channel) mask_.next_channel(args_.mask);
    }
    if (kAhead) fetch(args_.mask_per_channel);
  }
  // Calls body() when channel c is loaded, and so on for all that are loaded with it and come before `end`.
  template <class Body>
  __device__ void load_together(int c, int end, bool new_mask, const Pixels<F>& px, Body body) {
    constexpr int kMost = kTogether<F>;
    if constexpr (kMost == 1) {
      load(c, new_mask);
      load_maps(c, px);
      body();
    } else {
      Raw<F> raw_fg[kMost], raw_bg[kMost], raw_target[kMost];
      if (new_mask) mask_.fetch_mask(args_.mask, raw_mask_);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (c + i >= end) break;
        fg_.fetch(args_.fg, raw_fg[i]);
        bg_.fetch(args_.bg, raw_bg[i]);
        target_.fetch(args_.target, raw_target[i]);
        fg_.next_channel(args_.fg);
        bg_.next_channel(args_.bg);
        target_.next_channel(args_.target);
      }
      loads_first();
      if (new_mask) unpack_mask<F>(args_.mask, raw_mask_, mask);
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        if (c + i >= end) break;
        unpack<F>(args_.fg, raw_fg[i], fg);
        unpack<F>(args_.bg, raw_bg[i], bg);
        unpack<F>(args_.target, raw_target[i], target);
        if (L::kScaled && !scales_.alike()) set_scales(scales_.of(c + i));
        body();
      }
    }
  }
  // The weights and the scales of each element of channel c, after load().
  __device__ void load_maps(int c, const Pixels<F>& px) {
    if constexpr (F::kMaps) {
      load_scales(args_.fg_scale_map, c, px, fg_scale_);
      load_scales(args_.bg_scale_map, c, px, bg_scale_);
#pragma unroll
      for (int j = 0; j < V; ++j) weight_[j] = T(1);
      if (args_.weight) load_channel(args_.weight, px, c, weight_);
    }
  }
  __device__ math::Scale<T> fg_scale(int j) const { return fg_scale_[j % kScales]; }
  __device__ math::Scale<T> bg_scale(int j) const { return bg_scale_[j % kScales]; }

  // x times the weight of element j, 0 where it is left out.
  __device__ T weighted(T x, int j) const {
    if constexpr (F::kMaps)
      if (args_.weight) return math::chain(weight_[j], x, magnitude(j), math::Excluded<T>::zeros_if(true));
    return x;
  }
  // x, or 0 where the weight leaves it out.
  __device__ T unless_left_out(T x, int j) const {
    if constexpr (F::kMaps)
      if (args_.weight) return math::selected(x, magnitude(j), math::Excluded<T>::zeros_if(true));
    return x;
  }
  __device__ T magnitude(int j) const {
    if constexpr (F::kMaps) return math::abs(weight_[j]);
    return T(1);
  }
  __device__ Shares<T> shares(const math::Mask<T>& m, int j) const {
    if constexpr (F::kMaps) {
      if (args_.weight) {
        const bool hard = hard_mask(args_);
        return {m.on * weight_[j], m.off * weight_[j], math::selecting_share(m.on, weight_[j], hard),
                math::selecting_share(m.off, weight_[j], hard)};
      }
    }
    return {m.on, m.off, m.on, m.off};
  }
  __device__ void make_mask(math::Mask<T> (&m)[V]) const {
    if (args_.mask_kind == MaskKind::logits) {
#pragma unroll
      for (int j = 0; j < V; ++j) m[j] = math::mask_from_logit(mask[j]);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) m[j] = math::Mask<T>{mask[j], T(1) - mask[j], T(1)};
    }
  }

 private:
  // All loads are under way before the first is waited for. That of the mask is in a branch, which nvcc would
  // join with the one that unpacks it, behind the others' wait, if nothing held it here.
  __device__ void fetch(bool with_mask) {
    if (kLayers && with_mask) mask_.fetch_mask(args_.mask, raw_mask_);
    loads_first();
    fg_.fetch(args_.fg, raw_fg_);
    if constexpr (kLayers) bg_.fetch(args_.bg, raw_bg_);
    target_.fetch(args_.target, raw_target_);
  }
  __device__ void set_scales(const BothScales<T>& s) {
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      fg_scale_[j] = s.fg;
      bg_scale_[j] = s.bg;
    }
  }

  __device__ static void load_scales(const View& map, int c, const Pixels<F>& px,
                                     math::Scale<T> (&to)[F::kMaps ? V : 1]) {
    if constexpr (F::kMaps) {
      if (!map) return;
      T values[V];
      load_channel(map, px, c, values);
#pragma unroll
      for (int j = 0; j < V; ++j) to[j] = L::prepare(values[j]);
    }
  }

  // One for the channel, or one for each element.
  static constexpr int kScales = F::kMaps ? V : 1;
  math::Scale<T> fg_scale_[kScales], bg_scale_[kScales];
  T weight_[kScales];

  const ReconstructionArgs& args_;
  const Scales<T, L>& scales_;
  Place<F, !F::kMixed> fg_, bg_, target_;
  Place<F, !F::kMixed && F::V == kVectorHalf> mask_;  // four at a time it may be of bytes
  Raw<F> raw_fg_, raw_bg_, raw_target_, raw_mask_;
};

__device__ __forceinline__ int64_t items_of(const ReconstructionArgs& args) {
  return args.shape.size[0] * segments_of(args.shape.plane, args.segment);
}

// Every thread of the team has to call it.
template <class T>
__device__ __forceinline__ void write_terms(const ReconstructionArgs& args, const Item& item,
                                            T (&sums)[kTerms]) {
  if (args.mask_per_channel || args.weight) {  // an element is a part of a pixel
    sums[2] /= static_cast<T>(args.shape.size[1]);
    sums[3] /= static_cast<T>(args.shape.size[1]);
  }
  write_sums(item, sums, args.final_reductions[0].terms, items_of(args), args.partial);
}

using Kernel = void (*)(ReconstructionArgs);

FormatOf format_of(const ReconstructionArgs& a, bool f64) {
  const FormatOf format =
      choose_format(f64, a.shape.plane,
                    {a.fg, a.bg, a.target, a.mask, a.weight, a.fg_scale_map, a.bg_scale_map, a.loss,
                     a.grad_loss_elements, a.grad_fg, a.grad_bg, a.grad_target, a.grad_mask, a.grad_weight,
                     a.grad_fg_scale_map, a.grad_bg_scale_map},
                    [&](const View& v) { return v.plane_stride == 1 ? a.shape.plane : 1; });
  if (width_of(format) > 1 && !fits_pixels(a.shape)) return FormatOf::general;
  const bool of_all = a.grad_target || a.scale_partial || hard_mask(a);
  return of_all && width_of(format) == kVectorHalf ? FormatOf::mixed : format;
}

template <template <class, Composition> class Kernels, class L>
Kernel kernel_of(Composition kind, FormatOf format, bool maps) {
  const auto of_kind = [&](auto kernels) {
    using Of = decltype(kernels);
    return maps ? kernel_with_maps_for<Of>(format) : kernel_for<Of>(format);
  };
  if (kind == Composition::masked) return of_kind(Kernels<L, Composition::masked>{});
  if (kind == Composition::blended) return of_kind(Kernels<L, Composition::blended>{});
  if (kind == Composition::plain) return of_kind(Kernels<L, Composition::plain>{});
  // One kernel handles joint and independent channels, which differ at run time.
  return of_kind(Kernels<L, Composition::mixture_joint>{});
}

// Kernels<L, kind>::get<F>() is the forward or the backward kernel.
template <template <class, Composition> class Kernels, class L>
void launch_reconstruction(ReconstructionArgs args, bool f64, Stream stream) {
  constexpr int64_t kMaxShared = 32 << 10;
  const bool maps = args.weight || args.fg_scale_map || args.bg_scale_map;
  const Kernel kernel = kernel_of<Kernels, L>(args.composition, format_of(args, f64), maps);
  const Cut cut = cut_of(args.shape, args.shape.plane);
  args.segment = cut.segment;
  args.team = cut.team;
  args.one_image = !args.bg && args.composition != Composition::plain;
  if (args.one_image) args.bg = args.fg;
  // With so many channels that there is no room for the gradients of scales, a warp keeps them where they end
  // up. (Whether they are wanted or not, so that a loss has the same bits.)
  int64_t shared = 2 * args.shape.size[1] * kWarps * static_cast<int64_t>(sizeof(double));
  args.scale_slots = args.scale_partial && shared <= kMaxShared;
  if (shared > kMaxShared) args.team = kWarp;
  if (!args.scale_slots) shared = 0;
  launch(kernel, args.shape.size[0] * pixel_segments(args.shape), args.team, args, args.blocks_done,
         static_cast<size_t>(shared), stream);
}

// The likelihoods that a file is compiled for: the build compiles it once for each, all at the same time.
#ifdef FGBG_LIKELIHOOD
#define FGBG_FOR_LIKELIHOODS_HERE(_) _(FGBG_LIKELIHOOD, "")
#else
#define FGBG_FOR_LIKELIHOODS_HERE(_) FGBG_FOR_EACH_LIKELIHOOD(_)
#endif

}  // namespace
}  // namespace fgbg::cuda
