// How the CPU kernels walk memory: blocks of elements that fit the first-level cache. A block is read
// in place where it is contiguous and of the compute type, and gathered into a buffer otherwise, so
// that the arithmetic never sees layouts or storage types.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#include "../storage.h"

// Blocks in different buffers never overlap, which the compiler cannot see.
#define FGBG_SIMD _Pragma("omp simd")

namespace fgbg::cpu {
inline namespace FGBG_ISA {

template <class T>
constexpr int64_t kBlock = 2048 / sizeof(T);

// Elements of a row (or pixels) that one task sums.
constexpr int64_t kSegment = 4096;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T>
constexpr DType dtype_of() {
  return sizeof(T) == 8 ? DType::f64 : DType::f32;
}

// Calls visit(k, offset, stride, count) for the pieces of [i, i + n) along which memory is strided.
template <class Visit>
inline void for_pieces(const View& v, const Shape& s, int64_t i, int64_t n, Visit visit) {
  const bool flat = v.plane_stride >= 0;
  const int64_t inner = flat ? s.plane : s.size[4];
  const int64_t inner_stride = flat ? v.plane_stride : v.stride[4];
  const int outer = flat ? 1 : 3;  // last of the outer dimensions
  for (int64_t k = 0; k < n;) {
    const int64_t at = (i + k) % inner, count = min(inner - at, n - k);
    int64_t rest = (i + k) / inner, offset = at * inner_stride;
    for (int d = outer; d >= 0; --d) {
      offset += (rest % s.size[d]) * v.stride[d];
      rest /= s.size[d];
    }
    visit(k, offset, inner_stride, count);
    k += count;
  }
}

// Calls with_type(Storage{}) for the storage type of an operand.
template <class Visit>
inline void with_storage(DType dtype, Visit with_type) {
  switch (dtype) {
    case DType::f64: return with_type(double{});
    case DType::f32: return with_type(float{});
    case DType::bf16: return with_type(math::bf16{});
    case DType::f16: return with_type(math::f16{});
    case DType::u8: return with_type(uint8_t{});
  }
}

template <class T, class Storage>
inline void widen_all(const Storage* from, int64_t stride, int64_t n, T* to) {
  if (stride == 1) {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) to[j] = widen<T>(from[j]);
  } else {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) to[j] = widen<T>(from[j * stride]);
  }
}

template <class T, class Storage>
inline void narrow_all(const T* from, int64_t stride, int64_t n, Storage* to) {
  if (stride == 1) {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) narrow(from[j], to[j]);
  } else {
    FGBG_SIMD
    for (int64_t j = 0; j < n; ++j) narrow(from[j], to[j * stride]);
  }
}

// The elements [index, index + n) of operands of one shape. Where they are consecutive in memory, `offset`
// tells where they begin, else it is -1.
struct Span {
  const Shape& shape;
  int64_t index, n;
};

inline int64_t offset_of(const View& v, const Shape& s, int64_t i) {
  int64_t offset = 0;
  for (int d = kDims - 1; d >= 0; --d) {
    offset += (i % s.size[d]) * v.stride[d];
    i /= s.size[d];
  }
  return offset;
}

inline int64_t consecutive(const View& v, const Span& span) {
  if (v.run >= span.shape.numel) return span.index;
  return span.index % v.run + span.n <= v.run ? offset_of(v, span.shape, span.index) : -1;
}

inline int64_t size_of(DType dtype) {
  int64_t size = 0;
  with_storage(dtype, [&](auto storage) { size = sizeof(storage); });
  return size;
}

// Asks for the n elements after those at `offset`. A pass over images has up to ten operands and takes a
// block of each in turn: too many, and too short, for the processor to foresee the next ones. (With the two
// of a KL it does, and this would be in its way.)
inline void prefetch_next([[maybe_unused]] const View& v, [[maybe_unused]] int64_t offset,
                          [[maybe_unused]] int64_t n) {
#if defined(__x86_64__)
  const int64_t size = size_of(v.dtype);
  const char* next = static_cast<const char*>(v.data) + (offset + n) * size;
  // Not the built-in function: g++ drops a loop of nothing else as one without effect.
  for (int64_t k = 0; k < n * size; k += 64) asm volatile("prefetcht1 %0" : : "m"(next[k]));
#endif
}

template <class T>
class Input {
 public:
  const T* load(const View& v, const Span& span, int64_t offset) {
    if (offset >= 0 && v.dtype == dtype_of<T>()) return static_cast<const T*>(v.data) + offset;
    with_storage(v.dtype, [&](auto storage) {
      const auto* data = static_cast<const decltype(storage)*>(v.data);
      if (offset >= 0) return widen_all<T>(data + offset, 1, span.n, buffer_);
      for_pieces(v, span.shape, span.index, span.n, [&](int64_t k, int64_t at, int64_t stride, int64_t n) {
        widen_all<T>(data + at, stride, n, buffer_ + k);
      });
    });
    return buffer_;
  }
  const T* load(const View& v, const Span& span) { return load(v, span, consecutive(v, span)); }

 private:
  alignas(64) T buffer_[kBlock<T>];
};

