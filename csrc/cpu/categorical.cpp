// The KL of K outcomes on the CPU. The groups of outcomes are the lanes of a vector: a block of them is
// gathered outcome by outcome, whatever dimension these lie along.
#include "../math/categorical.h"

#include <type_traits>
#include <vector>

#include "kernel_table.h"
#include "rows.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

// Outcome k of every group.
View outcome(const View& v, int64_t step, int64_t k) {
  View out = v;
  out.data = static_cast<char*>(v.data) + k * step * size_of(v.dtype);
  return out;
}

// Transposes 4 x 4 numbers.
template <class T>
inline void transpose4(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  if constexpr (sizeof(T) == 4) {
    typedef float Four __attribute__((vector_size(16)));
    typedef int32_t Order __attribute__((vector_size(16)));
    Four a, b, c, d;
    std::memcpy(&a, from, 16);
    std::memcpy(&b, from + from_stride, 16);
    std::memcpy(&c, from + 2 * from_stride, 16);
    std::memcpy(&d, from + 3 * from_stride, 16);
    constexpr Order kLow = {0, 4, 1, 5}, kHigh = {2, 6, 3, 7};
    const Four ac_low = __builtin_shuffle(a, c, kLow), ac_high = __builtin_shuffle(a, c, kHigh);
    const Four bd_low = __builtin_shuffle(b, d, kLow), bd_high = __builtin_shuffle(b, d, kHigh);
    const Four rows[4] = {__builtin_shuffle(ac_low, bd_low, kLow), __builtin_shuffle(ac_low, bd_low, kHigh),
                          __builtin_shuffle(ac_high, bd_high, kLow),
                          __builtin_shuffle(ac_high, bd_high, kHigh)};
    for (int k = 0; k < 4; ++k) std::memcpy(to + k * to_stride, &rows[k], 16);
  } else {
    for (int k = 0; k < 4; ++k)
      for (int g = 0; g < 4; ++g) to[k * to_stride + g] = from[g * from_stride + k];
  }
}

// A matrix of `rows` times `columns`.
template <class T>
inline void transpose(const T* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
                      int64_t to_stride) {
  const int64_t whole_rows = rows / 4 * 4, whole_columns = columns / 4 * 4;
  for (int64_t g = 0; g < whole_rows; g += 4)
    for (int64_t k = 0; k < whole_columns; k += 4)
      transpose4(from + g * from_stride + k, from_stride, to + k * to_stride + g, to_stride);
  for (int64_t g = 0; g < rows; ++g)
    for (int64_t k = g < whole_rows ? whole_columns : 0; k < columns; ++k)
      to[k * to_stride + g] = from[g * from_stride + k];
}

// Whether the groups follow each other, and within each its outcomes: a dense last dimension.
inline bool dense_groups(const View& v, int64_t step, int64_t outcomes, const Shape& shape) {
  int64_t expected = outcomes;
  bool dense = step == 1;
  for (int d = kDims - 1; d >= 0; --d) {
    dense &= shape.size[d] == 1 || v.stride[d] == expected;
    expected *= shape.size[d];
  }
  return dense;
}

// As many groups as fit the second-level cache several times, a multiple of the lanes of a vector.
template <class T>
int64_t lanes_for(int64_t outcomes) {
  const int64_t fit = kBlock<T> * 8 / (outcomes > 0 ? outcomes : 1) / 16 * 16;
  return fit < 16 ? 16 : min(fit, kBlock<T>);
}

template <class T, bool kPrior>
class Groups {
 public:
  explicit Groups(const CategoricalArgs& args)
      : args_(args),
        lanes_(lanes_for<T>(args.outcomes)),
        numbers_(static_cast<size_t>(5 * lanes_ * outcomes())) {
    T* at = numbers_.data();
    for (T** buffer : {&a_, &b_, &p_, &x_, &staged_}) {
      *buffer = at;
      at += lanes_ * outcomes();
    }
  }
  int64_t lanes() const { return lanes_; }

  // The KL of groups [i, i + n), n <= lanes().
  void kl(int64_t i, int64_t n, T* kl) {
    const Span span{args_.shape, i, n};
    load(args_.logits, args_.logits_step, span, a_);
    if (kPrior) load(args_.prior, args_.prior_step, span, b_);
    find_largest(n);
    weigh(n);
    compare(n, kl);
    bool any = false;
    for (int64_t g = 0; g < n; ++g) any |= far_[g] != T(0);
    if (any) compare_far(n, kl);
  }

