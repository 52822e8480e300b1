// Mixtures and blends of slots on the CPU.
//
// A task is a segment of the pixels of one sample, all slots and channels. A block of its pixels goes through
// stages, each a loop over rows in a cache: the masks, the nats of each slot, what is summed over the slots,
// and the gradients, for which the slots are read a second time, from the cache.
#include "../math/slots.h"

#include <algorithm>
#include <vector>

#include "kernel_table.h"
#include "likelihood_loops.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

// --- loops over the pixels of a block; rows never overlap -----------------------------------------

template <class T>
void fill(T value, int64_t n, T* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = value;
}

template <class T>
void add(const T* x, int64_t n, T* to) {
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] += x[i];
}

// The largest mask so far, and its slot.
template <class T>
void update_largest(const T* mask, T slot, int64_t n, T* largest, T* of) {
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const bool more = mask[i] > largest[i];
    largest[i] = more ? mask[i] : largest[i];
    of[i] = more ? slot : of[i];
  }
}

// Leaves out the nats of a slot that is excluded, and keeps the largest term so far. u = mask - base.
template <class T>
void update_largest_term(const T* mask, const T* base, T slot, int64_t n, T* nats, T* u_of, T* nats_of,
                         T* of) {
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const T u = mask[i] - base[i];
    const T here = math::selected(nats[i], math::slot_share(mask[i]), math::Excluded<T>::zeros_if(true));
    const bool more = math::relative_term(u, here, u_of[i], nats_of[i]) > T(0);
    nats[i] = here;
    u_of[i] = more ? u : u_of[i];
    nats_of[i] = more ? here : nats_of[i];
    of[i] = more ? slot : of[i];
  }
}

// What is known of a mixture while its slots are summed, for each pixel.
template <class T>
struct MixtureRows {
  T *base, *base_of;         // the largest logit, and its slot; 0 for log-masks
  T *u_of, *nats_of, *of;    // of the largest term
  T *terms, *masks, *gains;  // sums: s, z, and of m_k g_k (before it is divided by 1 + z)
};

// Adds slot k to the sums; writes its term and, of logits, its share e^u of the mask and its gain.
template <bool kLogits, bool kGradient, class T>
void add_slot(const T* mask, const T* nats, T slot, int64_t n, const MixtureRows<T>& rows, T* term, T* share,
              T* gain) {
  const MixtureRows<T> to = rows;
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const T u = mask[i] - to.base[i], present = math::slot_share(mask[i]);
    const T t = math::slot_term(math::relative_term(u, nats[i], to.u_of[i], to.nats_of[i]), present, nats[i]);
    term[i] = t;
    to.terms[i] += slot == to.of[i] ? T(0) : t;
    if constexpr (kLogits) {
      const T p = math::exp_minus_abs(u);
      to.masks[i] += slot == to.base_of[i] ? T(0) : p;
      if constexpr (kGradient) {
        const T g = math::slot_gain(nats[i], to.nats_of[i], present);
        share[i] = p;
        gain[i] = g;
        to.gains[i] += p * g;
      }
    }
  }
}

template <class T>
void mixture_values(const MixtureRows<T>& rows, int64_t n, T* value) {
  const MixtureRows<T> in = rows;
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i)
    value[i] = math::slot_mixture_loss(in.nats_of[i], in.u_of[i], in.masks[i], in.terms[i]);
}

template <class T>
void invert(const T* sum, int64_t n, T* to) {
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] = T(1) / (T(1) + sum[i]);
}

template <class T>
void invert_terms(const T* sum, const T* largest, int64_t n, T* to) {
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] = math::responsibility_per_term(sum[i], largest[i]);
}

// What an element of this weight adds, and what reaches it.
template <class T>
void weigh(const T* weight, int64_t n, T* value, T* upstream, T* d_weight) {
  constexpr auto zeros = math::Excluded<T>{math::Excluded<T>::kZeros};
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) {
    const T share = math::abs(weight[i]);
    d_weight[i] = math::selected(upstream[i] * value[i], share, zeros);
    value[i] = math::selected(weight[i] * value[i], share, zeros);
    upstream[i] = math::selected(weight[i] * upstream[i], share, zeros);
  }
}