// An absent View gives a scratch buffer that goes nowhere, so callers need not ask.
template <class T>
class Output {
 public:
  T* open(const View& v, int64_t offset) {
    offset_ = offset;
    staged_ = v && !(offset >= 0 && v.dtype == dtype_of<T>());
    return v && !staged_ ? static_cast<T*>(v.data) + offset : buffer_;
  }
  T* open(const View& v, const Span& span) { return open(v, v ? consecutive(v, span) : -1); }

  void close(const View& v, const Span& span) {
    if (!staged_) return;
    with_storage(v.dtype, [&](auto storage) {
      if constexpr (sizeof(storage) > 1) {
        auto* data = static_cast<decltype(storage)*>(v.data);
        if (offset_ >= 0) return narrow_all(buffer_, 1, span.n, data + offset_);
        for_pieces(v, span.shape, span.index, span.n, [&](int64_t k, int64_t at, int64_t stride, int64_t n) {
          narrow_all(buffer_ + k, stride, n, data + at);
        });
      }
    });
  }

 private:
  alignas(64) T buffer_[kBlock<T>];
  int64_t offset_ = -1;
  bool staged_ = false;
};

// 64 bytes of numbers that are added lane by lane, whatever registers there are.
typedef float PackOfFloat __attribute__((vector_size(64)));
typedef double PackOfDouble __attribute__((vector_size(64)));
template <class T>
using Pack = std::conditional_t<sizeof(T) == 8, PackOfDouble, PackOfFloat>;

// The sum of what accumulate(to, x, y) adds to lanes. Lane by lane in four packs, which hides the latency of
// an addition, and in an order that depends on n alone.
template <class T, class Accumulate>
inline T sum_of(const T* x, const T* y, int64_t n, Accumulate accumulate) {
  constexpr int64_t kLanes = 64 / sizeof(T), kPacks = 4;
  Pack<T> total[kPacks] = {};
  const auto add = [&](Pack<T>& to, const T* from_x, const T* from_y, size_t bytes) {
    Pack<T> a{}, b{};
    std::memcpy(&a, from_x, bytes);
    std::memcpy(&b, from_y, bytes);
    accumulate(to, a, b);
  };
  int64_t i = 0;
  for (; i + kPacks * kLanes <= n; i += kPacks * kLanes)
    for (int64_t p = 0; p < kPacks; ++p) add(total[p], x + i + p * kLanes, y + i + p * kLanes, 64);
  for (; i + kLanes <= n; i += kLanes) add(total[0], x + i, y + i, 64);
  if (i < n) add(total[1], x + i, y + i, static_cast<size_t>(n - i) * sizeof(T));
  const Pack<T> all = (total[0] + total[1]) + (total[2] + total[3]);
  T lane[kLanes];
  std::memcpy(lane, &all, 64);
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

template <class T>
inline double sum(const T* x, int64_t n) {
  return static_cast<double>(sum_of(x, x, n, [](Pack<T>& to, const Pack<T>& a, const Pack<T>&) { to += a; }));
}

template <class T>
inline double dot(const T* x, const T* y, int64_t n) {
  return static_cast<double>(
      sum_of(x, y, n, [](Pack<T>& to, const Pack<T>& a, const Pack<T>& b) { to += a * b; }));
}

// Gradient reaching each of the elements of a span: read from `elements` (reduction "none") or spread by row.
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

// Latents are walked along the logical index. A task is a segment of one long row, or several short
// rows; a block within it is part of one row, or several whole rows.
struct Rows {
  explicit Rows(const Shape& s)
      : row(s.row),
        rows(s.row > 0 ? s.numel / s.row : 0),
        segments(segments_of(s.row, kSegment)),
        rows_per_task(s.row > 0 && s.row < kSegment ? kSegment / s.row : 1) {}
  int64_t tasks() const {
    return segments <= 1 ? segments_of(rows, rows_per_task) * segments : rows * segments;
  }

  // The tasks [first, last). body(i, n) handles elements [i, i + n), n <= block, and returns their losses,
  // which are summed by row into partial[b * segments + segment] (null: not summed). A task is left out
  // if all its results are stored.
  template <class T, class Body>
  void run_all(int64_t first, int64_t last, const Upstream& upstream, double* partial, Body body) const {
    for (int64_t task = first; task < last; ++task) run<T>(task, upstream, partial, body);
  }

  int64_t row, rows, segments, rows_per_task;

 private:
  template <class T, class Body>
  void run(int64_t task, const Upstream& upstream, double* partial, Body body) const {
    const int64_t block = kBlock<T>;
    const int64_t first_row = segments == 1 ? task * rows_per_task : task / segments;
    const int64_t last_row = segments == 1 ? min(first_row + rows_per_task, rows) : first_row + 1;
    const int64_t segment = segments == 1 ? 0 : task % segments;
    const int64_t begin = first_row * row + segment * kSegment;
    const int64_t end = segments == 1 ? last_row * row : min(begin + kSegment, last_row * row);
    int64_t done = first_row;
    while (done < last_row && stored<T>(upstream, done)) ++done;
    if (done == last_row) return;
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