  // And its gradients, times `upstream`.
  void gradients(int64_t i, int64_t n, const T* kl, const T* upstream) {
    const Span span{args_.shape, i, n};
    if (args_.grad_logits) {
      for (int64_t k = 0; k < outcomes(); ++k) {
        const T *p = row(p_, k), *x = row(x_, k);
        T* to = row(a_, k);
        FGBG_SIMD
        for (int64_t g = 0; g < n; ++g) to[g] = upstream[g] * math::d_outcome_logit(p[g], x[g]);
      }
      store(a_, args_.grad_logits, args_.grad_logits_step, span);
    }
    if (args_.grad_prior) {
      for (int64_t k = 0; k < outcomes(); ++k) {
        const T *p = row(p_, k), *x = row(x_, k);
        T* to = row(b_, k);  // which has q where an outcome is far
        FGBG_SIMD
        for (int64_t g = 0; g < n; ++g) to[g] = upstream[g] * math::d_outcome_prior(p[g], x[g], kl[g], to[g]);
      }
      store(b_, args_.grad_prior, args_.grad_prior_step, span);
    }
  }

 private:
  int64_t outcomes() const { return args_.outcomes; }
  T* row(T* buffer, int64_t k) const { return buffer + k * lanes_; }

  void load(const View& from, int64_t step, const Span& span, T* to) const {
    if (dense_groups(from, step, outcomes(), span.shape)) {
      const int64_t first = span.index * outcomes(), n = span.n * outcomes();
      with_storage(from.dtype, [&](auto storage) {
        using Storage = decltype(storage);
        const auto* data = static_cast<const Storage*>(from.data) + first;
        if constexpr (std::is_same_v<Storage, T>) {
          transpose(data, outcomes(), span.n, outcomes(), to, lanes_);
        } else {
          widen_all<T>(data, 1, n, staged_);
          transpose(staged_, outcomes(), span.n, outcomes(), to, lanes_);
        }
      });
      return;
    }
    for (int64_t k = 0; k < outcomes(); ++k) {
      const View v = outcome(from, step, k);
      gather(v, span, consecutive(v, span), row(to, k));
    }
  }
  void store(T* from, const View& to, int64_t step, const Span& span) const {
    if (dense_groups(to, step, outcomes(), span.shape)) {
      const int64_t first = span.index * outcomes(), n = span.n * outcomes();
      with_storage(to.dtype, [&](auto storage) {
        using Storage = decltype(storage);
        auto* data = static_cast<Storage*>(to.data) + first;
        if constexpr (std::is_same_v<Storage, T>) {
          transpose(from, lanes_, outcomes(), span.n, data, outcomes());
        } else if constexpr (sizeof(Storage) > 1) {
          transpose(from, lanes_, outcomes(), span.n, staged_, outcomes());
          narrow_all(staged_, 1, n, data);
        }
      });
      return;
    }
    for (int64_t k = 0; k < outcomes(); ++k) {
      const View v = outcome(to, step, k);
      scatter(row(from, k), v, span, consecutive(v, span));
    }
  }

  // The largest logit, and the difference from the prior's there.
  void find_largest(int64_t n) {
    for (int64_t g = 0; g < n; ++g) largest_[g] = -math::kInf<T>, shift_[g] = T(0);
    for (int64_t k = 0; k < outcomes(); ++k) {
      const T *a = row(a_, k), *b = row(b_, k);
      FGBG_SIMD
      for (int64_t g = 0; g < n; ++g) {
        const bool more = a[g] > largest_[g];
        largest_[g] = more ? a[g] : largest_[g];
        if (kPrior) shift_[g] = more ? a[g] - b[g] : shift_[g];
      }
    }
  }

  // p and x as yet without the sums that they are relative to.
  void weigh(int64_t n) {
    for (int64_t g = 0; g < n; ++g) total_[g] = mean_[g] = T(0);
    for (int64_t k = 0; k < outcomes(); ++k) {
      const T *a = row(a_, k), *b = row(b_, k);
      T *p = row(p_, k), *x = row(x_, k);
      FGBG_SIMD
      for (int64_t g = 0; g < n; ++g) {
        const T weight = math::outcome_weight(a[g], largest_[g]);
        const T d = kPrior ? (a[g] - b[g]) - shift_[g] : a[g] - largest_[g];
        total_[g] += weight;
        mean_[g] += math::outcome_mean(weight, d);
        p[g] = weight;
        x[g] = d;
      }
    }
  }

