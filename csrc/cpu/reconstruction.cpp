// Reconstruction losses of one or two layers on the CPU.
//
// A task is a segment of the pixels of one sample, all channels. Within it a block of pixels goes
// through three kinds of stage, each a loop over a buffer in the first-level cache: the mask, the
// likelihood (once per region and channel), and what combines them. Stages rather than one fused loop:
// the likelihood loops are then the only code that is multiplied by the list of likelihoods. Masked losses
// without weights and maps of scales are the exception, see masked_loop(). What the channels of a pixel share
// is done once per pixel.
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

// Pixels after which the lanes of a sum are flushed to float64.
template <class T>
constexpr int64_t kFlush = 2 * kBlock<T>;

// Images of more bytes than this are taken not to be in a cache.
constexpr int64_t kCache = 32 << 20;

// What the three losses share: the pixels of a task, the operands of a block, the gradients of the layers,
// and the partial sums.
template <class T>
class Loss {
 protected:
  // Channels in groups of `group` share a mask value, or a mixture's responsibility, and are handled
  // together.
  Loss(const ReconstructionArgs& args, int64_t group)
      : args_(args),
        shape_(args.shape),
        loops_(likelihood_loops<T>(args.likelihood)),
        segments_(pixel_segments(args.shape)),
        channels_(args.shape.size[1]),
        group_(group),
        unreduced_(static_cast<bool>(args.grad_loss_elements)),
        mapped_(args.fg_scale_map || args.bg_scale_map),
        target_and_scale_grads_(args.grad_target || args.scale_partial || args.grad_fg_scale_map ||
                                args.grad_bg_scale_map),
        zeros_(math::Excluded<T>::zeros_if(selects(args))) {
    for (int64_t c = 0; c < channels_; ++c) {
      fg_scales_.push_back(loops_.prepare(scale_at<T>(args.fg_scale, c)));
      bg_scales_.push_back(loops_.prepare(scale_at<T>(args.bg_scale, c)));
    }
  }

  // Selects the sample and the segment of its pixels.
  void locate(int64_t task) {
    b_ = task / segments_;
    segment_ = task % segments_;
  }

  // The same for a backward pass.
  void locate_gradients(int64_t task) {
    locate(task);
    if (!args_.scale_partial) return;
    scale_sums_ = args_.scale_partial + task;
    scale_step_ = shape_.size[0] * segments_;
    for (int64_t k = 0; k < 2 * channels_; ++k) scale_sums_[k * scale_step_] = 0.0;
  }

  // Calls body(p, n, c) for the blocks of the segment, pixels [p, p + n) of the channels [c, c + group_), and
  // stores the sums.
  template <class Body>
  void for_blocks(int64_t block, Body body) {
    const int64_t end = min((segment_ + 1) * kSegment, shape_.plane);
    int64_t since_flush = 0;
    for (int64_t p = segment_ * kSegment; p < end; p += block) {
      for (int64_t c = 0; c < channels_; c += group_) body(p, min(block, end - p), c);
      since_flush += block;
      if (since_flush < kFlush<T>) continue;
      since_flush = 0;
      for (auto& sum : sums_) sum.flush();
    }
    store_sums();
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
    fg_scale_ = {fg_scales_[static_cast<size_t>(c)]};
    bg_scale_ = {bg_scales_[static_cast<size_t>(c)]};
    if (mapped_) load_scales(c, p, n);
  }

