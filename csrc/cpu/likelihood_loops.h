// The loops over a block of pixels that evaluate a likelihood: the only code instantiated once per
// likelihood.
#pragma once

#include "../math/composition.h"
#include "sums.h"
#include "views.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
// With internal linkage: otherwise g++ 12 does not vectorise the gradients of a masked Gaussian or Laplace
// loss, which are then four times slower.
namespace {

// Pixels of some channels, `stride` apart.
template <class T>
struct Planes {
  T* data;
  int64_t stride;
};

// The operands and gradients, stored as S, of a block of a masked loss: all channels that share its mask.
template <class T, class S>
struct Regions {
  Planes<const S> fg, bg, target;
  const S* mask;
  bool logits;
  const math::Scale<T>*fg_scale, *bg_scale;  // of each channel
  int64_t channels;
  bool exceeds_cache;  // the images are read from memory
  math::ExcludedOfRegions<T> excluded;
  // for the gradients
  T to_fg, to_bg, to_area;  // upstream gradients of the sums, and of each element of the mask
  Planes<S> d_fg, d_bg;
  S* d_mask;
};

template <class T, class S>
using MaskedLoop = void (*)(const Regions<T, S>& in, int64_t n, LaneSums<T>& fg, LaneSums<T>& bg);

// The storage type, besides T itself, that masked_loop() reads and writes without a staging buffer.
template <class T>
using Half = std::conditional_t<sizeof(T) == 4, math::bf16, T>;

// The scale of the elements of a block: the same for all, or one for each.
template <class T>
struct BlockScale {
  math::Scale<T> all;
  const T *inverse = nullptr, *constant = nullptr;  // null: `all`
};

template <class T>
struct LikelihoodLoops {
  math::Scale<T> (*prepare)(T scale);
  void (*prepare_each)(const T* scale, int64_t n, T* inverse, T* constant);
  // value[k] = -log p(target[k] | x[k])
  void (*value)(const T* x, const T* target, BlockScale<T> s, int64_t n, T* value);
  // The same, and d_x[k] = d(w[k] value[k]) / dx[k], or 0 if an element with that share of the mask is
  // excluded.
  void (*gradient)(const T* x, const T* target, BlockScale<T> s, const T* w, const T* share,
                   math::Excluded<T> excluded, int64_t n, T* value, T* d_x);
  // The derivatives by target, accumulated, and by the scale: apart, since they are rarely needed.
  void (*others)(const T* x, const T* target, BlockScale<T> s, const T* w, const T* share,
                 math::Excluded<T> excluded, int64_t n, T* d_target, T* d_scale);
  // A block of a masked loss, [0] without and [1] with its gradients. Accumulates its sums in fg and bg.
  MaskedLoop<T, T> masked[2];
  MaskedLoop<T, Half<T>> masked_half[2];
};

template <class L, class T>
void prepare_each(const T* scale, int64_t n, T* inverse, T* constant) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    const math::Scale<T> s = L::prepare(scale[k]);
    inverse[k] = s.inverse;
    constant[k] = s.constant;
  }
}

// kEach: whether each element has a scale of its own.
template <bool kEach, class T>
inline math::Scale<T> scale_of(const BlockScale<T>& s, int64_t k) {
  if constexpr (kEach) return {s.inverse[k], s.constant[k]};
  return s.all;
}

template <class L, bool kEach, class T>
void value_loop(const T* x, const T* target, BlockScale<T> s, int64_t n, T* value) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) value[k] = L::eval(x[k], target[k], scale_of<kEach>(s, k)).value;
}

template <class L, bool kEach, class T>
void gradient_loop(const T* x, const T* target, BlockScale<T> s, const T* w, const T* share,
                   math::Excluded<T> excluded, int64_t n, T* value, T* d_x) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    const math::Nll<T> nll = L::eval(x[k], target[k], scale_of<kEach>(s, k));
    value[k] = nll.value;
    d_x[k] = math::chain(w[k], nll.d_x, share[k], excluded);
  }
}

template <class L, bool kEach, class T>
void others_loop(const T* x, const T* target, BlockScale<T> s, const T* w, const T* share,
                 math::Excluded<T> excluded, int64_t n, T* d_target, T* d_scale) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    const math::Nll<T> nll = L::eval(x[k], target[k], scale_of<kEach>(s, k));
    d_target[k] += math::chain(w[k], nll.d_target, share[k], excluded);
    d_scale[k] = math::chain(w[k], nll.d_scale, share[k], excluded);
  }
}