// 0 where a slot is excluded, or the element is.
template <class T>
void present(const T* mask, const T* weight, int64_t n, T* share) {
  if (weight) {
    FGBG_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const T of_slot = math::slot_share(mask[i]);
      share[i] = weight[i] == T(0) ? T(0) : of_slot;
    }
  } else {
    FGBG_SIMD
    for (int64_t i = 0; i < n; ++i) share[i] = math::slot_share(mask[i]);
  }
}

template <class T>
void chain(const T* weight, const T* d, const T* share, int64_t n, T* to) {
  constexpr auto zeros = math::Excluded<T>{math::Excluded<T>::kZeros};
  FGBG_SIMD
  for (int64_t i = 0; i < n; ++i) to[i] = math::chain(weight[i], d[i], share[i], zeros);
}

// --- what mixtures and blends share ---------------------------------------------------------------

// A row of each of several operands.
template <class T>
class RowBuffers {
 public:
  RowBuffers(int64_t rows, int64_t block)
      : block_(block), memory_(static_cast<size_t>(rows * block + kAlign)) {}
  T* operator[](int64_t row) {
    const auto at = reinterpret_cast<uintptr_t>(memory_.data());
    return memory_.data() + (64 - at % 64) % 64 / sizeof(T) + row * block_;
  }

 private:
  static constexpr int64_t kAlign = 64 / sizeof(T);
  const int64_t block_;
  std::vector<T> memory_;
};

// Pixels of a block, whose rows are to stay in the second-level cache. In whole flushes of a sum.
template <class T>
int64_t block_of(int64_t rows) {
  constexpr int64_t kBytes = 128 << 10, kLeast = LaneSums<T>::kPacks * kLanes<T>;
  int64_t block = kBlock<T>;
  while (block > kLeast && block * rows * static_cast<int64_t>(sizeof(T)) > kBytes) block /= 2;
  return block;
}

std::vector<View> views_of(const SlotView& v, int64_t slots) {
  std::vector<View> views(static_cast<size_t>(v ? slots : 0), v.first);
  for (size_t k = 0; k < views.size(); ++k)
    views[k].data =
        static_cast<char*>(v.first.data) + static_cast<int64_t>(k) * v.stride * size_of(v.first.dtype);
  return views;
}

template <class T>
class SlotLoss {
 public:
  void run(int64_t task, bool gradients) {
    b_ = task / segments_;
    segment_ = task % segments_;
    if (gradients && args_.scale_partial) {
      scale_sums_ = args_.scale_partial + task;
      scale_step_ = shape_.size[0] * segments_;
      for (size_t k = 0; k < scales_.size(); ++k) scale_sums_[static_cast<int64_t>(k) * scale_step_] = 0.0;
    }
  }

 protected:
  // `group` channels share a mask value or a responsibility. `scales`: how many there are.
  SlotLoss(const SlotArgs& args, int64_t group, int64_t scales, int64_t rows)
      : args_(args),
        shape_(args.shape),
        loops_(likelihood_loops<T>(args.likelihood)),
        segments_(pixel_segments(args.shape)),
        channels_(args.shape.size[1]),
        slots_(args.slots),
        group_(group),
        block_(block_of<T>(rows)),
        others_(args.grad_target || args.scale_partial || args.grad_scale_map),
        x_(views_of(args.x, args.slots)),
        mask_(views_of(args.mask, args.slots)),
        grad_x_(views_of(args.grad_x, args.slots)),
        grad_mask_(views_of(args.grad_mask, args.slots)) {
    for (int64_t k = 0; k < scales; ++k) scales_.push_back(loops_.prepare(scale_at<T>(args.scale, k)));
  }

  // Calls body(p, n, c) for the blocks of the segment, pixels [p, p + n) of the channels [c, c + group_), and
  // stores the sum of the loss.
  template <class Body>
  void for_blocks(Body body) {
    constexpr int64_t kFlush = 2 * kBlock<T>;
    const int64_t end = min((segment_ + 1) * kSegment, shape_.plane);
    int64_t since_flush = 0;
    for (int64_t p = segment_ * kSegment; p < end; p += block_) {
      for (int64_t c = 0; c < channels_; c += group_) body(p, min(block_, end - p), c);
      since_flush += block_;
      if (since_flush < kFlush) continue;
      since_flush = 0;
      sum_.flush();
    }
    if (args_.partial) args_.partial[b_ * segments_ + segment_] = sum_.take();
  }

