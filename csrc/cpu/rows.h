// How latents are cut into tasks and blocks, and their losses summed.
#pragma once

#include <algorithm>
#include <iterator>

#include "sums.h"
#include "views.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {

// The upstream gradient of each element of a span: read from `elements` (reduction "none"), or that of its
// row.
template <class T>
class UpstreamBlocks {
 public:
  UpstreamBlocks(const View& elements, const Upstream& reduced) : elements_(elements), reduced_(reduced) {
    if (one_number()) std::fill(std::begin(buffer_), std::end(buffer_), upstream<T>(reduced_, 0));
  }
  const T* load(const Span& span) {
    if (elements_) return in_.load(elements_, span);
    if (one_number()) return buffer_;
    const int64_t row = span.shape.row;
    for (int64_t k = 0; k < span.n;) {
      const int64_t b = (span.index + k) / row, last = min(span.n, (b + 1) * row - span.index);
      const T value = upstream<T>(reduced_, b);
      for (; k < last; ++k) buffer_[k] = value;
    }
    return buffer_;
  }

 private:
  bool one_number() const { return !elements_ && reduced_.stride == 0; }

  const View& elements_;
  const Upstream& reduced_;
  Input<T> in_;
  alignas(64) T buffer_[kBlock<T>];
};

// The blocks of an operand that is broadcast. A number fills one block, once; and so do the rows of an
// operand that all samples share, where a block is of whole rows.
template <class T>
class BroadcastInput {
 public:
  BroadcastInput(const BroadcastView& from, const Shape& shape) : from_(from) {
    if (is_number()) std::fill(std::begin(buffer_), std::end(buffer_), scale_at<T>(from.number, 0));
    shared_ = !is_number() && shape.row > 0 && shape.row <= kBlock<T> && shape.numel > 0;
    for (int d = 0; d < shape.leading; ++d) shared_ &= shape.size[d] == 1 || from.view.stride[d] == 0;
    if (shared_) {
      std::fill(std::begin(buffer_), std::end(buffer_), T(0));
      const int64_t n = min(kBlock<T> / shape.row * shape.row, shape.numel);
      const T* rows = in_.load(from.view, {shape, 0, n});
      std::copy(rows, rows + n, buffer_);
    }
  }
  bool is_number() const { return !from_.view; }
  // Whether every block is the same.
  bool constant() const { return is_number() || shared_; }
  const T* load(const Span& span) { return constant() ? buffer_ : in_.load(from_.view, span); }

 private:
  const BroadcastView& from_;
  bool shared_;
  Input<T> in_;
  alignas(64) T buffer_[kBlock<T>];
};

// How latents are iterated, along the logical index. A task is a segment of one long row, or several short
// rows; a block within it is part of one row, or several whole rows.
struct Rows {
  // `cost`: of one element, by which tasks of several rows get fewer.
  explicit Rows(const Shape& s, int64_t cost = 1)
      : row(s.row),
        rows(s.row > 0 ? s.samples : 0),
        segments(segments_of(s.row, kSegment)),
        rows_per_task(s.row > 0 && s.row * cost < kSegment ? kSegment / (s.row * cost) : 1) {}
  int64_t tasks() const {
    return segments <= 1 ? segments_of(rows, rows_per_task) * segments : rows * segments;
  }

  // Runs the tasks [first, last). body(i, n) handles elements [i, i + n), n <= block, and returns their
  // losses, which are summed by row into partial[b * segments + segment] (null: not summed).
  template <class T, class Body>
  void run_all(int64_t first, int64_t last, double* partial, Body body) const {
    for (int64_t task = first; task < last; ++task) run<T>(task, partial, body);
  }

  int64_t row, rows, segments, rows_per_task;

 private:
  template <class T, class Body>
  void run(int64_t task, double* partial, Body body) const {
    const int64_t block = kBlock<T>;
    const int64_t first_row = segments == 1 ? task * rows_per_task : task / segments;
    const int64_t last_row = segments == 1 ? min(first_row + rows_per_task, rows) : first_row + 1;
    const int64_t segment = segments == 1 ? 0 : task % segments;
    const int64_t begin = first_row * row + segment * kSegment;
    const int64_t end = segments == 1 ? last_row * row : min(begin + kSegment, last_row * row);
    if (partial)
      for (int64_t b = first_row; b < last_row; ++b) partial[b * segments + segment] = 0.0;
    for (int64_t i = begin; i < end;) {
      const int64_t in_row = i % row;
      const bool whole_rows = in_row == 0 && row <= block;
      const int64_t n = whole_rows ? min(block / row * row, end - i) : min(min(block, row - in_row), end - i);
      const T* values = body(i, n);
      if (partial) {
        const int64_t piece = whole_rows ? row : n;
        for (int64_t k = 0; k < n; k += piece)
          partial[(i + k) / row * segments + segment] += sum(values + k, piece);
      }
      i += n;
    }
  }
};

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
