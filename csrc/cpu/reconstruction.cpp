// Masked, blended and mixture reconstruction losses on the CPU.
//
// A task is a segment of the pixels of one sample, all channels. Within it a block of pixels goes
// through three kinds of stage, each a loop over a buffer in the first-level cache: the mask (once per
// pixel), the likelihood (once per region and channel), and what combines them. Stages rather than one
// fused loop: the likelihood loops are then the only code that is multiplied by the list of likelihoods.
#include "../math/likelihood.h"
#include "memory.h"
#include "tables.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

template <class T>
struct LikelihoodLoops {
  math::Scale<T> (*prepare)(T scale);
  // value[k] = -log p(target[k] | x[k])
  void (*value)(const T* x, const T* target, math::Scale<T> s, int64_t n, T* value);
  // The derivatives of w[k] * value[k]; d_target is added to.
  void (*gradient)(const T* x, const T* target, math::Scale<T> s, const T* w, int64_t n, T* value, T* d_x,
                   T* d_target, T* d_scale);
};

template <class L, class T>
void value_loop(const T* x, const T* target, math::Scale<T> s, int64_t n, T* value) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) value[k] = L::eval(x[k], target[k], s).value;
}

template <class L, class T>
void gradient_loop(const T* x, const T* target, math::Scale<T> s, const T* w, int64_t n, T* value, T* d_x,
                   T* d_target, T* d_scale) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) {
    const math::Nll<T> nll = L::eval(x[k], target[k], s);
    value[k] = nll.value;
    d_x[k] = w[k] * nll.d_x;
    d_target[k] += w[k] * nll.d_target;
    d_scale[k] = w[k] * nll.d_scale;
  }
}

template <class T>
const LikelihoodLoops<T>& loops(Likelihood likelihood) {
#define FGBG_ENTRY(L, name) {math::L::prepare<T>, value_loop<math::L, T>, gradient_loop<math::L, T>},
  static const LikelihoodLoops<T> table[] = {FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)};
#undef FGBG_ENTRY
  return table[static_cast<int>(likelihood)];
}

template <class T>
using Buffer = T[kBlock<T>];

template <class T>
class Pass {
 public:
  explicit Pass(const ReconstructionArgs& args)
      : args_(args),
        shape_(args.shape),
        loops_(loops<T>(args.likelihood)),
        segments_(pixel_segments(args.shape)) {}

  void forward(int64_t task) {
    locate(task);
    double total[kTerms] = {};
    for_blocks([&](int64_t p, int64_t n) {
      switch (args_.composition) {
        case Composition::masked: masked_forward(p, n, total); break;
        case Composition::blended: blended_forward(p, n, total); break;
        case Composition::mixture_joint: mixture_forward(p, n, 0, shape_.size[1], total); break;
        case Composition::mixture_independent:
          for (int64_t c = 0; c < shape_.size[1]; ++c) mixture_forward(p, n, c, c + 1, total);
      }
    });
    if (args_.partial)
      for (int t = 0; t < kTerms; ++t)
        args_.partial[(t * shape_.size[0] + b_) * segments_ + segment_] = total[t];
  }

  void backward(int64_t task) {
    locate(task);
    const T g = upstream<T>(args_.grad_loss, b_);
    const T channels = static_cast<T>(shape_.size[1]);
    const auto slope = math::region_loss_gradient<T>(
        {term(args_.terms, 0), term(args_.terms, 1), term(args_.terms, 2), term(args_.terms, 3)},
        static_cast<T>(args_.fg_weight), static_cast<T>(args_.bg_weight), args_.normalize_area, channels);
    const bool elements = static_cast<bool>(args_.grad_loss_elements);
    per_fg_ = elements ? static_cast<T>(args_.fg_weight) : g * slope.fg;
    per_bg_ = elements ? static_cast<T>(args_.bg_weight) : g * slope.bg;
    term_fg_ = term(args_.grad_terms, 0);
    term_bg_ = term(args_.grad_terms, 1);
    // Per pixel of area; a mask with channels has 1/C of a pixel in each.
    per_area_ = g * (slope.fg_area - slope.bg_area) + term(args_.grad_terms, 2) - term(args_.grad_terms, 3);
    if (args_.mask_per_channel) per_area_ /= channels;
    per_loss_ = elements ? T(1) : g;
    if (args_.scale_partial) {
      scale_sums_ = args_.scale_partial + task;
      scale_step_ = shape_.size[0] * segments_;
      for (int64_t k = 0; k < 2 * shape_.size[1]; ++k) scale_sums_[k * scale_step_] = 0.0;
    }
    for_blocks([&](int64_t p, int64_t n) {
      switch (args_.composition) {
        case Composition::masked: masked_backward(p, n); break;
        case Composition::blended: blended_backward(p, n); break;
        case Composition::mixture_joint: mixture_backward(p, n, 0, shape_.size[1]); break;
        case Composition::mixture_independent:
          for (int64_t c = 0; c < shape_.size[1]; ++c) mixture_backward(p, n, c, c + 1);
      }
    });
  }