  Span span(int64_t c, int64_t p, int64_t n) const {
    return {shape_, b_ * shape_.row + c * shape_.plane + p, n};
  }
  int64_t offset(const View& v, int64_t c, int64_t p) const {
    return v.plane_stride == 1 ? b_ * v.stride[0] + c * v.stride[1] + p : -1;
  }
  bool in_place(const View& v) const { return v.plane_stride == 1 && v.dtype == dtype_of<T>(); }

  // A row where it is, or gathered into a buffer.
  const T* load(const View& v, int64_t c, int64_t p, int64_t n, T* buffer) const {
    const int64_t at = offset(v, c, p);
    if (at >= 0) prefetch_next(v, at, n);
    if (in_place(v)) return static_cast<const T*>(v.data) + at;
    gather(v, span(c, p, n), at, buffer);
    return buffer;
  }
  // Where to write a row: an absent one is written to the buffer, and dropped.
  T* open(const View& v, int64_t c, int64_t p, T* buffer) const {
    return v && in_place(v) ? static_cast<T*>(v.data) + offset(v, c, p) : buffer;
  }
  void close(const View& v, int64_t c, int64_t p, int64_t n, const T* row) const {
    if (v && !in_place(v)) scatter(row, v, span(c, p, n), offset(v, c, p));
  }
  static const View& view(const std::vector<View>& views, int64_t k) {
    static const View absent;
    return views.empty() ? absent : views[static_cast<size_t>(k)];
  }

  // The upstream gradient of each element of a loss; 0 in forward.
  void load_upstream(int64_t c, int64_t p, int64_t n, T* to) const {
    if (args_.grad_loss_elements) {
      const T* u = load(args_.grad_loss_elements, c, p, n, to);
      if (u != to) std::copy(u, u + n, to);
    } else {
      fill(args_.grad_loss ? upstream<T>(args_.grad_loss, b_) : T(0), n, to);
    }
  }

  void weigh_elements(const T* w, int64_t c, int64_t p, int64_t n, T* loss, T* up, T* buffer) const {
    T* d = open(args_.grad_weight, c, p, buffer);
    weigh(w, n, loss, up, d);
    close(args_.grad_weight, c, p, n, d);
  }

  // The scale of slot k (of a blend, channel k) or, from a map, of each element of a row. `buffers` are three
  // rows, of which the last two stay in use.
  BlockScale<T> load_scale(int64_t k, const View& map, int64_t c, int64_t p, int64_t n,
                           RowBuffers<T>& buffers, int64_t first) const {
    if (!map) return {scales_[scales_.size() == 1 ? 0 : static_cast<size_t>(k)]};
    const T* scale = load(map, c, p, n, buffers[first]);
    loops_.prepare_each(scale, n, buffers[first + 1], buffers[first + 2]);
    return {{}, buffers[first + 1], buffers[first + 2]};
  }

  // Adds up the gradients of scales.
  void add_scale_gradient(int64_t k, const T* d_scale, int64_t n) {
    if (args_.scale_partial) scale_sums_[(scales_.size() == 1 ? 0 : k) * scale_step_] += sum(d_scale, n);
  }

  const SlotArgs& args_;
  const Shape& shape_;
  const LikelihoodLoops<T>& loops_;
  const int64_t segments_, channels_, slots_, group_, block_;
  const bool others_;
  const std::vector<View> x_, mask_, grad_x_, grad_mask_;
  int64_t b_ = 0, segment_ = 0;
  LaneSums<T> sum_;
  std::vector<math::Scale<T>> scales_;

 private:
  double* scale_sums_ = nullptr;
  int64_t scale_step_ = 0;
};

// --- mixtures -------------------------------------------------------------------------------------

template <class T>
class SlotMixture : public SlotLoss<T> {
  using Base = SlotLoss<T>;
  using Base::args_, Base::loops_, Base::channels_, Base::slots_, Base::group_, Base::block_, Base::load,
      Base::open, Base::close, Base::view, Base::x_, Base::mask_, Base::grad_x_, Base::grad_mask_,
      Base::scales_;

