// How the CPU kernels walk memory: blocks of elements that fit the first-level cache. A block is read
// in place where it is contiguous and of the compute type, and gathered into a buffer otherwise, so
// that the arithmetic never sees layouts or storage types.
#pragma once

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

template <class T, class Storage>
inline void gather(const View& v, const Shape& s, int64_t i, int64_t n, T* out) {
  const Storage* data = static_cast<const Storage*>(v.data);
  for_pieces(v, s, i, n, [&](int64_t k, int64_t offset, int64_t stride, int64_t count) {
    const Storage* from = data + offset;
    T* to = out + k;
    if (stride == 1) {
      FGBG_SIMD
      for (int64_t j = 0; j < count; ++j) to[j] = widen<T>(from[j]);
    } else {
      FGBG_SIMD
      for (int64_t j = 0; j < count; ++j) to[j] = widen<T>(from[j * stride]);
    }
  });
}

template <class T, class Storage>
inline void scatter(const View& v, const Shape& s, int64_t i, int64_t n, const T* in) {
  Storage* data = static_cast<Storage*>(v.data);
  for_pieces(v, s, i, n, [&](int64_t k, int64_t offset, int64_t stride, int64_t count) {
    Storage* to = data + offset;
    const T* from = in + k;
    if (stride == 1) {
      FGBG_SIMD
      for (int64_t j = 0; j < count; ++j) narrow(from[j], to[j]);
    } else {
      FGBG_SIMD
      for (int64_t j = 0; j < count; ++j) narrow(from[j], to[j * stride]);
    }
  });
}

template <class T>
inline T* in_place(const View& v, int64_t i, int64_t n) {
  const bool direct = v.dtype == dtype_of<T>() && i % v.run + n <= v.run;
  return direct ? static_cast<T*>(v.data) : nullptr;
}

inline int64_t offset_of(const View& v, const Shape& s, int64_t i) {
  int64_t offset = 0;
  for (int d = kDims - 1; d >= 0; --d) {
    offset += (i % s.size[d]) * v.stride[d];
    i /= s.size[d];
  }
  return offset;
}

template <class T>
class Input {
 public:
  const T* load(const View& v, const Shape& s, int64_t i, int64_t n) {
    if (const T* base = in_place<T>(v, i, n)) return base + offset_of(v, s, i);
    switch (v.dtype) {
      case DType::f64: gather<T, double>(v, s, i, n, buffer_); break;
      case DType::f32: gather<T, float>(v, s, i, n, buffer_); break;
      case DType::bf16: gather<T, math::bf16>(v, s, i, n, buffer_); break;
      case DType::f16: gather<T, math::f16>(v, s, i, n, buffer_); break;
      case DType::u8: gather<T, uint8_t>(v, s, i, n, buffer_); break;
    }
    return buffer_;
  }

 private:
  alignas(64) T buffer_[kBlock<T>];
};

// An absent View gives a scratch buffer that goes nowhere, so callers need not ask.
template <class T>
class Output {
 public:
  T* open(const View& v, const Shape& s, int64_t i, int64_t n) {
    T* base = v ? in_place<T>(v, i, n) : nullptr;
    staged_ = v && base == nullptr;
    return base ? base + offset_of(v, s, i) : buffer_;
  }
  void close(const View& v, const Shape& s, int64_t i, int64_t n) {
    if (!staged_) return;
    switch (v.dtype) {
      case DType::f64: scatter<T, double>(v, s, i, n, buffer_); break;
      case DType::f32: scatter<T, float>(v, s, i, n, buffer_); break;
      case DType::bf16: scatter<T, math::bf16>(v, s, i, n, buffer_); break;
      case DType::f16: scatter<T, math::f16>(v, s, i, n, buffer_); break;
      case DType::u8: break;
    }
  }

 private:
  alignas(64) T buffer_[kBlock<T>];
  bool staged_ = false;
};

// Sum in 16 interleaved lanes: vectorises at every width, and in the same order at every width.
template <class T>
inline T sum(const T* x, int64_t n) {
  constexpr int kLanes = 16;
  T lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += x[i + l];
  for (int l = 0; i < n; ++i, ++l) lane[l] += x[i];
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int l = 0; l < width; ++l) lane[l] += lane[l + width];
  return lane[0];
}

// Gradient reaching each of the elements [i, i + n): read from `elements` (reduction "none") or spread by
// row.
template <class T>
inline const T* upstream_block(const View& elements, const Upstream& u, const Shape& s, Input<T>& in,
                               T* buffer, int64_t i, int64_t n) {
  if (elements) return in.load(elements, s, i, n);
  for (int64_t k = 0; k < n;) {
    const int64_t b = (i + k) / s.row, last = min(n, (b + 1) * s.row - i);
    const T value = upstream<T>(u, b);
    for (; k < last; ++k) buffer[k] = value;
  }
  return buffer;
}

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

  // body(i, n) handles elements [i, i + n), n <= block, and returns their losses, which are summed by
  // row into partial[b * segments + segment] (null: not summed).
  template <class Body>
  void run(int64_t task, int64_t block, double* partial, Body body) const {
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
      const auto* values = body(i, n);
      if (partial) {
        const int64_t piece = whole_rows ? row : n;
        for (int64_t k = 0; k < n; k += piece)
          partial[(i + k) / row * segments + segment] += static_cast<double>(sum(values + k, piece));
      }
      i += n;
    }
  }

  int64_t row, rows, segments, rows_per_task;
};

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