 private:
  void locate(int64_t task) {
    b_ = task / segments_;
    segment_ = task % segments_;
  }

  template <class Body>
  void for_blocks(Body body) {
    const int64_t end = min((segment_ + 1) * kSegment, shape_.plane);
    for (int64_t p = segment_ * kSegment; p < end; p += kBlock<T>) body(p, min(kBlock<T>, end - p));
  }

  // Logical index of pixel p of channel c.
  int64_t at(int64_t c, int64_t p) const { return b_ * shape_.row + c * shape_.plane + p; }
  T term(const void* terms, int t) const {
    return terms ? static_cast<const T*>(terms)[t * shape_.size[0] + b_] : T(0);
  }

  const T* load(Input<T>& in, const View& v, int64_t c, int64_t p, int64_t n) {
    return in.load(v, shape_, at(c, p), n);
  }

  // Loads fg, bg and target of a channel.
  void load_images(int64_t c, int64_t p, int64_t n) {
    fg_ = load(fg_in_, args_.fg, c, p, n);
    bg_ = args_.bg ? load(bg_in_, args_.bg, c, p, n) : fg_;
    target_ = load(target_in_, args_.target, c, p, n);
    fg_scale_ = loops_.prepare(scale_at<T>(args_.fg_scale, c));
    bg_scale_ = loops_.prepare(scale_at<T>(args_.bg_scale, c));
  }