// The loop for the scales that there are.
template <class L, class T>
void value_loop(const T* x, const T* target, BlockScale<T> s, int64_t n, T* value) {
  if constexpr (L::kScaled)
    if (s.inverse) return value_loop<L, true>(x, target, s, n, value);
  value_loop<L, false>(x, target, s, n, value);
}
template <class L, class T>
void gradient_loop(const T* x, const T* target, BlockScale<T> s, const T* w, const T* share,
                   math::Excluded<T> excluded, int64_t n, T* value, T* d_x) {
  if constexpr (L::kScaled)
    if (s.inverse) return gradient_loop<L, true>(x, target, s, w, share, excluded, n, value, d_x);
  gradient_loop<L, false>(x, target, s, w, share, excluded, n, value, d_x);
}
template <class L, class T>
void others_loop(const T* x, const T* target, BlockScale<T> s, const T* w, const T* share,
                 math::Excluded<T> excluded, int64_t n, T* d_target, T* d_scale) {
  if constexpr (L::kScaled)
    if (s.inverse) return others_loop<L, true>(x, target, s, w, share, excluded, n, d_target, d_scale);
  others_loop<L, false>(x, target, s, w, share, excluded, n, d_target, d_scale);
}

// Numbers as T: in place, or converted into a buffer; and where to write numbers of type T that end up as S.
template <class T, class S>
inline const T* as(const S* from, int64_t n, T* buffer) {
  if constexpr (std::is_same_v<S, T>) return from;
  widen_all<T>(from, 1, n, buffer);
  return buffer;
}
template <class T, class S>
inline T* place_for(S* to, T* buffer) {
  if constexpr (std::is_same_v<S, T>) return to;
  return buffer;
}

// Pixels per step of a masked loss. (Half as many in forward would be no faster, and would change the order
// of the sums between calls with and without gradients.)
template <class T>
constexpr int64_t kStep = 2 * LaneSums<T>::kPacks * kLanes<T>;

