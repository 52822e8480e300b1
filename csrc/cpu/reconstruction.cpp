// Masked, blended and mixture reconstruction losses on the CPU.
//
// A task is a segment of the pixels of one sample, all channels. Within it a block of pixels goes
// through three kinds of stage, each a loop over a buffer in the first-level cache: the mask, the
// likelihood (once per region and channel), and what combines them. Stages rather than one fused loop:
// the likelihood loops are then the only code that is multiplied by the list of likelihoods. Masked losses
// are the exception, see masked_loop(). What the channels of a pixel share is done once per pixel.
#include <algorithm>
#include <vector>

#include "../regions.h"
#include "kernel_table.h"
#include "likelihood_loops.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

template <class T>
using Buffer = T[kBlock<T>];

// Pixels after which what the lanes have collected in float32 is added to a sum in float64.
template <class T>
constexpr int64_t kFlush = 2 * kBlock<T>;

// Images of more bytes than this come from memory.
constexpr int64_t kCache = 32 << 20;

template <class T>
class Pass {
 public:
  explicit Pass(const ReconstructionArgs& args)
      : args_(args),
        shape_(args.shape),
        loops_(likelihood_loops<T>(args.likelihood)),
        segments_(pixel_segments(args.shape)),
        channels_(args.shape.size[1]),
        // Channels that share a mask value, or a mixture's responsibility, are handled together.
        group_(args.composition == Composition::mixture_independent || args.mask_per_channel ? 1 : channels_),
        unreduced_(static_cast<bool>(args.grad_loss_elements)),
        target_and_scale_grads_(args.grad_target || args.scale_partial),
        exceeds_cache_(3 * shape_.numel * size_of(args.fg.dtype) > kCache),
        weights_(region_weights<T>(args)),
        zeros_(math::Excluded<T>::zeros_if(hard_mask(args))),
        block_(kBlock<T>) {
    if (args.composition == Composition::masked && !args.loss && !unreduced_) {
      const bool nothing_else = !target_and_scale_grads_ && !args.areas;
      half_ = nothing_else && args.bg && images_stored_as<Half<T>>() && gradients_stored_as<Half<T>>();
      // What is gathered has to stay in the first-level cache. In whole steps, so that sums have the same
      // bits whether gradients are wanted or not.
      block_ = half_ || (nothing_else && images_stored_as<T>())
                   ? kFlush<T>
                   : std::max(kBlock<T> / group_ / kStep<T> * kStep<T>, kStep<T>);
    }
    for (int64_t c = 0; c < channels_; ++c) {
      fg_scales_.push_back(loops_.prepare(scale_at<T>(args.fg_scale, c)));
      bg_scales_.push_back(loops_.prepare(scale_at<T>(args.bg_scale, c)));
    }
  }

  void forward(int64_t task) {
    locate(task);
    for_groups([&](int64_t p, int64_t n, int64_t c) {
      switch (args_.composition) {
        case Composition::masked: masked_forward(p, n, c); break;
        case Composition::blended: blended_forward(p, n, c); break;
        default: mixture_forward(p, n, c);
      }
    });
    store_sums();
  }

  // The gradients and, where there is room for them, the sums of the loss.
  void gradients(int64_t task) {
    locate(task);
    if (stored<T>(args_.grad_loss, b_)) return;
    if (args_.composition == Composition::masked)
      to_ = region_upstream<T>(args_, b_);
    else
      per_loss_ = unreduced_ ? T(1) : upstream<T>(args_.grad_loss, b_);
    if (args_.scale_partial) {
      scale_sums_ = args_.scale_partial + task;
      scale_step_ = shape_.size[0] * segments_;
      for (int64_t k = 0; k < 2 * channels_; ++k) scale_sums_[k * scale_step_] = 0.0;
    }
    for_groups([&](int64_t p, int64_t n, int64_t c) {
      switch (args_.composition) {
        case Composition::masked: masked_gradients(p, n, c); break;
        case Composition::blended: blended_gradients(p, n, c); break;
        default: mixture_gradients(p, n, c);
      }
    });
    store_sums();
  }

 private:
  void locate(int64_t task) {
    b_ = task / segments_;
    segment_ = task % segments_;
  }