  // The weights of the elements, and their magnitudes, which say what is left out. Without weights null, and
  // of any value.
  const T* load_weight(int64_t c, int64_t p, int64_t n) {
    if (!args_.weight) return nullptr;
    const T* weight = load(weight_in_, args_.weight, c, p, n);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) magnitude_[k] = math::abs(weight[k]);
    return weight;
  }

  // The upstream gradient of each element of an unreduced loss. A joint mixture has one loss per pixel; its
  // View has stride 0 over the channels.
  const T* load_upstream(int64_t c, int64_t p, int64_t n) {
    return load(upstream_in_, args_.grad_loss_elements, c, p, n);
  }

  // The same of any loss.
  void fill_upstream(int64_t c, int64_t p, int64_t n, T* to) {
    const T all = unreduced_ ? T(1) : upstream<T>(args_.grad_loss, b_);
    for (int64_t k = 0; k < n; ++k) to[k] = all;
    if (!unreduced_) return;
    const T* u = load_upstream(c, p, n);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) to[k] *= u[k];
  }

  static void add(const T* x, int64_t n, T* to) {
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) to[k] += x[k];
  }

  void open_layer_gradients(int64_t c, int64_t p) {
    d_fg_ = open(fg_out_, args_.grad_fg, c, p);
    d_bg_ = open(bg_out_, args_.grad_bg, c, p);
  }
  void close_layer_gradients(int64_t c, int64_t p, int64_t n) {
    fg_out_.close(args_.grad_fg, span(c, p, n));
    bg_out_.close(args_.grad_bg, span(c, p, n));
  }

  // d loss / d l(x) of the elements of both layers, and their shares of the mask (of any value where nothing
  // is excluded).
  struct Weights {
    const T *fg, *bg, *on, *off;
    math::ExcludedOfRegions<T> excluded;
  };

  // x times the weights of the elements, 0 where an element is left out.
  void weigh_elements(const T* weight, int64_t n, T* x) const {
    if (!weight) return;
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) x[k] = math::chain(weight[k], x[k], magnitude_[k], zeros_);
  }

  // The gradient of the weights of a loss of one value for each element: that value.
  void store_weight_gradient(int64_t c, int64_t p, int64_t n, const T* upstream, const T* value) {
    if (!args_.grad_weight) return;
    T* d_weight = open(weight_out_, args_.grad_weight, c, p);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) d_weight[k] = math::chain(upstream[k], value[k], magnitude_[k], zeros_);
    weight_out_.close(args_.grad_weight, span(c, p, n));
  }

  // The gradients of both layers. Their l(x) are written to nll_fg and nll_bg.
  void layer_gradients(int64_t c, int64_t p, int64_t n, const Weights& w, T* nll_fg, T* nll_bg) {
    open_layer_gradients(c, p);
    loops_.gradient(fg_, target_, fg_scale_, w.fg, w.on, w.excluded.fg, n, nll_fg, d_fg_);
    loops_.gradient(bg_, target_, bg_scale_, w.bg, w.off, w.excluded.bg, n, nll_bg, d_bg_);
    if (!args_.bg) add(d_bg_, n, d_fg_);
    if (target_and_scale_grads_) target_and_scale_gradients(c, p, n, w);
    close_layer_gradients(c, p, n);
  }

  void target_and_scale_gradients(int64_t c, int64_t p, int64_t n, const Weights& w) {
    open_target_and_scale_gradients(c, p, n);
    loops_.others(fg_, target_, fg_scale_, w.fg, w.on, w.excluded.fg, n, d_target_, d_fg_scale_);
    loops_.others(bg_, target_, bg_scale_, w.bg, w.off, w.excluded.bg, n, d_target_, d_bg_scale_);
    close_target_and_scale_gradients(c, p, n, true);
  }

  void open_target_and_scale_gradients(int64_t c, int64_t p, int64_t n) {
    d_target_ = open(target_out_, args_.grad_target, c, p);
    d_fg_scale_ = open(fg_scale_out_, args_.grad_fg_scale_map, c, p);
    d_bg_scale_ = open(bg_scale_out_, args_.grad_bg_scale_map, c, p);
    std::fill(d_target_, d_target_ + n, T(0));
  }
  void close_target_and_scale_gradients(int64_t c, int64_t p, int64_t n, bool of_bg_scale) {
    target_out_.close(args_.grad_target, span(c, p, n));
    fg_scale_out_.close(args_.grad_fg_scale_map, span(c, p, n));
    bg_scale_out_.close(args_.grad_bg_scale_map, span(c, p, n));
    if (!args_.scale_partial) return;
    if (!args_.fg_scale_map) scale_sums_[c * scale_step_] += sum(d_fg_scale_, n);
    if (of_bg_scale && !args_.bg_scale_map) scale_sums_[(channels_ + c) * scale_step_] += sum(d_bg_scale_, n);
  }

  const ReconstructionArgs& args_;
  const Shape& shape_;
  const LikelihoodLoops<T>& loops_;
  const int64_t segments_, channels_, group_;
  const bool unreduced_, mapped_, target_and_scale_grads_;
  const math::Excluded<T> zeros_;  // of a hard mask, and of the weights
  int64_t b_ = 0, segment_ = 0;
  LaneSums<T> sums_[kTerms];
  std::vector<math::Scale<T>> fg_scales_, bg_scales_;
  BlockScale<T> fg_scale_{}, bg_scale_{};
  const T *fg_ = nullptr, *bg_ = nullptr, *target_ = nullptr;
  T *d_fg_ = nullptr, *d_bg_ = nullptr, *d_target_ = nullptr, *d_fg_scale_ = nullptr, *d_bg_scale_ = nullptr;
  alignas(64) Buffer<T> magnitude_;
  Output<T> loss_out_, mask_out_, weight_out_;
  Input<T> mask_in_;

 private:
  void store_sums() {
    if (!args_.partial) return;
    // Areas are pixels; a mask or a weight with channels has 1/C of a pixel in each.
    const double share = args_.mask_per_channel || args_.weight ? 1.0 / static_cast<double>(channels_) : 1.0;
    for (int t = 0; t < args_.final_reductions[0].terms; ++t)
      args_.partial[(t * shape_.size[0] + b_) * segments_ + segment_] =
          (t < 2 ? 1.0 : share) * sums_[t].take();
  }

  void load_scales(int64_t c, int64_t p, int64_t n) {
    load_scales(args_.fg_scale_map, fg_scale_in_, c, p, n, fg_prepared_, fg_scale_);
    load_scales(args_.bg_scale_map, bg_scale_in_, c, p, n, bg_prepared_, bg_scale_);
  }
  void load_scales(const View& map, Input<T>& in, int64_t c, int64_t p, int64_t n, Buffer<T> (&prepared)[2],
                   BlockScale<T>& to) {
    if (!map) return;
    loops_.prepare_each(load(in, map, c, p, n), n, prepared[0], prepared[1]);
    to.inverse = prepared[0];
    to.constant = prepared[1];
  }

  double* scale_sums_ = nullptr;
  int64_t scale_step_ = 0;
  alignas(64) Buffer<T> fg_prepared_[2], bg_prepared_[2];
  Input<T> fg_in_, bg_in_, target_in_, upstream_in_, weight_in_, fg_scale_in_, bg_scale_in_;
  Output<T> fg_out_, bg_out_, target_out_, fg_scale_out_, bg_scale_out_;
};