 public:
  explicit SlotMixture(const SlotArgs& args)
      : Base(args, group_of(args), args.one_scale ? 1 : args.slots, args.slots * (group_of(args) + 4)),
        logits_(args.mask_kind == MaskKind::logits),
        responsibility_(views_of(args.responsibilities, args.slots)),
        scale_map_(views_of(args.scale_map, args.slots)),
        grad_scale_map_(views_of(args.grad_scale_map, args.slots)),
        x_rows_(slots_ * group_, block_),
        scale_rows_(args.scale_map ? 3 * slots_ * group_ : 0, block_),
        target_rows_(group_, block_),
        mask_rows_(slots_, block_),
        nats_rows_(slots_, block_),
        term_rows_(slots_, block_),
        share_rows_(slots_, block_),
        gain_rows_(slots_, block_),
        grad_target_rows_(group_, block_),
        rows_(kRows, block_),
        x_row_(static_cast<size_t>(slots_ * group_)),
        scale_(static_cast<size_t>(slots_ * group_)),
        target_row_(static_cast<size_t>(group_)),
        mask_row_(static_cast<size_t>(slots_)) {}

  template <bool kGradient>
  void run(int64_t task) {
    Base::run(task, kGradient);
    this->for_blocks([&](int64_t p, int64_t n, int64_t c) {
      logits_ ? block<true, kGradient>(p, n, c) : block<false, kGradient>(p, n, c);
    });
  }

 private:
  enum Row {
    base,
    base_of,
    u_of,
    nats_of,
    of,
    terms,
    masks,
    gains,
    value,
    up,
    weight,
    d_weight,
    per_term,
    per_mask,
    per_gain,
    responsibility,
    present,
    d_scale,
    d_mask,
    unused,
    kRows
  };

  static int64_t group_of(const SlotArgs& args) {
    return args.composition == Composition::mixture_joint ? args.shape.size[1] : 1;
  }
  T* row(Row which) { return rows_[which]; }

  template <bool kLogits, bool kGradient>
  void block(int64_t p, int64_t n, int64_t c0) {
    fill(T(0), n, row(base));
    if (kLogits) {
      fill(math::kNoMask<T>, n, row(base));
      fill(T(-1), n, row(base_of));
    }
    for (int64_t k = 0; k < slots_; ++k) {
      mask_row_[k] = load(view(mask_, k), c0, p, n, mask_rows_[k]);
      if (kLogits) update_largest(mask_row_[k], static_cast<T>(k), n, row(base), row(base_of));
    }
    fill(math::kNoMask<T>, n, row(u_of));
    fill(math::kNoNats<T>, n, row(nats_of));
    fill(T(-1), n, row(of));
    for (int64_t c = 0; c < group_; ++c) target_row_[c] = load(args_.target, c0 + c, p, n, target_rows_[c]);
    for (int64_t k = 0; k < slots_; ++k) {
      T* nats = nats_rows_[k];
      for (int64_t c = 0; c < group_; ++c) {
        const int64_t at = k * group_ + c;
        const T* x = x_row_[at] = load(view(x_, k), c0 + c, p, n, x_rows_[at]);
        scale_[at] = this->load_scale(k, view(scale_map_, k), c0 + c, p, n, scale_rows_, 3 * at);
        T* to = c == 0 ? nats : row(unused);
        loops_.value(x, target_row_[c], scale_[at], n, to);
        if (c > 0) add(to, n, nats);
      }
      update_largest_term(mask_row_[k], row(base), static_cast<T>(k), n, nats, row(u_of), row(nats_of),
                          row(of));
    }
    const MixtureRows<T> sums{row(base), row(base_of), row(u_of),  row(nats_of),
                              row(of),   row(terms),   row(masks), row(gains)};
    for (const Row sum : {terms, masks, gains}) fill(T(0), n, row(sum));
    for (int64_t k = 0; k < slots_; ++k)
      add_slot<kLogits, kGradient>(mask_row_[k], nats_rows_[k], static_cast<T>(k), n, sums, term_rows_[k],
                                   share_rows_[k], gain_rows_[k]);

    T* loss = open(args_.loss, c0, p, row(value));
    mixture_values(sums, n, loss);
    if (kGradient || !responsibility_.empty()) invert_terms(row(terms), row(of), n, row(per_term));
    if (!responsibility_.empty()) write_responsibilities(p, n, c0);
    const T* w = args_.weight ? load(args_.weight, c0, p, n, row(weight)) : nullptr;
    if (kGradient) this->load_upstream(c0, p, n, row(up));
    if (w) this->weigh_elements(w, c0, p, n, loss, row(up), row(d_weight));
    if (args_.partial) add_all(loss, n, this->sum_);
    close(args_.loss, c0, p, n, loss);
    if (kGradient) gradients<kLogits>(w, p, n, c0);
  }