// A masked loss as one fused loop, unlike the others: with a cheap likelihood, writing and reading buffers
// between stages would dominate. The steps are short, so that loads overlap with the exponentials of the
// mask, and the channels are interleaved.
template <class L, class T, class S, bool kGradient, bool kExcludes>
void masked_loop(const Regions<T, S>& in, int64_t n, LaneSums<T>& sum_fg, LaneSums<T>& sum_bg) {
  Regions<T, S> r = in;                       // a local copy, which no store can alias
  if constexpr (!kExcludes) r.excluded = {};  // a constant, so that nothing is left of the selection
  alignas(64) T on[kStep<T>], off[kStep<T>], difference[kStep<T>];
  // Software prefetch, since there are too many streams for the hardware's. (Not worth it in forward if the
  // images are in a cache; free in backward, which is bound by stores.)
  constexpr int64_t kAhead = (kGradient ? 2 : 4) * kStep<T>;
  alignas(64) T buffer[3][kStep<T>];  // staging, where S is not T
  LaneSums<T> fg = sum_fg, bg = sum_bg;
  const auto step = [&](int64_t i, auto count) __attribute__((always_inline)) {
    const T* mask = as<T>(r.mask + i, count, buffer[0]);
    if (r.logits) {
      FGBG_SIMD
      for (int64_t k = 0; k < count; ++k) {
        const math::Mask<T> m = math::mask_from_logit(mask[k]);
        on[k] = m.on;
        off[k] = m.off;
      }
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < count; ++k) {
        on[k] = mask[k];
        off[k] = T(1) - mask[k];
      }
    }
    if constexpr (kGradient) {
      FGBG_SIMD
      for (int64_t k = 0; k < kStep<T>; ++k) difference[k] = T(0);
    }
    for (int64_t c = 0; c < r.channels; ++c) {
      if (kGradient || r.exceeds_cache) {
        prefetch(r.fg.data + c * r.fg.stride + i + kAhead, count);
        prefetch(r.bg.data + c * r.bg.stride + i + kAhead, count);
        prefetch(r.target.data + c * r.target.stride + i + kAhead, count);
      }
      const S *from_fg = r.fg.data + c * r.fg.stride + i, *from_bg = r.bg.data + c * r.bg.stride + i;
      const S* from_target = r.target.data + c * r.target.stride + i;
      S *to_fg = r.d_fg.data + c * r.d_fg.stride + i, *to_bg = r.d_bg.data + c * r.d_bg.stride + i;
      T *d_fg = place_for<T>(to_fg, buffer[1]), *d_bg = place_for<T>(to_bg, buffer[2]);
      const math::Scale<T> fg_scale = r.fg_scale[c], bg_scale = r.bg_scale[c];
      for_packs<T>(count, [&](int64_t first, auto lanes, int p) __attribute__((always_inline)) {
        // One pack at a time, so that converted operands stay in registers.
        alignas(64) T wide[3][kLanes<T>];
        const T* x_fg = as<T>(from_fg + first, lanes, wide[0]);
        const T* x_bg = as<T>(from_bg + first, lanes, wide[1]);
        const T* target = as<T>(from_target + first, lanes, wide[2]);
        T of_fg[kLanes<T>] = {}, of_bg[kLanes<T>] = {};
        FGBG_SIMD
        for (int64_t l = 0; l < lanes; ++l) {
          const int64_t k = first + l;
          const math::Nll<T> nll_fg = L::eval(x_fg[l], target[l], fg_scale);
          const math::Nll<T> nll_bg = L::eval(x_bg[l], target[l], bg_scale);
          of_fg[l] = math::masked_value(on[k], nll_fg.value, r.excluded.fg);
          of_bg[l] = math::masked_value(off[k], nll_bg.value, r.excluded.bg);
          if constexpr (kGradient) {
            const T weight_fg = math::masked_weight(r.to_fg, on[k]);
            const T weight_bg = math::masked_weight(r.to_bg, off[k]);
            d_fg[k] = math::chain(weight_fg, nll_fg.d_x, on[k], r.excluded.fg);
            d_bg[k] = math::chain(weight_bg, nll_bg.d_x, off[k], r.excluded.bg);
            difference[k] +=
                math::masked_d_mask(on[k], off[k], r.to_fg, r.to_bg, nll_fg.value, nll_bg.value, r.excluded);
          }
        }
        Pack<T> a, b;
        load(a, of_fg);
        load(b, of_bg);
        fg.pack[p] += a;
        bg.pack[p] += b;
      });
      if constexpr (kGradient && !std::is_same_v<S, T>) {
        narrow_all(d_fg, 1, count, to_fg);
        narrow_all(d_bg, 1, count, to_bg);
      }
    }
    if constexpr (kGradient) {
      T* d_mask = place_for<T>(r.d_mask + i, buffer[0]);
      FGBG_SIMD
      for (int64_t k = 0; k < count; ++k) {
        const T d = difference[k] + r.to_area;
        d_mask[k] = r.logits ? math::mask_slope(on[k], off[k]) * d : d;
      }
      if constexpr (!std::is_same_v<S, T>) narrow_all(d_mask, 1, count, r.d_mask + i);
    }
  };
  int64_t i = 0;
  for (; i + kStep<T> <= n; i += kStep<T>) step(i, std::integral_constant<int64_t, kStep<T>>{});
  if (i < n) step(i, n - i);
  sum_fg = fg;
  sum_bg = bg;
}

// The loop for what is excluded, which is nothing for most losses.
template <class L, class T, class S, bool kGradient>
void masked_loop(const Regions<T, S>& in, int64_t n, LaneSums<T>& fg, LaneSums<T>& bg) {
  in.excluded.fg.nothing() && in.excluded.bg.nothing() ? masked_loop<L, T, S, kGradient, false>(in, n, fg, bg)
                                                       : masked_loop<L, T, S, kGradient, true>(in, n, fg, bg);
}

template <class T>
const LikelihoodLoops<T>& likelihood_loops(Likelihood likelihood) {
#define FGBG_ENTRY(L, name)                                               \
  {math::L::prepare<T>,                                                   \
   prepare_each<math::L, T>,                                              \
   value_loop<math::L, T>,                                                \
   gradient_loop<math::L, T>,                                             \
   others_loop<math::L, T>,                                               \
   {masked_loop<math::L, T, T, false>, masked_loop<math::L, T, T, true>}, \
   {masked_loop<math::L, T, Half<T>, false>, masked_loop<math::L, T, Half<T>, true>}},
  static const LikelihoodLoops<T> table[] = {FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)};
#undef FGBG_ENTRY
  return table[static_cast<int>(likelihood)];
}

}  // namespace
}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