// A loss with a mask between 0 and 1, rather than its logits alone.
template <class T>
class LossOfMask : public Loss<T> {
 protected:
  explicit LossOfMask(const ReconstructionArgs& args)
      : Loss<T>(args, args.mask_per_channel ? 1 : args.shape.size[1]) {}

  // on_ and off_: m and 1 - m.
  void load_mask(int64_t c, int64_t p, int64_t n) {
    const T* mask = this->load(this->mask_in_, this->args_.mask, c, p, n);
    if (this->args_.mask_kind == MaskKind::logits) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const math::Mask<T> m = math::mask_from_logit(mask[k]);
        on_buffer_[k] = m.on;
        off_[k] = m.off;
      }
      on_ = on_buffer_;
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) off_[k] = T(1) - mask[k];
      on_ = mask;
    }
  }

  // The shares of both layers in each element, weighted: those that multiply, and those that say what is left
  // out. Returns the weights.
  const T* load_shares(int64_t c, int64_t p, int64_t n) {
    const T* weight = this->load_weight(c, p, n);
    if (!weight) {
      share_fg_ = select_fg_ = on_;
      share_bg_ = select_bg_ = off_;
      return nullptr;
    }
    const bool hard = hard_mask(this->args_);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      shares_[0][k] = on_[k] * weight[k];
      shares_[1][k] = off_[k] * weight[k];
      shares_[2][k] = math::selecting_share(on_[k], weight[k], hard);
      shares_[3][k] = math::selecting_share(off_[k], weight[k], hard);
    }
    share_fg_ = shares_[0];
    share_bg_ = shares_[1];
    select_fg_ = shares_[2];
    select_bg_ = shares_[3];
    return weight;
  }

  // From d loss / d m, less a constant, to d loss / d mask or logit.
  void chain_mask(T constant, int64_t n, T* d_mask) {
    if (this->args_.mask_kind == MaskKind::logits) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) d_mask[k] = math::mask_slope(on_[k], off_[k]) * (d_mask[k] + constant);
    } else if (constant != T(0)) {
      for (int64_t k = 0; k < n; ++k) d_mask[k] += constant;
    }
  }

  // The gradient of a mask is 0 where all its elements are left out, whatever the mask is there.
  void select_mask_gradient(int64_t n, T* d_mask) {
    if (!this->args_.weight) return;
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) d_mask[k] = math::selected(d_mask[k], magnitudes_[k], this->zeros_);
  }
  void begin_mask_gradient(int64_t n, T* d_mask) {
    std::fill(d_mask, d_mask + n, T(0));
    std::fill(magnitudes_, magnitudes_ + n, T(0));
  }

  const T* on_ = nullptr;
  const T *share_fg_ = nullptr, *share_bg_ = nullptr, *select_fg_ = nullptr, *select_bg_ = nullptr;
  alignas(64) Buffer<T> off_, magnitudes_;  // magnitudes_: of the weights, summed over the channels of a mask

 private:
  alignas(64) Buffer<T> on_buffer_, shares_[4];
};

