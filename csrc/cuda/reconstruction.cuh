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

// The scales of each channel, prepared once by a block rather than for each group of pixels.
template <class T, class L>
class Scales {
 public:
  __device__ explicit Scales(const ReconstructionArgs& args) : args_(args) {
    if constexpr (L::kScaled) {
      for (int c = static_cast<int>(threadIdx.x); c < static_cast<int>(args.shape.size[1]) && c < kTable;
           c += kThreads) {
        const math::Scale<T> fg = prepared(args.fg_scale, c), bg = prepared(args.bg_scale, c);
        T* to = table() + 4 * c;
        to[0] = fg.inverse;
        to[1] = fg.constant;
        to[2] = bg.inverse;
        to[3] = bg.constant;
      }
      __syncthreads();
    }
  }
  __device__ math::Scale<T> fg(int c) const { return of(c, 0, args_.fg_scale); }
  __device__ math::Scale<T> bg(int c) const { return of(c, 2, args_.bg_scale); }

 private:
  static constexpr int kTable = 64;
  __device__ static T* table() {
    __shared__ T of_table[4 * kTable];
    return of_table;
  }
  __device__ static math::Scale<T> prepared(const ScaleView& s, int c) {
    return L::prepare(scale_at<T>(s, c));
  }
  __device__ math::Scale<T> of(int c, int which, const ScaleView& s) const {
    if constexpr (!L::kScaled) return L::prepare(T(1));
    return c < kTable ? math::Scale<T>{table()[4 * c + which], table()[4 * c + which + 1]} : prepared(s, c);
  }

  const ReconstructionArgs& args_;
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

// What is loaded while a channel is computed with, as far as there are registers for it: the next channel of
// the group, or the next group's first as well.
enum class Ahead { nothing, channel, group };
template <class F>
constexpr Ahead kAheadInForward = F::V == kVectorHalf ? Ahead::group : Ahead::nothing;
template <class F>
constexpr Ahead kAheadInBackward = std::is_same_v<F, Float32> ? Ahead::channel : Ahead::nothing;

// Two shares of the mask in an element: what multiplies, and what says whether it is left out.
template <class T>
struct Shares {
  T on, off, select_on, select_off;
};

// The operands of a thread's groups of pixels, one channel after the other. The mask is kept from the channel
// before if they share it. kLayers: whether there are two layers and a mask.
template <class F, class L, Ahead kAhead, bool kLayers>
class Operands {
  using T = typename F::T;
  static constexpr int V = F::V;

 public:
  T fg[V], bg[V], target[V], mask[V];

  __device__ Operands(const ReconstructionArgs& args, const Scales<T, L>& scales)
      : args_(args), scales_(scales) {}

  // Begins with these pixels, in channel c. All but the first group of an item have begun already where a
  // group is loaded ahead.
  __device__ void begin(const Pixels<F>& px, bool first, int c = 0) {
    if (kAhead != Ahead::group || first) start(px, c);
  }

  // Channel c, in order. After the last come the pixels `next`, if they are live.
  __device__ void load(int c, bool new_mask, const Pixels<F>& next) {
    if (kAhead == Ahead::nothing) fetch(new_mask);
    unpack<F>(args_.fg, raw_fg_, fg);
    if constexpr (kLayers) unpack<F>(args_.bg, raw_bg_, bg);
    unpack<F>(args_.target, raw_target_, target);
    if (kLayers && new_mask) unpack_mask<F>(args_.mask, raw_mask_, mask);
#pragma unroll
    for (int j = 0; j < kScales; ++j) {
      fg_scale_[j] = scales_.fg(c);
      bg_scale_[j] = scales_.bg(c);
    }
    if (c + 1 < static_cast<int>(args_.shape.size[1])) {
      fg_ += args_.fg.stride[1];
      target_ += args_.target.stride[1];
      if constexpr (kLayers) {
        bg_ += args_.bg.stride[1];
        mask_ += args_.mask.stride[1];
      }
      if (kAhead != Ahead::nothing) fetch(args_.mask_per_channel);
    } else if (kAhead == Ahead::group && next.live) {
      start(next, 0);
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
#pragma unroll
    for (int j = 0; j < V; ++j)
      m[j] = args_.mask_kind == MaskKind::logits ? math::mask_from_logit(mask[j])
                                                 : math::Mask<T>{mask[j], T(1) - mask[j], T(1)};
  }

 private:
  __device__ void start(const Pixels<F>& px, int c) {
    fg_ = offset_of(args_.fg, px, c);
    target_ = offset_of(args_.target, px, c);
    if constexpr (kLayers) {
      bg_ = offset_of(args_.bg, px, c);
      mask_ = offset_of(args_.mask, px, c);
    }
    if (kAhead != Ahead::nothing) fetch(true);
  }
  // All loads are under way before the first is waited for. That of the mask is in a branch, which nvcc would
  // join with the one that unpacks it, behind the others' wait, if nothing held it here.
  __device__ void fetch(bool with_mask) {
    if (kLayers && with_mask) fetch_mask<F>(args_.mask, mask_, raw_mask_);
#if defined(__CUDA_ARCH__)
    asm volatile("" ::: "memory");
#endif
    cuda::fetch<F>(args_.fg, fg_, raw_fg_);
    if constexpr (kLayers) cuda::fetch<F>(args_.bg, bg_, raw_bg_);
    cuda::fetch<F>(args_.target, target_, raw_target_);
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
  int64_t fg_, bg_, target_, mask_;
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
