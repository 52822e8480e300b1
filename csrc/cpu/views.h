// How the CPU kernels access memory: in blocks of elements that fit the first-level cache. A block is used in
// place where it is contiguous and of the compute type, and staged through a buffer otherwise, so that the
// arithmetic never sees layouts or storage types.
#pragma once

#include "convert.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {

template <class T>
constexpr int64_t kBlock = 2048 / sizeof(T);

// Elements of a row (or pixels) that one task sums.
constexpr int64_t kSegment = 4096;

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

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

// Prefetches n elements. (Not by the built-in function: g++ drops a loop of nothing else as one without
// effect.)
template <class S>
inline void prefetch([[maybe_unused]] const S* from, [[maybe_unused]] int64_t n) {
#if defined(__x86_64__)
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t k = 0; k < n; k += kLine) asm volatile("prefetcht1 %0" : : "m"(from[k]));
#endif
}

// Prefetches the operand's next block, the n elements after those at `offset`. A pass over images reads up to
// ten operands block by block: too many streams, and too short, for the hardware prefetcher. (The two of a KL
// it does follow, and software prefetches would only compete with it.)
inline void prefetch_next(const View& v, int64_t offset, int64_t n) {
  const int64_t size = size_of(v.dtype);
  prefetch(static_cast<const char*>(v.data) + (offset + n) * size, n * size);
}

// Copies a span of a View, converted to T.
template <class T>
inline void gather(const View& v, const Span& span, int64_t offset, T* to) {
  with_storage(v.dtype, [&](auto storage) {
    const auto* data = static_cast<const decltype(storage)*>(v.data);
    if (offset >= 0) return widen_all<T>(data + offset, 1, span.n, to);
    for_pieces(v, span.shape, span.index, span.n, [&](int64_t k, int64_t at, int64_t stride, int64_t n) {
      widen_all<T>(data + at, stride, n, to + k);
    });
  });
}

template <class T>
inline void scatter(const T* from, const View& v, const Span& span, int64_t offset) {
  with_storage(v.dtype, [&](auto storage) {
    if constexpr (sizeof(storage) > 1) {
      auto* data = static_cast<decltype(storage)*>(v.data);
      if (offset >= 0) return narrow_all(from, 1, span.n, data + offset);
      for_pieces(v, span.shape, span.index, span.n, [&](int64_t k, int64_t at, int64_t stride, int64_t n) {
        narrow_all(from + k, stride, n, data + at);
      });
    }
  });
}

template <class T>
class Input {
 public:
  const T* load(const View& v, const Span& span, int64_t offset) {
    if (offset >= 0 && v.dtype == dtype_of<T>()) return static_cast<const T*>(v.data) + offset;
    gather(v, span, offset, buffer_);
    return buffer_;
  }
  const T* load(const View& v, const Span& span) { return load(v, span, consecutive(v, span)); }

 private:
  alignas(64) T buffer_[kBlock<T>];
};

// An absent View opens a scratch buffer that is never stored, so that callers need no branch.
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
    if (staged_) scatter(buffer_, v, span, offset_);
  }

 private:
  alignas(64) T buffer_[kBlock<T>];
  int64_t offset_ = -1;
  bool staged_ = false;
};

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