template <class T>
class MaskedLoss : LossOfMask<T> {
  using Base = LossOfMask<T>;
  using Base::args_, Base::shape_, Base::loops_, Base::group_, Base::sums_, Base::span, Base::offset;
  using Base::on_, Base::off_, Base::zeros_, Base::target_and_scale_grads_, Base::fg_, Base::bg_,
      Base::target_;
  using Base::share_fg_, Base::share_bg_, Base::select_fg_, Base::select_bg_, Base::magnitude_,
      Base::magnitudes_;

 public:
  explicit MaskedLoss(const ReconstructionArgs& args)
      : Base(args),
        weights_(region_weights<T>(args)),
        exceeds_cache_(3 * shape_.numel * size_of(args.fg.dtype) > kCache),
        fused_(!args.loss && !this->unreduced_ && !args.weight && !this->mapped_),
        block_(kBlock<T>) {
    if (!fused_) return;
    const bool nothing_else = !target_and_scale_grads_ && !args.areas;
    half_ = nothing_else && args.bg && images_stored_as<Half<T>>() && gradients_stored_as<Half<T>>();
    // What is gathered has to stay in the first-level cache. In whole steps, so that sums have the same bits
    // whether gradients are wanted or not.
    block_ = half_ || (nothing_else && images_stored_as<T>())
                 ? kFlush<T>
                 : std::max(kBlock<T> / group_ / kStep<T> * kStep<T>, kStep<T>);
  }

  void forward(int64_t task) {
    this->locate(task);
    this->for_blocks(block_, [&](int64_t p, int64_t n, int64_t c) {
      fused_ ? reduced<false>(p, n, c) : staged_forward(p, n, c);
    });
  }

  void gradients(int64_t task) {
    this->locate_gradients(task);
    to_ = region_upstream<T>(args_, this->b_);
    this->for_blocks(block_, [&](int64_t p, int64_t n, int64_t c) {
      fused_ ? reduced<true>(p, n, c) : staged_gradients(p, n, c);
    });
  }

 private:
  // By element, with weights, or with maps of scales.
  void staged_forward(int64_t p, int64_t n, int64_t c0) {
    this->load_mask(c0, p, n);
    const math::RegionWeights<T> weights = weights_;
    const math::ExcludedOfRegions<T> excluded = excluded_of_loss(weights, selects(args_));
    for (int64_t c = c0; c < c0 + group_; ++c) {
      this->load_images(c, p, n);
      this->load_shares(c, p, n);
      loops_.value(fg_, target_, this->fg_scale_, n, nll_fg_);
      loops_.value(bg_, target_, this->bg_scale_, n, nll_bg_);
      add_values(n);
      if (!args_.loss) continue;
      T* loss = this->open(this->loss_out_, args_.loss, c, p);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        loss[k] = math::masked_loss(select_fg_[k], select_bg_[k], weights.fg, weights.bg, nll_fg_[k],
                                    nll_bg_[k], excluded);
      this->loss_out_.close(args_.loss, span(c, p, n));
    }
    if (!args_.weight) add_areas(on_, off_, n);
  }