  void write_responsibilities(int64_t p, int64_t n, int64_t c0) {
    for (int64_t k = 0; k < slots_; ++k) {
      T* to = open(view(responsibility_, k), c0, p, row(responsibility));
      responsibilities(k, n, to);
      close(view(responsibility_, k), c0, p, n, to);
    }
  }
  void responsibilities(int64_t k, int64_t n, T* to) {
    const T *term = term_rows_[k], *inverse = row(per_term), *mask = mask_row_[k];
    FGBG_SIMD
    for (int64_t i = 0; i < n; ++i)
      to[i] = math::slot_responsibility(term[i], inverse[i], math::slot_share(mask[i]));
  }

  template <bool kLogits>
  void gradients(const T* w, int64_t p, int64_t n, int64_t c0) {
    if (kLogits) {
      T *mean = row(gains), *inverse = row(per_mask), *of_gain = row(per_gain);
      invert(row(masks), n, inverse);
      FGBG_SIMD
      for (int64_t i = 0; i < n; ++i) {
        mean[i] *= inverse[i];
        of_gain[i] = T(1) / (T(1) + mean[i]);
      }
    }
    for (int64_t c = 0; c < group_ && this->others_; ++c)
      fill(T(0), n, open(args_.grad_target, c0 + c, p, grad_target_rows_[c]));
    for (int64_t k = 0; k < slots_; ++k) {
      cpu::present(mask_row_[k], w, n, row(present));
      mask_gradient<kLogits>(k, p, n, c0);
      slot_gradients(k, p, n, c0);
    }
    for (int64_t c = 0; c < group_ && this->others_; ++c)
      close(args_.grad_target, c0 + c, p, n, open(args_.grad_target, c0 + c, p, grad_target_rows_[c]));
  }

  // Also the responsibility of slot k, times what reaches the element.
  template <bool kLogits>
  void mask_gradient(int64_t k, int64_t p, int64_t n, int64_t c0) {
    const View& v = view(grad_mask_, k);
    T* to = open(v, c0, p, row(d_mask));
    const T *term = term_rows_[k], *share = share_rows_[k], *gain = gain_rows_[k], *u = row(up);
    const T *of_term = row(per_term), *of_mask = row(per_mask), *of_gain = row(per_gain), *mean = row(gains);
    const T* here = row(present);
    T* reaches = row(responsibility);
    constexpr auto zeros = math::Excluded<T>{math::Excluded<T>::kZeros};
    FGBG_SIMD
    for (int64_t i = 0; i < n; ++i) {
      const T r = math::slot_responsibility(term[i], of_term[i], here[i]);
      T d = -r;
      if constexpr (kLogits) d = math::slot_d_logit(share[i] * of_mask[i], r, gain[i], mean[i], of_gain[i]);
      reaches[i] = u[i] * r;
      to[i] = math::chain(u[i], d, here[i], zeros);
    }
    close(v, c0, p, n, to);
  }

  void slot_gradients(int64_t k, int64_t p, int64_t n, int64_t c0) {
    constexpr auto zeros = math::Excluded<T>{math::Excluded<T>::kZeros};
    for (int64_t c = 0; c < group_; ++c) {
      const T *x = x_row_[k * group_ + c], *target = target_row_[c], *reaches = row(responsibility);
      const View& v = view(grad_x_, k);
      if (v) {
        T* d_x = open(v, c0 + c, p, row(unused));
        loops_.gradient(x, target, scale_[k * group_ + c], reaches, row(present), zeros, n, row(value), d_x);
        close(v, c0 + c, p, n, d_x);
      }
      if (!this->others_) continue;
      const View& map = view(grad_scale_map_, k);
      T* d_target = open(args_.grad_target, c0 + c, p, grad_target_rows_[c]);
      T* d_s = open(map, c0 + c, p, row(d_scale));
      loops_.others(x, target, scale_[k * group_ + c], reaches, row(present), zeros, n, d_target, d_s);
      this->add_scale_gradient(k, d_s, n);
      close(map, c0 + c, p, n, d_s);
    }
  }

  const bool logits_;
  const std::vector<View> responsibility_, scale_map_, grad_scale_map_;
  RowBuffers<T> x_rows_, scale_rows_, target_rows_, mask_rows_, nats_rows_, term_rows_, share_rows_,
      gain_rows_, grad_target_rows_, rows_;
  std::vector<const T*> x_row_;
  std::vector<BlockScale<T>> scale_;
  std::vector<const T*> target_row_, mask_row_;
};