  // body(p, n, c): pixels [p, p + n) of the channels from c to c + group_.
  template <class Body>
  void for_groups(Body body) {
    const int64_t end = min((segment_ + 1) * kSegment, shape_.plane);
    int64_t since_flush = 0;
    for (int64_t p = segment_ * kSegment; p < end; p += block_) {
      for (int64_t c = 0; c < channels_; c += group_) body(p, min(block_, end - p), c);
      since_flush += block_;
      if (since_flush < kFlush<T>) continue;
      since_flush = 0;
      for (auto& sum : sums_) sum.flush();
    }
  }

  void store_sums() {
    if (!args_.partial) return;
    // Areas are pixels; a mask with channels has 1/C of a pixel in each.
    const double share = args_.mask_per_channel ? 1.0 / static_cast<double>(channels_) : 1.0;
    for (int t = 0; t < kTerms; ++t)
      args_.partial[(t * shape_.size[0] + b_) * segments_ + segment_] =
          (t < 2 ? 1.0 : share) * sums_[t].take();
  }

  Span span(int64_t c, int64_t p, int64_t n) const {
    return {shape_, b_ * shape_.row + c * shape_.plane + p, n};
  }
  int64_t offset(const View& v, int64_t c, int64_t p) const {
    return v.plane_stride == 1 ? b_ * v.stride[0] + c * v.stride[1] + p : -1;
  }
  const T* load(Input<T>& in, const View& v, int64_t c, int64_t p, int64_t n) const {
    const int64_t at = offset(v, c, p);
    if (at >= 0) prefetch_next(v, at, n);
    return in.load(v, span(c, p, n), at);
  }
  T* open(Output<T>& out, const View& v, int64_t c, int64_t p) const { return out.open(v, offset(v, c, p)); }

  // Loads fg, bg and target of a channel.
  void load_images(int64_t c, int64_t p, int64_t n) {
    fg_ = load(fg_in_, args_.fg, c, p, n);
    bg_ = args_.bg ? load(bg_in_, args_.bg, c, p, n) : fg_;
    target_ = load(target_in_, args_.target, c, p, n);
    fg_scale_ = fg_scales_[static_cast<size_t>(c)];
    bg_scale_ = bg_scales_[static_cast<size_t>(c)];
  }