  // From l(x) in both regions to what the elements add to the sums.
  void add_values(int64_t n) {
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      nll_fg_[k] = math::chain(share_fg_[k], nll_fg_[k], select_fg_[k], zeros_);
      nll_bg_[k] = math::chain(share_bg_[k], nll_bg_[k], select_bg_[k], zeros_);
    }
    if (!args_.partial) return;
    add_all(nll_fg_, n, sums_[0]);
    add_all(nll_bg_, n, sums_[1]);
    if (!args_.weight) return;
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      area_[0][k] = math::selected(share_fg_[k], select_fg_[k], zeros_);
      area_[1][k] = math::selected(share_bg_[k], select_bg_[k], zeros_);
    }
    add_areas(area_[0], area_[1], n);
  }

  void add_areas(const T* fg, const T* bg, int64_t n) {
    if (!args_.areas) return;
    add_all(fg, n, sums_[2]);
    add_all(bg, n, sums_[3]);
  }

  // A reduced loss and, if wanted, its gradients.
  template <bool kGradients>
  void reduced(int64_t p, int64_t n, int64_t c0) {
    // The terms are those before the weights: a region that the loss leaves out has them all the same.
    if (kGradients && args_.partial && (to_.excluded.fg.everything() || to_.excluded.bg.everything()))
      fused<false>(p, n, c0);
    fused<kGradients>(p, n, c0);
    if (!target_and_scale_grads_ && !args_.areas) return;
    this->load_mask(c0, p, n);
    add_areas(on_, off_, n);
    if (!target_and_scale_grads_) return;
    this->load_shares(c0, p, n);
    weigh(nullptr, n);
    for (int64_t c = c0; c < c0 + group_; ++c) {
      this->load_images(c, p, n);
      this->target_and_scale_gradients(c, p, n, {weight_fg_, weight_bg_, on_, off_, to_.excluded});
    }
  }

  template <bool kGradients>
  void fused(int64_t p, int64_t n, int64_t c0) {
    half_ ? fused<kGradients, Half<T>>(loops_.masked_half[kGradients], p, n, c0)
          : fused<kGradients, T>(loops_.masked[kGradients], p, n, c0);
  }

  // By masked_loop(), from images stored as S, or gathered.
  template <bool kGradients, class S>
  void fused(MaskedLoop<T, S> loop, int64_t p, int64_t n, int64_t c0) {
    Regions<T, S> r{};
    r.fg = load_planes<S>(0, args_.fg, c0, p, n, group_);
    r.bg = args_.bg ? load_planes<S>(1, args_.bg, c0, p, n, group_) : r.fg;
    r.target = load_planes<S>(2, args_.target, c0, p, n, group_);
    r.mask = load_planes<S>(3, args_.mask, c0, p, n, 1).data;
    r.logits = args_.mask_kind == MaskKind::logits;
    r.fg_scale = &this->fg_scales_[static_cast<size_t>(c0)];
    r.bg_scale = &this->bg_scales_[static_cast<size_t>(c0)];
    r.channels = group_;
    r.exceeds_cache = exceeds_cache_;
    r.excluded = {zeros_, zeros_};
    if (!kGradients) return loop(r, n, sums_[0], sums_[1]);
    r.excluded = to_.excluded;
    r.to_fg = to_.fg + to_.fg_term;
    r.to_bg = to_.bg + to_.bg_term;
    r.to_area = to_.mask();
    r.d_fg = open_planes<S>(4, args_.grad_fg, c0, p, group_);
    r.d_bg = open_planes<S>(5, args_.grad_bg, c0, p, group_);
    r.d_mask = open_planes<S>(6, args_.grad_mask, c0, p, 1).data;
    const bool without_sums = r.excluded.fg.everything() || r.excluded.bg.everything();
    LaneSums<T> no_sums[2];
    loop(r, n, without_sums ? no_sums[0] : sums_[0], without_sums ? no_sums[1] : sums_[1]);
    if constexpr (std::is_same_v<S, T>) {
      for (int64_t c = 0; c < group_ && !args_.bg; ++c)
        this->add(r.d_bg.data + c * r.d_bg.stride, n, r.d_fg.data + c * r.d_fg.stride);
      close_planes(4, args_.grad_fg, c0, p, n, group_);
      close_planes(5, args_.grad_bg, c0, p, n, group_);
      close_planes(6, args_.grad_mask, c0, p, n, 1);
    }
  }

  // The same for the gradients.
  void staged_gradients(int64_t p, int64_t n, int64_t c0) {
    this->load_mask(c0, p, n);
    T* d_mask = this->open(this->mask_out_, args_.grad_mask, c0, p);
    this->begin_mask_gradient(n, d_mask);
    const math::RegionUpstream<T> to = to_;
    const T to_area = to.mask();
    for (int64_t c = c0; c < c0 + group_; ++c) {
      this->load_images(c, p, n);
      const T* weight = this->load_shares(c, p, n);
      weigh(this->unreduced_ ? this->load_upstream(c, p, n) : nullptr, n);
      this->layer_gradients(c, p, n, {weight_fg_, weight_bg_, select_fg_, select_bg_, to.excluded}, nll_fg_,
                            nll_bg_);
      if (weight) {
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k) {
          const T d = math::masked_d_mask(select_fg_[k], select_bg_[k], to_fg_[k], to_bg_[k], nll_fg_[k],
                                          nll_bg_[k], to.excluded);
          d_mask[k] += math::chain(weight[k], d + to_area, magnitude_[k], zeros_);
          magnitudes_[k] += magnitude_[k];
        }
        weight_gradient(c, p, n);
      } else {
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k)
          d_mask[k] += math::masked_d_mask(select_fg_[k], select_bg_[k], to_fg_[k], to_bg_[k], nll_fg_[k],
                                           nll_bg_[k], to.excluded);
      }
      if (args_.partial) add_values(n);
    }
    if (!args_.weight) add_areas(on_, off_, n);
    this->chain_mask(args_.weight ? T(0) : to_area, n, d_mask);
    this->select_mask_gradient(n, d_mask);
    this->mask_out_.close(args_.grad_mask, span(c0, p, n));
  }

  void weight_gradient(int64_t c, int64_t p, int64_t n) {
    if (!args_.grad_weight) return;
    const math::RegionUpstream<T> to = to_;
    T* d_weight = this->open(this->weight_out_, args_.grad_weight, c, p);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const T by_nats = math::chain(to_fg_[k] * on_[k], nll_fg_[k], select_fg_[k], to.excluded.fg) +
                        math::chain(to_bg_[k] * off_[k], nll_bg_[k], select_bg_[k], to.excluded.bg);
      const T by_areas = on_[k] * to.fg_area + off_[k] * to.bg_area;
      d_weight[k] = math::selected(by_nats + by_areas, magnitude_[k], zeros_);
    }
    this->weight_out_.close(args_.grad_weight, span(c, p, n));
  }

  // d loss / d sum of both regions, by element, and d loss / d l(x). No u: the loss is reduced.
  void weigh(const T* u, int64_t n) {
    weigh(u, to_.fg, to_.fg_term, share_fg_, n, to_fg_, weight_fg_);
    weigh(u, to_.bg, to_.bg_term, share_bg_, n, to_bg_, weight_bg_);
  }
  static void weigh(const T* u, T weight, T term, const T* share, int64_t n, T* to_sum, T* to) {
    const T all = math::masked_to_sum(T(1), weight, term);
    std::fill(to_sum, to_sum + n, all);
    if (u) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) to_sum[k] = math::masked_to_sum(u[k], weight, term);
    }
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) to[k] = math::masked_weight(to_sum[k], share[k]);
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

  const math::RegionWeights<T> weights_;
  const bool exceeds_cache_, fused_;
  int64_t block_;      // pixels that are handled together
  bool half_ = false;  // all images are stored as Half<T>
  math::RegionUpstream<T> to_{};
  std::vector<T> planes_[7];  // what is gathered, or not wanted: fg, bg, target, mask, their gradients
  alignas(64) Buffer<T> nll_fg_, nll_bg_, weight_fg_, weight_bg_, to_fg_, to_bg_, area_[2];
};