  // on_, off_, slope_: mask, 1 - mask, d mask / d input. Once per pixel if the mask has one channel.
  void load_mask(int64_t c, int64_t p, int64_t n) {
    if (c > 0 && !args_.mask_per_channel) return;
    mask_ = load(mask_in_, args_.mask, c, p, n);
    if (args_.mask_kind == MaskKind::logits) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const math::Mask<T> m = math::mask_from_logit(mask_[k]);
        on_[k] = m.on;
        off_[k] = m.off;
        slope_[k] = m.slope;
      }
    } else {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        on_[k] = mask_[k];
        off_[k] = T(1) - mask_[k];
        slope_[k] = T(1);
      }
    }
  }

  // What arrives at each element of an unreduced loss, else one number.
  const T* load_upstream(int64_t c, int64_t p, int64_t n) {
    if (!args_.grad_loss_elements) {
      for (int64_t k = 0; k < n; ++k) upstream_[k] = T(1);
      return upstream_;
    }
    // A joint mixture has one loss per pixel; its View has stride 0 over the channels.
    return load(upstream_in_, args_.grad_loss_elements, c, p, n);
  }

  void add(double* sums, int term, const T* x, int64_t n) { sums[term] += static_cast<double>(sum(x, n)); }

  // d(loss)/d(mask) accumulates over the channels of a mask that has one.
  void open_mask_gradient(int64_t c, int64_t p, int64_t n) {
    if (c > 0 && !args_.mask_per_channel) return;
    d_mask_ = mask_out_.open(args_.grad_mask, shape_, at(c, p), n);
    for (int64_t k = 0; k < n; ++k) d_mask_[k] = T(0);
  }
  void close_mask_gradient(int64_t c, int64_t p, int64_t n) {
    const bool last = c + 1 == shape_.size[1];
    if (args_.mask_per_channel) mask_out_.close(args_.grad_mask, shape_, at(c, p), n);
    if (!args_.mask_per_channel && last) mask_out_.close(args_.grad_mask, shape_, at(0, p), n);
  }

  void open_gradients(int64_t c, int64_t p, int64_t n) {
    d_fg_ = fg_out_.open(args_.grad_fg, shape_, at(c, p), n);
    d_bg_ = bg_out_.open(args_.grad_bg, shape_, at(c, p), n);
    d_target_ = target_out_.open(args_.grad_target, shape_, at(c, p), n);
    for (int64_t k = 0; k < n; ++k) d_target_[k] = T(0);
  }
  void close_gradients(int64_t c, int64_t p, int64_t n) {
    if (!args_.bg) {
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) d_fg_[k] += d_bg_[k];
    }
    fg_out_.close(args_.grad_fg, shape_, at(c, p), n);
    bg_out_.close(args_.grad_bg, shape_, at(c, p), n);
    target_out_.close(args_.grad_target, shape_, at(c, p), n);
    if (scale_sums_) {
      scale_sums_[c * scale_step_] += static_cast<double>(sum(d_fg_scale_, n));
      scale_sums_[(shape_.size[1] + c) * scale_step_] += static_cast<double>(sum(d_bg_scale_, n));
    }
  }

  // Both regions' derivatives, each weighted per pixel by weight_fg_ / weight_bg_.
  void region_gradients(int64_t n) {
    loops_.gradient(fg_, target_, fg_scale_, weight_fg_, n, value_fg_, d_fg_, d_target_, d_fg_scale_);
    loops_.gradient(bg_, target_, bg_scale_, weight_bg_, n, value_bg_, d_bg_, d_target_, d_bg_scale_);
  }

  void masked_forward(int64_t p, int64_t n, double* total) {
    for (int64_t c = 0; c < shape_.size[1]; ++c) {
      load_images(c, p, n);
      load_mask(c, p, n);
      loops_.value(fg_, target_, fg_scale_, n, value_fg_);
      loops_.value(bg_, target_, bg_scale_, n, value_bg_);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        value_fg_[k] *= on_[k];
        value_bg_[k] *= off_[k];
      }
      if (args_.loss) {
        const T fg_weight = static_cast<T>(args_.fg_weight), bg_weight = static_cast<T>(args_.bg_weight);
        T* loss = loss_out_.open(args_.loss, shape_, at(c, p), n);
        FGBG_SIMD
        for (int64_t k = 0; k < n; ++k) loss[k] = fg_weight * value_fg_[k] + bg_weight * value_bg_[k];
        loss_out_.close(args_.loss, shape_, at(c, p), n);
      }
      if (!args_.partial) continue;
      add(total, 0, value_fg_, n);
      add(total, 1, value_bg_, n);
      if (c == 0 || args_.mask_per_channel) {
        const double share = args_.mask_per_channel ? 1.0 / static_cast<double>(shape_.size[1]) : 1.0;
        total[2] += share * static_cast<double>(sum(on_, n));
        total[3] += share * static_cast<double>(sum(off_, n));
      }
    }
  }

  void masked_backward(int64_t p, int64_t n) {
    for (int64_t c = 0; c < shape_.size[1]; ++c) {
      load_images(c, p, n);
      load_mask(c, p, n);
      const T* u = load_upstream(c, p, n);
      const T per_fg = per_fg_, per_bg = per_bg_, term_fg = term_fg_, term_bg = term_bg_;
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        weight_fg_[k] = (u[k] * per_fg + term_fg) * on_[k];
        weight_bg_[k] = (u[k] * per_bg + term_bg) * off_[k];
      }
      open_gradients(c, p, n);
      open_mask_gradient(c, p, n);
      region_gradients(n);
      const T per_area = c == 0 || args_.mask_per_channel ? per_area_ : T(0);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k)
        d_mask_[k] += slope_[k] * ((u[k] * per_fg + term_fg) * value_fg_[k] -
                                   (u[k] * per_bg + term_bg) * value_bg_[k] + per_area);
      close_gradients(c, p, n);
      close_mask_gradient(c, p, n);
    }
  }

  void blend(int64_t c, int64_t p, int64_t n) {
    load_images(c, p, n);
    load_mask(c, p, n);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) blend_[k] = on_[k] * fg_[k] + off_[k] * bg_[k];
  }

  void blended_forward(int64_t p, int64_t n, double* total) {
    for (int64_t c = 0; c < shape_.size[1]; ++c) {
      blend(c, p, n);
      T* loss = loss_out_.open(args_.loss, shape_, at(c, p), n);
      loops_.value(blend_, target_, fg_scale_, n, loss);
      if (args_.partial) add(total, 0, loss, n);
      loss_out_.close(args_.loss, shape_, at(c, p), n);
    }
  }

  void blended_backward(int64_t p, int64_t n) {
    for (int64_t c = 0; c < shape_.size[1]; ++c) {
      blend(c, p, n);
      const T* u = load_upstream(c, p, n);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        weight_fg_[k] = u[k] * per_loss_;
        d_bg_scale_[k] = T(0);
      }
      open_gradients(c, p, n);
      open_mask_gradient(c, p, n);
      loops_.gradient(blend_, target_, fg_scale_, weight_fg_, n, value_fg_, value_bg_, d_target_,
                      d_fg_scale_);
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        const T d_blend = value_bg_[k];
        d_mask_[k] += slope_[k] * (fg_[k] - bg_[k]) * d_blend;
        d_fg_[k] = on_[k] * d_blend;
        d_bg_[k] = off_[k] * d_blend;
      }
      close_gradients(c, p, n);
      close_mask_gradient(c, p, n);
    }
  }

  // Nats of both components, summed over channels [c0, c1), in sum_fg_ and sum_bg_.
  void mixture_components(int64_t p, int64_t n, int64_t c0, int64_t c1) {
    mask_ = load(mask_in_, args_.mask, c0, p, n);
    for (int64_t c = c0; c < c1; ++c) {
      load_images(c, p, n);
      T* fg = c == c0 ? sum_fg_ : value_fg_;
      T* bg = c == c0 ? sum_bg_ : value_bg_;
      loops_.value(fg_, target_, fg_scale_, n, fg);
      loops_.value(bg_, target_, bg_scale_, n, bg);
      if (c == c0) continue;
      FGBG_SIMD
      for (int64_t k = 0; k < n; ++k) {
        sum_fg_[k] += value_fg_[k];
        sum_bg_[k] += value_bg_[k];
      }
    }
  }

  void mixture_forward(int64_t p, int64_t n, int64_t c0, int64_t c1, double* total) {
    mixture_components(p, n, c0, c1);
    T* loss = loss_out_.open(args_.loss, shape_, at(c0, p), n);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) loss[k] = math::mixture(mask_[k], sum_fg_[k], sum_bg_[k]).value;
    if (args_.partial) add(total, 0, loss, n);
    loss_out_.close(args_.loss, shape_, at(c0, p), n);
  }

  void mixture_backward(int64_t p, int64_t n, int64_t c0, int64_t c1) {
    mixture_components(p, n, c0, c1);
    const T* u = load_upstream(c0, p, n);
    open_mask_gradient(c0, p, n);
    FGBG_SIMD
    for (int64_t k = 0; k < n; ++k) {
      const math::Mixture<T> m = math::mixture(mask_[k], sum_fg_[k], sum_bg_[k]);
      const T weight = u[k] * per_loss_;
      weight_fg_[k] = weight * m.d_fg;
      weight_bg_[k] = weight * m.d_bg;
      d_mask_[k] += weight * m.d_logit;
    }
    close_mask_gradient(c1 - 1, p, n);
    for (int64_t c = c0; c < c1; ++c) {
      if (c1 - c0 > 1) load_images(c, p, n);
      open_gradients(c, p, n);
      region_gradients(n);
      close_gradients(c, p, n);
    }
  }

  const ReconstructionArgs& args_;
  const Shape& shape_;
  const LikelihoodLoops<T>& loops_;
  const int64_t segments_;
  int64_t b_ = 0, segment_ = 0;
  T per_fg_ = 0, per_bg_ = 0, term_fg_ = 0, term_bg_ = 0, per_area_ = 0, per_loss_ = 0;
  double* scale_sums_ = nullptr;
  int64_t scale_step_ = 0;
  math::Scale<T> fg_scale_{}, bg_scale_{};
  Input<T> fg_in_, bg_in_, target_in_, mask_in_, upstream_in_;
  const T *fg_ = nullptr, *bg_ = nullptr, *target_ = nullptr, *mask_ = nullptr;
  Output<T> loss_out_, fg_out_, bg_out_, target_out_, mask_out_;
  T *d_fg_ = nullptr, *d_bg_ = nullptr, *d_target_ = nullptr, *d_mask_ = nullptr;
  alignas(64) Buffer<T> on_, off_, slope_, upstream_, blend_;
  alignas(64) Buffer<T> value_fg_, value_bg_, sum_fg_, sum_bg_, weight_fg_, weight_bg_, d_fg_scale_,
      d_bg_scale_;
};

template <class T>
void forward(const ReconstructionArgs& args, int64_t begin, int64_t end) {
  Pass<T> pass(args);
  for (int64_t task = begin; task < end; ++task) pass.forward(task);
}

template <class T>
void backward(const ReconstructionArgs& args, int64_t begin, int64_t end) {
  Pass<T> pass(args);
  for (int64_t task = begin; task < end; ++task) pass.backward(task);
}

int64_t tasks(const ReconstructionArgs& args) { return args.shape.size[0] * pixel_segments(args.shape); }
int64_t cost(const ReconstructionArgs& args) { return min(kSegment, args.shape.plane) * args.shape.size[1]; }

}  // namespace

void add_reconstruction(Kernels& table) {
  table.reconstruction_forward = {tasks, cost, {forward<float>, forward<double>}};
  table.reconstruction_backward = {tasks, cost, {backward<float>, backward<double>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