  // on_ and off_: the mask and 1 - mask.
  void load_mask(int64_t c, int64_t p, int64_t n) {
    mask_ = load(mask_in_, args_.mask, c, p, n);
    if (args_.mask_kind == MaskKind::logits) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const math::Mask<T> m = math::mask_from_logit(mask_[k]);
        on_buffer_[k] = m.on;
        off_[k] = m.off;
      }
      on_ = on_buffer_;
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) off_[k] = T(1) - mask_[k];
      on_ = mask_;
    }
  }

  // From derivatives by the mask, less `constant`, to those by its input.
  void chain_mask(T constant, int64_t n, T* d_mask) {
    if (args_.mask_kind == MaskKind::logits) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) d_mask[k] = math::mask_slope(on_[k], off_[k]) * (d_mask[k] + constant);
    } else if (constant != T(0)) {
      for (int64_t k = 0; k < n; ++k) d_mask[k] += constant;
    }
  }

  // What arrives at each element of an unreduced loss. A joint mixture has one loss per pixel; its View has
  // stride 0 over the channels.
  const T* load_upstream(int64_t c, int64_t p, int64_t n) {
    return load(upstream_in_, args_.grad_loss_elements, c, p, n);
  }

  // The derivatives by l(x) in both regions. No u: ones, since the loss is reduced.
  void weigh_regions(const T* u, int64_t n) {
    weigh_region(u, to_.fg, to_.fg_term, on_, n, weight_fg_);
    weigh_region(u, to_.bg, to_.bg_term, off_, n, weight_bg_);
  }
  static void weigh_region(const T* u, T weight, T term, const T* share, int64_t n, T* to) {
    if (u) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        to[k] = math::masked_weight(math::masked_to_sum(u[k], weight, term), share[k]);
    } else {
      const T all = math::masked_to_sum(T(1), weight, term);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) to[k] = math::masked_weight(all, share[k]);
    }
  }

  // The same with x = 1 and no constant.
  static void fill(const T* u, T factor, int64_t n, T* to) {
    for (int64_t k = 0; k < n; ++k) to[k] = factor;
    if (!u) return;
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) to[k] *= u[k];
  }

  static void add(const T* x, int64_t n, T* to) {
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) to[k] += x[k];
  }

  void open_gradients(int64_t c, int64_t p) {
    d_fg_ = open(fg_out_, args_.grad_fg, c, p);
    d_bg_ = open(bg_out_, args_.grad_bg, c, p);
  }

  // The derivatives of both layers for the weights in weight_fg_ and weight_bg_, and their values.
  void layer_gradients(int64_t c, int64_t p, int64_t n, const T* on, const T* off) {
    open_gradients(c, p);
    loops_.gradient(fg_, target_, fg_scale_, weight_fg_, on, to_.excluded.fg, n, value_fg_, d_fg_);
    loops_.gradient(bg_, target_, bg_scale_, weight_bg_, off, to_.excluded.bg, n, value_bg_, d_bg_);
    if (!args_.bg) add(d_bg_, n, d_fg_);
    if (target_and_scale_grads_) other_gradients(c, p, n, on, off);
    close_gradients(c, p, n);
  }

  void other_gradients(int64_t c, int64_t p, int64_t n, const T* on, const T* off) {
    open_others(c, p, n);
    loops_.others(fg_, target_, fg_scale_, weight_fg_, on, to_.excluded.fg, n, d_target_, d_fg_scale_);
    loops_.others(bg_, target_, bg_scale_, weight_bg_, off, to_.excluded.bg, n, d_target_, d_bg_scale_);
    close_others(c, p, n);
  }

  void open_others(int64_t c, int64_t p, int64_t n) {
    d_target_ = open(target_out_, args_.grad_target, c, p);
    for (int64_t k = 0; k < n; ++k) d_target_[k] = T(0);
  }
  void close_others(int64_t c, int64_t p, int64_t n) {
    target_out_.close(args_.grad_target, span(c, p, n));
    if (!args_.scale_partial) return;
    scale_sums_[c * scale_step_] += sum(d_fg_scale_, n);
    scale_sums_[(channels_ + c) * scale_step_] += sum(d_bg_scale_, n);
  }
  void close_gradients(int64_t c, int64_t p, int64_t n) {
    fg_out_.close(args_.grad_fg, span(c, p, n));
    bg_out_.close(args_.grad_bg, span(c, p, n));
  }

  void masked_forward(int64_t p, int64_t n, int64_t c0) {
    if (!args_.loss) return masked_sums<false>(p, n, c0);
    load_mask(c0, p, n);
    const math::RegionWeights<T> weights = weights_;
    const math::ExcludedOfRegions<T> excluded = excluded_of_loss(weights, hard_mask(args_));
    for (int64_t c = c0; c < c0 + group_; ++c) {
      load_images(c, p, n);
      loops_.value(fg_, target_, fg_scale_, n, value_fg_);
      loops_.value(bg_, target_, bg_scale_, n, value_bg_);
      T* loss = open(loss_out_, args_.loss, c, p);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        value_fg_[k] = math::masked_value(on_[k], value_fg_[k], zeros_);
        value_bg_[k] = math::masked_value(off_[k], value_bg_[k], zeros_);
        loss[k] =
            math::masked_loss(on_[k], off_[k], weights.fg, weights.bg, value_fg_[k], value_bg_[k], excluded);
      }
      loss_out_.close(args_.loss, span(c, p, n));
      if (args_.partial) {
        add_all(value_fg_, n, sums_[0]);
        add_all(value_bg_, n, sums_[1]);
      }
    }
    add_areas(n);
  }

  void add_areas(int64_t n) {
    if (!args_.areas) return;
    add_all(on_, n, sums_[2]);
    add_all(off_, n, sums_[3]);
  }

  void masked_gradients(int64_t p, int64_t n, int64_t c0) {
    unreduced_ ? masked_element_gradients(p, n, c0) : masked_sums<true>(p, n, c0);
  }

  // A reduced loss, and its gradients, from images that are stored as S, or gathered.
  template <bool kGradients>
  void masked_sums(int64_t p, int64_t n, int64_t c0) {
    // The terms are those before the weights: a region that the loss leaves out has them all the same.
    if (kGradients && args_.partial && (to_.excluded.fg.everything() || to_.excluded.bg.everything()))
      masked_sums<false>(p, n, c0);
    half_ ? masked_sums<kGradients, Half<T>>(loops_.masked_half[kGradients], p, n, c0)
          : masked_sums<kGradients, T>(loops_.masked[kGradients], p, n, c0);
    if (!target_and_scale_grads_ && !args_.areas) return;
    load_mask(c0, p, n);
    add_areas(n);
    if (!target_and_scale_grads_) return;
    weigh_regions(nullptr, n);
    for (int64_t c = c0; c < c0 + group_; ++c) {
      load_images(c, p, n);
      other_gradients(c, p, n, on_, off_);
    }
  }

  template <bool kGradients, class S>
  void masked_sums(MaskedLoop<T, S> loop, int64_t p, int64_t n, int64_t c0) {
    Regions<T, S> r{};
    r.fg = load_planes<S>(0, args_.fg, c0, p, n, group_);
    r.bg = args_.bg ? load_planes<S>(1, args_.bg, c0, p, n, group_) : r.fg;
    r.target = load_planes<S>(2, args_.target, c0, p, n, group_);
    r.mask = load_planes<S>(3, args_.mask, c0, p, n, 1).data;
    r.logits = args_.mask_kind == MaskKind::logits;
    r.fg_scale = &fg_scales_[static_cast<size_t>(c0)];
    r.bg_scale = &bg_scales_[static_cast<size_t>(c0)];
    r.channels = group_;
    r.exceeds_cache = exceeds_cache_;
    r.excluded = {zeros_, zeros_};
    if (!kGradients) return loop(r, n, sums_[0], sums_[1]);
    r.excluded = to_.excluded;
    r.to_fg = to_.fg + to_.fg_term;
    r.to_bg = to_.bg + to_.bg_term;
    r.to_area = to_.mask;
    r.d_fg = open_planes<S>(4, args_.grad_fg, c0, p, group_);
    r.d_bg = open_planes<S>(5, args_.grad_bg, c0, p, group_);
    r.d_mask = open_planes<S>(6, args_.grad_mask, c0, p, 1).data;
    const bool without_sums = r.excluded.fg.everything() || r.excluded.bg.everything();
    LaneSums<T> no_sums[2];
    loop(r, n, without_sums ? no_sums[0] : sums_[0], without_sums ? no_sums[1] : sums_[1]);
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t c = 0; c < group_ && !args_.bg; ++c)
        add(r.d_bg.data + c * r.d_bg.stride, n, r.d_fg.data + c * r.d_fg.stride);
      close_planes(4, args_.grad_fg, c0, p, n, group_);
      close_planes(5, args_.grad_bg, c0, p, n, group_);
      close_planes(6, args_.grad_mask, c0, p, n, 1);
    }
  }

  template <class S>
  bool stored_as(const View& v) const {
    return v.plane_stride == 1 && v.dtype == (std::is_same_v<S, T> ? dtype_of<T>() : DType::bf16);
  }
  template <class S>
  bool images_stored_as() const {
    return stored_as<S>(args_.fg) && (!args_.bg || stored_as<S>(args_.bg)) && stored_as<S>(args_.target) &&
           stored_as<S>(args_.mask);
  }
  template <class S>
  bool gradients_stored_as() const {
    return (!args_.grad_fg || stored_as<S>(args_.grad_fg)) &&
           (!args_.grad_bg || stored_as<S>(args_.grad_bg)) &&
           (!args_.grad_mask || stored_as<S>(args_.grad_mask));
  }

  // Pixels [p, p + n) of channels from c0 on: where they are, or gathered into a buffer.
  template <class S>
  Planes<const S> load_planes(size_t buffer, const View& v, int64_t c0, int64_t p, int64_t n,
                              int64_t channels) {
    if (stored_as<S>(v)) return {static_cast<const S*>(v.data) + offset(v, c0, p), v.stride[1]};
    T* to = buffer_of(buffer, channels);
    for (int64_t c = 0; c < channels; ++c)
      gather(v, span(c0 + c, p, n), offset(v, c0 + c, p), to + c * block_);
    return {static_cast<const S*>(static_cast<const void*>(to)), block_};
  }
  template <class S>
  Planes<S> open_planes(size_t buffer, const View& v, int64_t c0, int64_t p, int64_t channels) {
    if (v && stored_as<S>(v)) return {static_cast<S*>(v.data) + offset(v, c0, p), v.stride[1]};
    return {static_cast<S*>(static_cast<void*>(buffer_of(buffer, channels))), block_};
  }
  void close_planes(size_t buffer, const View& v, int64_t c0, int64_t p, int64_t n, int64_t channels) {
    if (!v || stored_as<T>(v)) return;
    for (int64_t c = 0; c < channels; ++c)
      scatter(buffer_of(buffer, channels) + c * block_, v, span(c0 + c, p, n), offset(v, c0 + c, p));
  }
  T* buffer_of(size_t buffer, int64_t channels) {
    planes_[buffer].resize(static_cast<size_t>(channels * block_));
    return planes_[buffer].data();
  }

  // For a gradient that arrives at each element of the loss.
  void masked_element_gradients(int64_t p, int64_t n, int64_t c0) {
    load_mask(c0, p, n);
    T* d_mask = open(mask_out_, args_.grad_mask, c0, p);
    std::fill(d_mask, d_mask + n, T(0));
    for (int64_t c = c0; c < c0 + group_; ++c) {
      load_images(c, p, n);
      const T* u = load_upstream(c, p, n);
      weigh_regions(u, n);
      layer_gradients(c, p, n, on_, off_);
      const math::RegionUpstream<T> to = to_;
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        d_mask[k] += math::masked_d_mask(on_[k], off_[k], math::masked_to_sum(u[k], to.fg, to.fg_term),
                                         math::masked_to_sum(u[k], to.bg, to.bg_term), value_fg_[k],
                                         value_bg_[k], to.excluded);
    }
    chain_mask(to_.mask, n, d_mask);
    mask_out_.close(args_.grad_mask, span(c0, p, n));
  }

  void blend(int64_t c, int64_t p, int64_t n) {
    load_images(c, p, n);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) blend_[k] = math::blend(on_[k], off_[k], fg_[k], bg_[k], zeros_);
  }

  void blended_forward(int64_t p, int64_t n, int64_t c0) {
    load_mask(c0, p, n);
    for (int64_t c = c0; c < c0 + group_; ++c) {
      blend(c, p, n);
      T* loss = open(loss_out_, args_.loss, c, p);
      loops_.value(blend_, target_, fg_scale_, n, loss);
      if (args_.partial) add_all(loss, n, sums_[0]);
      loss_out_.close(args_.loss, span(c, p, n));
    }
  }

  void blended_gradients(int64_t p, int64_t n, int64_t c0) {
    load_mask(c0, p, n);
    T* d_mask = open(mask_out_, args_.grad_mask, c0, p);
    for (int64_t k = 0; k < n; ++k) d_mask[k] = T(0);
    for (int64_t c = c0; c < c0 + group_; ++c) {
      blend(c, p, n);
      fill(unreduced_ ? load_upstream(c, p, n) : nullptr, per_loss_, n, weight_fg_);
      open_gradients(c, p);
      T* d_blend = sum_fg_;
      loops_.gradient(blend_, target_, fg_scale_, weight_fg_, weight_fg_, {}, n, value_fg_, d_blend);
      if (target_and_scale_grads_) {
        open_others(c, p, n);
        loops_.others(blend_, target_, fg_scale_, weight_fg_, weight_fg_, {}, n, d_target_, d_fg_scale_);
        for (int64_t k = 0; k < n; ++k) d_bg_scale_[k] = T(0);
        close_others(c, p, n);
      }
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        d_mask[k] += math::blend_d_mask(fg_[k], bg_[k], d_blend[k]);
        d_fg_[k] = math::chain(d_blend[k], on_[k], on_[k], zeros_);
        d_bg_[k] = math::chain(d_blend[k], off_[k], off_[k], zeros_);
      }
      close_gradients(c, p, n);
      if (args_.partial) add_all(value_fg_, n, sums_[0]);
    }
    chain_mask(T(0), n, d_mask);
    mask_out_.close(args_.grad_mask, span(c0, p, n));
  }

  // Nats of both components, summed over the channels of the group, in sum_fg_ and sum_bg_.
  void mixture_components(int64_t p, int64_t n, int64_t c0) {
    mask_ = load(mask_in_, args_.mask, c0, p, n);
    for (int64_t c = c0; c < c0 + group_; ++c) {
      load_images(c, p, n);
      T* fg = c == c0 ? sum_fg_ : value_fg_;
      T* bg = c == c0 ? sum_bg_ : value_bg_;
      loops_.value(fg_, target_, fg_scale_, n, fg);
      loops_.value(bg_, target_, bg_scale_, n, bg);
      if (c == c0) continue;
      add(fg, n, sum_fg_);
      add(bg, n, sum_bg_);
    }
  }

  void mixture_forward(int64_t p, int64_t n, int64_t c0) {
    mixture_components(p, n, c0);
    T* loss = open(loss_out_, args_.loss, c0, p);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) loss[k] = math::mixture(mask_[k], sum_fg_[k], sum_bg_[k]).value;
    if (args_.partial) add_all(loss, n, sums_[0]);
    loss_out_.close(args_.loss, span(c0, p, n));
  }

  void mixture_gradients(int64_t p, int64_t n, int64_t c0) {
    mixture_components(p, n, c0);
    // One mask for all channels of an independent mixture collects from each of them.
    const bool first = c0 == 0 || args_.mask_per_channel;
    const bool last = c0 + group_ == channels_ || args_.mask_per_channel;
    const int64_t mask_channel = args_.mask_per_channel ? c0 : 0;
    if (first) {
      d_mask_ = open(mask_out_, args_.grad_mask, mask_channel, p);
      for (int64_t k = 0; k < n; ++k) d_mask_[k] = T(0);
    }
    T *d_mask = d_mask_, *weight = value_bg_;
    fill(unreduced_ ? load_upstream(c0, p, n) : nullptr, per_loss_, n, weight);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const math::Mixture<T> m = math::mixture(mask_[k], sum_fg_[k], sum_bg_[k]);
      value_fg_[k] = m.value;
      weight_fg_[k] = weight[k] * m.d_fg;
      weight_bg_[k] = weight[k] * m.d_bg;
      d_mask[k] += weight[k] * m.d_logit;
    }
    if (args_.partial) add_all(value_fg_, n, sums_[0]);
    if (last) mask_out_.close(args_.grad_mask, span(mask_channel, p, n));
    for (int64_t c = c0; c < c0 + group_; ++c) {
      if (group_ > 1) load_images(c, p, n);
      // Nothing is excluded, of whatever share.
      layer_gradients(c, p, n, weight_fg_, weight_bg_);
    }
  }

  const ReconstructionArgs& args_;
  const Shape& shape_;
  const LikelihoodLoops<T>& loops_;
  const int64_t segments_, channels_, group_;
  const bool unreduced_, target_and_scale_grads_, exceeds_cache_;
  const math::RegionWeights<T> weights_;
  const math::Excluded<T> zeros_;  // of a hard mask
  int64_t block_;                  // pixels that are handled together
  bool half_ = false;              // all images are stored as Half<T>
  int64_t b_ = 0, segment_ = 0;
  math::RegionUpstream<T> to_{};
  T per_loss_ = 0;
  double* scale_sums_ = nullptr;
  int64_t scale_step_ = 0;
  LaneSums<T> sums_[kTerms];
  std::vector<T> planes_[7];  // what is gathered or goes nowhere: fg, bg, target, mask, their gradients
  std::vector<math::Scale<T>> fg_scales_, bg_scales_;
  math::Scale<T> fg_scale_{}, bg_scale_{};
  Input<T> fg_in_, bg_in_, target_in_, mask_in_, upstream_in_;
  const T *fg_ = nullptr, *bg_ = nullptr, *target_ = nullptr, *mask_ = nullptr, *on_ = nullptr;
  Output<T> loss_out_, fg_out_, bg_out_, target_out_, mask_out_;
  T *d_fg_ = nullptr, *d_bg_ = nullptr, *d_target_ = nullptr, *d_mask_ = nullptr;
  alignas(64) Buffer<T> on_buffer_, off_, blend_;
  alignas(64) Buffer<T> value_fg_, value_bg_, sum_fg_, sum_bg_, weight_fg_, weight_bg_, d_fg_scale_,
      d_bg_scale_;
};

template <class T>
void forward(const ReconstructionArgs& args, int64_t begin, int64_t end) {
  Pass<T> pass(args);
  for (int64_t task = begin; task < end; ++task) pass.forward(task);
}

template <class T>
void gradients(const ReconstructionArgs& args, int64_t begin, int64_t end) {
  Pass<T> pass(args);
  for (int64_t task = begin; task < end; ++task) pass.gradients(task);
}

int64_t tasks(const ReconstructionArgs& args) { return args.shape.size[0] * pixel_segments(args.shape); }
int64_t cost(const ReconstructionArgs& args) { return min(kSegment, args.shape.plane) * args.shape.size[1]; }

}  // namespace

void add_reconstruction(Kernels& table) {
  table.reconstruction_forward = {tasks, cost, {forward<float>, forward<double>}};
  table.reconstruction_backward = {tasks, cost, {gradients<float>, gradients<double>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