// --- blends ---------------------------------------------------------------------------------------

template <class T>
class SlotBlend : public SlotLoss<T> {
  using Base = SlotLoss<T>;
  using Base::args_, Base::loops_, Base::channels_, Base::slots_, Base::group_, Base::block_, Base::load,
      Base::open, Base::close, Base::view, Base::x_, Base::mask_, Base::grad_x_, Base::grad_mask_,
      Base::scales_;

 public:
  explicit SlotBlend(const SlotArgs& args)
      : Base(args, group_of(args), args.one_scale ? 1 : args.shape.size[1],
             args.slots * (group_of(args) + 4)),
        logits_(args.mask_kind == MaskKind::logits),
        x_rows_(slots_, block_),
        mask_rows_(slots_, block_),
        share_rows_(slots_, block_),
        sum_rows_(slots_, block_),
        scale_rows_(args.scale_map ? 3 : 0, block_),
        rows_(kRows, block_),
        x_row_(static_cast<size_t>(slots_)),
        mask_row_(static_cast<size_t>(slots_)) {}

  template <bool kGradient>
  void run(int64_t task) {
    Base::run(task, kGradient);
    this->for_blocks([&](int64_t p, int64_t n, int64_t c) { block<kGradient>(p, n, c); });
  }

 private:
  enum Row {
    base,
    base_of,
    masks,
    blend,
    target,
    value,
    up,
    weight,
    d_weight,
    d_blend,
    d_x,
    d_target,
    d_scale,
    share,
    reached,
    present,
    kRows
  };

  static int64_t group_of(const SlotArgs& args) { return args.mask_per_channel ? 1 : args.shape.size[1]; }
  T* row(Row which) { return rows_[which]; }

  // The shares of the slots: softmax of logits, or exponentials.
  void load_masks(int64_t p, int64_t n, int64_t c0) {
    fill(logits_ ? math::kNoMask<T> : T(0), n, row(base));
    fill(T(-1), n, row(base_of));
    for (int64_t k = 0; k < slots_; ++k) {
      mask_row_[k] = load(view(mask_, k), c0, p, n, mask_rows_[k]);
      if (logits_) update_largest(mask_row_[k], static_cast<T>(k), n, row(base), row(base_of));
    }
    fill(T(0), n, row(masks));
    for (int64_t k = 0; k < slots_; ++k) {
      const T *mask = mask_row_[k], *largest = row(base), *of = row(base_of), slot = static_cast<T>(k);
      T *share = share_rows_[k], *sum = row(masks);
      if (logits_) {
        FGBG_SIMD
        for (int64_t i = 0; i < n; ++i) {
          share[i] = math::exp_minus_abs(mask[i] - largest[i]);
          sum[i] += slot == of[i] ? T(0) : share[i];
        }
      } else {
        FGBG_SIMD
        for (int64_t i = 0; i < n; ++i) share[i] = math::exp(mask[i]);
      }
    }
    if (!logits_) return;
    invert(row(masks), n, row(masks));
    for (int64_t k = 0; k < slots_; ++k) {
      const T* inverse = row(masks);
      T* share = share_rows_[k];
      FGBG_SIMD
      for (int64_t i = 0; i < n; ++i) share[i] *= inverse[i];
    }
  }

  template <bool kGradient>
  void block(int64_t p, int64_t n, int64_t c0) {
    load_masks(p, n, c0);
    for (int64_t k = 0; k < slots_ && kGradient; ++k) fill(T(0), n, sum_rows_[k]);
    fill(T(0), n, row(reached));
    for (int64_t c = c0; c < c0 + group_; ++c) {
      add_up(c, p, n);
      const T* there = load(args_.target, c, p, n, row(target));
      T* loss = open(args_.loss, c, p, row(value));
      scale_ = this->load_scale(c, args_.scale_map.first, c, p, n, scale_rows_, 0);
      loops_.value(row(blend), there, scale_, n, loss);
      if (kGradient) this->load_upstream(c, p, n, row(up));
      const T* w = nullptr;
      if (args_.weight) {
        w = load(args_.weight, c, p, n, row(weight));
        this->weigh_elements(w, c, p, n, loss, row(up), row(d_weight));
      }
      if (args_.partial) add_all(loss, n, this->sum_);
      close(args_.loss, c, p, n, loss);
      if (kGradient) gradients(w, there, c, p, n);
    }
    for (int64_t k = 0; k < slots_ && kGradient; ++k) mask_gradient(k, p, n, c0);
  }