// The loss of one image: a blend of both layers, or, where there is no mask, the foreground.
template <class T>
class BlendedLoss : LossOfMask<T> {
  using Base = LossOfMask<T>;
  using Base::args_, Base::loops_, Base::group_, Base::sums_, Base::span, Base::on_, Base::off_, Base::zeros_;
  using Base::fg_, Base::bg_, Base::target_, Base::d_fg_, Base::d_bg_, Base::magnitude_, Base::magnitudes_;

 public:
  explicit BlendedLoss(const ReconstructionArgs& args) : Base(args), blends_(static_cast<bool>(args.mask)) {}

  void forward(int64_t task) {
    this->locate(task);
    this->for_blocks(kBlock<T>, [&](int64_t p, int64_t n, int64_t c0) {
      if (blends_) this->load_mask(c0, p, n);
      for (int64_t c = c0; c < c0 + group_; ++c) {
        const T* image = blend(c, p, n);
        T* loss = this->open(this->loss_out_, args_.loss, c, p);
        loops_.value(image, target_, this->fg_scale_, n, loss);
        this->weigh_elements(this->load_weight(c, p, n), n, loss);
        if (args_.partial) add_all(loss, n, sums_[0]);
        this->loss_out_.close(args_.loss, span(c, p, n));
      }
    });
  }