  void compare(int64_t n, T* kl) {
    FGBG_SIMD
    for (int64_t g = 0; g < n; ++g) {
      inverse_[g] = T(1) / total_[g];
      mean_[g] *= inverse_[g];
      kl[g] = far_[g] = T(0);
    }
    for (int64_t k = 0; k < outcomes(); ++k) {
      T *p = row(p_, k), *x = row(x_, k);
      FGBG_SIMD
      for (int64_t g = 0; g < n; ++g) {
        p[g] *= inverse_[g];
        x[g] = mean_[g] - x[g];
        kl[g] += math::outcome_growth(p[g], x[g]);
        far_[g] = x[g] < math::kFar<T> ? far_[g] : T(1);
      }
    }
    FGBG_SIMD
    for (int64_t g = 0; g < n; ++g) kl[g] = math::log1p(kl[g]);
  }

  // Groups with far outcomes, one by one; their b becomes q.
  void compare_far(int64_t n, T* kl) {
    for (int64_t g = 0; g < n; ++g) {
      if (far_[g] == T(0)) continue;
      auto prior = [&](int64_t k) { return kPrior ? row(b_, k)[g] : T(0); };
      T largest = -math::kInf<T>, total = T(0);
      for (int64_t k = 0; k < outcomes(); ++k) largest = prior(k) > largest ? prior(k) : largest;
      for (int64_t k = 0; k < outcomes(); ++k) total += math::outcome_weight(prior(k), largest);
      math::OutcomeSums<T> sums;
      for (int64_t k = 0; k < outcomes(); ++k) {
        const T q = math::outcome_weight(prior(k), largest) / total;
        math::add_outcome(row(a_, k)[g], largest_[g], prior(k), largest, row(p_, k)[g], row(x_, k)[g], q,
                          sums);
        if (kPrior) row(b_, k)[g] = q;
      }
      kl[g] = math::categorical_kl(sums, total_[g], total);
    }
  }

  const CategoricalArgs& args_;
  int64_t lanes_;
  std::vector<T> numbers_;
  T *a_, *b_, *p_, *x_;  // [outcomes, lanes]
  T* staged_;            // [lanes, outcomes]
  alignas(64) T largest_[kBlock<T>], shift_[kBlock<T>], total_[kBlock<T>], inverse_[kBlock<T>],
      mean_[kBlock<T>], far_[kBlock<T>];
};

template <class T, bool kPrior, bool kGradients>
void categorical_as(const CategoricalArgs& args, int64_t begin, int64_t end) {
  const Rows rows(args.shape, args.outcomes);
  Groups<T, kPrior> groups(args);
  Output<T> kl_out;
  UpstreamBlocks<T> upstream(args.grad_kl_elements, args.grad_kl);
  auto block = [&](int64_t i, int64_t n) -> const T* {
    const Span span{args.shape, i, n};
    const T* grad = kGradients ? upstream.load(span) : nullptr;
    T* kl = kl_out.open(args.kl, span);
    for (int64_t k = 0; k < n; k += groups.lanes()) {
      const int64_t count = min(groups.lanes(), n - k);
      groups.kl(i + k, count, kl + k);
      if (kGradients) groups.gradients(i + k, count, kl + k, grad + k);
    }
    kl_out.close(args.kl, span);
    return kl;
  };
  rows.run_all<T>(begin, end, args.partial, block);
}

template <class T, bool kGradients>
void categorical(const CategoricalArgs& args, int64_t begin, int64_t end) {
  (args.prior ? categorical_as<T, true, kGradients> : categorical_as<T, false, kGradients>)(args, begin, end);
}

int64_t tasks(const CategoricalArgs& args) { return Rows(args.shape, args.outcomes).tasks(); }
int64_t cost(const CategoricalArgs& args) {
  const Rows rows(args.shape, args.outcomes);
  return min(rows.rows_per_task * rows.row, kSegment) * args.outcomes;
}

}  // namespace

void add_categorical(Kernels& table) {
  table.categorical_forward = {tasks, cost, {categorical<float, false>, categorical<double, false>}};
  table.categorical_backward = {tasks, cost, {categorical<float, true>, categorical<double, true>}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