  // The blend of channel c.
  void add_up(int64_t c, int64_t p, int64_t n) {
    fill(T(0), n, row(blend));
    for (int64_t k = 0; k < slots_; ++k) {
      const T* x = x_row_[k] = load(view(x_, k), c, p, n, x_rows_[k]);
      const T *mask = mask_row_[k], *share = share_rows_[k];
      T* to = row(blend);
      FGBG_SIMD
      for (int64_t i = 0; i < n; ++i) to[i] += math::blend_term(share[i], x[i], math::slot_share(mask[i]));
    }
  }

  void gradients(const T* w, const T* there, int64_t c, int64_t p, int64_t n) {
    constexpr auto zeros = math::Excluded<T>{math::Excluded<T>::kZeros};
    const T* of_element = row(up);  // its share, if weights leave something out
    math::Excluded<T> excluded{};
    if (w) {
      of_element = absolute(w, n);
      excluded = zeros;
    }
    loops_.gradient(row(blend), there, scale_, row(up), of_element, excluded, n, row(d_x), row(d_blend));
    if (this->others_) {
      T* d = open(args_.grad_target, c, p, row(d_target));
      T* d_s = open(args_.grad_scale_map.first, c, p, row(d_scale));
      fill(T(0), n, d);
      loops_.others(row(blend), there, scale_, row(up), of_element, excluded, n, d, d_s);
      close(args_.grad_target, c, p, n, d);
      this->add_scale_gradient(c, d_s, n);
      close(args_.grad_scale_map.first, c, p, n, d_s);
    }
    for (int64_t k = 0; k < slots_; ++k) {
      const T *x = x_row_[k], *share = share_rows_[k], *mask = mask_row_[k], *d = row(d_blend);
      const T* base = row(blend);
      T* sum = sum_rows_[k];
      const View& v = view(grad_x_, k);
      T* to = open(v, c, p, row(d_x));
      cpu::present(mask, w, n, row(present));
      const T* here = row(present);
      const T of_base = logits_ ? T(1) : T(0);
      FGBG_SIMD
      for (int64_t i = 0; i < n; ++i) {
        to[i] = math::chain(d[i], share[i], here[i], zeros);
        sum[i] += math::selected(math::blend_d_share(x[i], of_base * base[i], d[i]), here[i], zeros);
      }
      close(v, c, p, n, to);
    }
  }

  // The absolute weights of a channel, which are added up for those that share a mask.
  const T* absolute(const T* w, int64_t n) {
    T *to = row(share), *sum = row(reached);
    FGBG_SIMD
    for (int64_t i = 0; i < n; ++i) {
      to[i] = math::abs(w[i]);
      sum[i] += to[i];
    }
    return to;
  }

  void mask_gradient(int64_t k, int64_t p, int64_t n, int64_t c0) {
    const View& v = view(grad_mask_, k);
    T* to = open(v, c0, p, row(d_x));
    cpu::present<T>(mask_row_[k], args_.weight ? row(reached) : nullptr, n, row(present));
    chain(share_rows_[k], sum_rows_[k], row(present), n, to);
    close(v, c0, p, n, to);
  }

  const bool logits_;
  RowBuffers<T> x_rows_, mask_rows_, share_rows_, sum_rows_, scale_rows_, rows_;
  std::vector<const T*> x_row_, mask_row_;
  BlockScale<T> scale_{};
};

template <class T, bool kGradient>
void run(const SlotArgs& args, int64_t begin, int64_t end) {
  const auto all = [&](auto&& loss) {
    for (int64_t task = begin; task < end; ++task) loss.template run<kGradient>(task);
  };
  args.composition == Composition::blended ? all(SlotBlend<T>(args)) : all(SlotMixture<T>(args));
}

int64_t tasks(const SlotArgs& args) { return args.shape.size[0] * pixel_segments(args.shape); }
int64_t cost(const SlotArgs& args) {
  return min(kSegment, args.shape.plane) * args.shape.size[1] * args.slots;
}

}  // namespace

void add_slots(Kernels& table) {
  table.slots_forward = {tasks, cost, {run<float, false>, run<double, false>}};
  table.slots_backward = {tasks, cost, {run<float, true>, run<double, true>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