  void gradients(int64_t task) {
    this->locate_gradients(task);
    this->for_blocks(kBlock<T>, [&](int64_t p, int64_t n, int64_t c0) {
      if (!blends_) {
        for (int64_t c = c0; c < c0 + group_; ++c) gradients(p, n, c, nullptr);
        return;
      }
      this->load_mask(c0, p, n);
      T* d_mask = this->open(this->mask_out_, args_.grad_mask, c0, p);
      this->begin_mask_gradient(n, d_mask);
      for (int64_t c = c0; c < c0 + group_; ++c) gradients(p, n, c, d_mask);
      this->chain_mask(T(0), n, d_mask);
      this->select_mask_gradient(n, d_mask);
      this->mask_out_.close(args_.grad_mask, span(c0, p, n));
    });
  }

 private:
  const T* blend(int64_t c, int64_t p, int64_t n) {
    this->load_images(c, p, n);
    if (!blends_) return fg_;
    const math::Excluded<T> of_mask = math::Excluded<T>::zeros_if(hard_mask(args_));
    const auto loop = [&](const math::Excluded<T>& zeros) __attribute__((always_inline)) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) blend_[k] = math::blend(on_[k], off_[k], fg_[k], bg_[k], zeros);
    };
    of_mask.nothing() ? loop({}) : loop(of_mask);
    return blend_;
  }

  void gradients(int64_t p, int64_t n, int64_t c, T* d_mask) {
    const T* image = blend(c, p, n);
    const T* weight = this->load_weight(c, p, n);
    this->fill_upstream(c, p, n, upstream_);
    const T* per_nat = upstream_;
    const T* share = upstream_;  // of any value where nothing is left out
    if (weight) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) weight_[k] = upstream_[k] * weight[k];
      per_nat = weight_;
      share = magnitude_;
    }
    const math::Excluded<T> excluded = math::Excluded<T>::zeros_if(weight != nullptr);
    this->open_layer_gradients(c, p);
    loops_.gradient(image, target_, this->fg_scale_, per_nat, share, excluded, n, nll_,
                    blends_ ? d_blend_ : d_fg_);
    if (this->target_and_scale_grads_) {
      this->open_target_and_scale_gradients(c, p, n);
      loops_.others(image, target_, this->fg_scale_, per_nat, share, excluded, n, this->d_target_,
                    this->d_fg_scale_);
      this->close_target_and_scale_gradients(c, p, n, false);
    }
    if (blends_) layer_gradients(c, p, n, weight, d_mask);
    this->close_layer_gradients(c, p, n);
    this->store_weight_gradient(c, p, n, upstream_, nll_);
    if (!args_.partial) return;
    this->weigh_elements(weight, n, nll_);
    add_all(nll_, n, sums_[0]);
  }

  void layer_gradients(int64_t c, int64_t p, int64_t n, const T* weight, T* d_mask) {
    this->load_shares(c, p, n);
    if (weight) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        d_mask[k] += math::selected(math::blend_d_mask(fg_[k], bg_[k], d_blend_[k]), magnitude_[k], zeros_);
        magnitudes_[k] += magnitude_[k];
      }
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) d_mask[k] += math::blend_d_mask(fg_[k], bg_[k], d_blend_[k]);
    }
    const T *select_fg = this->select_fg_, *select_bg = this->select_bg_;
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      d_fg_[k] = math::chain(d_blend_[k], on_[k], select_fg[k], zeros_);
      d_bg_[k] = math::chain(d_blend_[k], off_[k], select_bg[k], zeros_);
    }
  }

  const bool blends_;
  alignas(64) Buffer<T> blend_, nll_, upstream_, weight_, d_blend_;
};

template <class T>
class MixtureLoss : Loss<T> {
  using Base = Loss<T>;
  using Base::args_, Base::loops_, Base::channels_, Base::group_, Base::sums_, Base::span;
  using Base::fg_, Base::bg_, Base::target_, Base::magnitude_, Base::zeros_;

 public:
  explicit MixtureLoss(const ReconstructionArgs& args)
      : Base(args, args.composition == Composition::mixture_independent || args.mask_per_channel
                       ? 1
                       : args.shape.size[1]) {}

  void forward(int64_t task) {
    this->locate(task);
    this->for_blocks(kBlock<T>, [&](int64_t p, int64_t n, int64_t c0) {
      components(p, n, c0);
      T* loss = this->open(this->loss_out_, args_.loss, c0, p);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) loss[k] = math::mixture(logit_[k], nats_fg_[k], nats_bg_[k]).value;
      this->weigh_elements(this->load_weight(c0, p, n), n, loss);
      if (args_.partial) add_all(loss, n, sums_[0]);
      this->loss_out_.close(args_.loss, span(c0, p, n));
    });
  }

  void gradients(int64_t task) {
    this->locate_gradients(task);
    this->for_blocks(kBlock<T>, [&](int64_t p, int64_t n, int64_t c) { gradients(p, n, c); });
  }

 private:
  // The logits, and the nats of both components, summed over the channels of the group.
  void components(int64_t p, int64_t n, int64_t c0) {
    logit_ = this->load(this->mask_in_, args_.mask, c0, p, n);
    for (int64_t c = c0; c < c0 + group_; ++c) {
      this->load_images(c, p, n);
      T* fg = c == c0 ? nats_fg_ : nll_fg_;
      T* bg = c == c0 ? nats_bg_ : nll_bg_;
      loops_.value(fg_, target_, this->fg_scale_, n, fg);
      loops_.value(bg_, target_, this->bg_scale_, n, bg);
      if (c == c0) continue;
      this->add(fg, n, nats_fg_);
      this->add(bg, n, nats_bg_);
    }
  }

  void gradients(int64_t p, int64_t n, int64_t c0) {
    components(p, n, c0);
    // The gradient of a mask of one channel is a sum over the channels of an independent mixture.
    const bool first = c0 == 0 || args_.mask_per_channel;
    const bool last = c0 + group_ == channels_ || args_.mask_per_channel;
    const int64_t mask_channel = args_.mask_per_channel ? c0 : 0;
    if (first) {
      d_logit_ = this->open(this->mask_out_, args_.grad_mask, mask_channel, p);
      for (int64_t k = 0; k < n; ++k) d_logit_[k] = T(0);
    }
    T* d_logit = d_logit_;
    this->fill_upstream(c0, p, n, upstream_);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const math::Mixture<T> m = math::mixture(logit_[k], nats_fg_[k], nats_bg_[k]);
      value_[k] = m.value;
      weight_fg_[k] = upstream_[k] * m.d_fg;
      weight_bg_[k] = upstream_[k] * m.d_bg;
      to_logit_[k] = upstream_[k] * m.d_logit;
    }
    const T* weight = this->load_weight(c0, p, n);
    this->store_weight_gradient(c0, p, n, upstream_, value_);
    for (T* x : {value_, weight_fg_, weight_bg_, to_logit_}) this->weigh_elements(weight, n, x);
    this->add(to_logit_, n, d_logit);
    if (args_.partial) add_all(value_, n, sums_[0]);
    if (last) this->mask_out_.close(args_.grad_mask, span(mask_channel, p, n));
    for (int64_t c = c0; c < c0 + group_; ++c) {
      if (group_ > 1) this->load_images(c, p, n);
      this->layer_gradients(c, p, n, {weight_fg_, weight_bg_, magnitude_, magnitude_, {zeros_, zeros_}},
                            nll_fg_, nll_bg_);
    }
  }

  const T* logit_ = nullptr;
  T* d_logit_ = nullptr;
  alignas(64) Buffer<T> nats_fg_, nats_bg_, nll_fg_, nll_bg_, weight_fg_,
      weight_bg_, upstream_, value_, to_logit_;
};

// Calls visit(loss) with the loss that the arguments describe.
template <class T, class Visit>
void with_loss(const ReconstructionArgs& args, Visit visit) {
  if (args.composition == Composition::masked) return visit(MaskedLoss<T>(args));
  if (args.composition == Composition::blended || args.composition == Composition::plain)
    return visit(BlendedLoss<T>(args));
  visit(MixtureLoss<T>(args));
}

template <class T>
void forward(const ReconstructionArgs& args, int64_t begin, int64_t end) {
  with_loss<T>(args, [&](auto&& loss) {
    for (int64_t task = begin; task < end; ++task) loss.forward(task);
  });
}

// The gradients and, if partial sums are wanted, the sums of the loss.
template <class T>
void gradients(const ReconstructionArgs& args, int64_t begin, int64_t end) {
  with_loss<T>(args, [&](auto&& loss) {
    for (int64_t task = begin; task < end; ++task) loss.gradients(task);
  });
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
