// How the CPU kernels walk memory: blocks of elements that fit the first-level cache. A block is read
// in place where it is contiguous and of the compute type, and gathered into a buffer otherwise, so
// that the arithmetic never sees layouts or storage types.
#pragma once

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>

#if defined(__AVX512BW__)
#include <immintrin.h>
#endif

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

// By hand: g++ would take the numbers apart in smaller registers, which pass through memory.
template <>
inline void widen_all<float, math::bf16>(const math::bf16* from, int64_t stride, int64_t n, float* to) {
  typedef uint16_t Halves __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  int64_t k = 0;
  for (; stride == 1 && k + 16 <= n; k += 16) {
    Halves halves;
    std::memcpy(&halves, from + k, sizeof(halves));
    const Words words = __builtin_convertvector(halves, Words) << 16;
    std::memcpy(to + k, &words, sizeof(words));
  }
  for (; k < n; ++k) to[k] = widen<float>(from[k * stride]);
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

#if defined(__AVX512BW__)
// With the instruction for it, which takes subnormal numbers for zeros: those are rounded again.
__attribute__((target("avx512bf16"), noinline)) inline void round_to_bf16(const float* from, int64_t n,
                                                                          math::bf16* to) {
  constexpr int kSubnormal = 0x20, kHalf = 16;
  int64_t k = 0;
  for (; k + 2 * kHalf <= n; k += 2 * kHalf) {
    const __m512 low = _mm512_loadu_ps(from + k), high = _mm512_loadu_ps(from + k + kHalf);
    _mm512_storeu_si512(to + k, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
    if (_mm512_fpclass_ps_mask(low, kSubnormal) | _mm512_fpclass_ps_mask(high, kSubnormal)) [[unlikely]]
      for (int64_t j = k; j < k + 2 * kHalf; ++j) narrow(from[j], to[j]);
  }
  for (; k < n; ++k) narrow(from[k], to[k]);
}

inline void narrow_all(const float* from, int64_t stride, int64_t n, math::bf16* to) {
  if (stride == 1 && __builtin_cpu_supports("avx512bf16")) return round_to_bf16(from, n, to);
  narrow_all<float, math::bf16>(from, stride, n, to);
}
#endif

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

// Asks for n elements. (Not the built-in function: g++ drops a loop of nothing else as one without effect.)
template <class S>
inline void prefetch([[maybe_unused]] const S* from, [[maybe_unused]] int64_t n) {
#if defined(__x86_64__)
  constexpr int64_t kLine = 64 / sizeof(S);
  for (int64_t k = 0; k < n; k += kLine) asm volatile("prefetcht1 %0" : : "m"(from[k]));
#endif
}

// Asks for the n elements after those at `offset`. A pass over images has up to ten operands and takes a
// block of each in turn: too many, and too short, for the processor to foresee the next ones. (With the two
// of a KL it does, and this would be in its way.)
inline void prefetch_next(const View& v, int64_t offset, int64_t n) {
  const int64_t size = size_of(v.dtype);
  prefetch(static_cast<const char*>(v.data) + (offset + n) * size, n * size);
}

// What a View holds of a span, as T.
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
    if (staged_) scatter(buffer_, v, span, offset_);
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
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// The first `count` numbers of a pack, the others 0. (Packs are passed by reference: by value they would have
// another calling convention with each instruction set.)
template <class T>
inline void load(Pack<T>& pack, const T* from, int64_t count = kLanes<T>) {
  pack = Pack<T>{};
  std::memcpy(&pack, from, static_cast<size_t>(count) * sizeof(T));
}

// Sums lane by lane in four packs, which hides the latency of an addition. flush() adds them to a total in
// float64: between two flushes a lane of float32 must not collect more than rounding allows.
template <class T>
class LaneSums {
 public:
  static constexpr int kPacks = 4;
  alignas(64) Pack<T> pack[kPacks] = {};

  void flush() {
    const Pack<T> all = (pack[0] + pack[1]) + (pack[2] + pack[3]);
    for (auto& p : pack) p = Pack<T>{};
    if constexpr (sizeof(T) == 8) {
      total_ += all;
    } else {
      HalfPack half[2];
      std::memcpy(half, &all, 64);
      total_ +=
          __builtin_convertvector(half[0], PackOfDouble) + __builtin_convertvector(half[1], PackOfDouble);
    }
  }

  double take() {
    flush();
    double lane[8], sum = 0.0;
    std::memcpy(lane, &total_, 64);
    for (const double x : lane) sum += x;
    total_ = PackOfDouble{};
    return sum;
  }

 private:
  typedef float HalfPack __attribute__((vector_size(32)));
  PackOfDouble total_{};
};

// visit(i, count, p): elements [i, i + count) belong in pack p. Which do depends on n alone. The count is a
// constant, that of a full pack, but for the last.
template <class T, class Visit>
inline void for_packs(int64_t n, Visit visit) {
  constexpr int64_t kFull = kLanes<T>;
  constexpr std::integral_constant<int64_t, kFull> full{};
  int64_t i = 0;
  for (; i + LaneSums<T>::kPacks * kFull <= n; i += LaneSums<T>::kPacks * kFull)
    for (int p = 0; p < LaneSums<T>::kPacks; ++p) visit(i + p * kFull, full, p);
  for (; i + kFull <= n; i += kFull) visit(i, full, 0);
  if (i < n) visit(i, n - i, 1);
}

template <class T>
inline void add_all(const T* x, int64_t n, LaneSums<T>& to) {
  for_packs<T>(n, [&](int64_t i, auto count, int p) {
    Pack<T> a;
    load(a, x + i, count);
    to.pack[p] += a;
  });
}

template <class T>
inline double sum(const T* x, int64_t n) {
  LaneSums<T> lanes;
  add_all(x, n, lanes);
  return lanes.take();
}

// Adds x[k] y[k].
template <class T>
inline void add_products(const T* x, const T* y, int64_t n, LaneSums<T>& to) {
  for_packs<T>(n, [&](int64_t i, auto count, int p) {
    Pack<T> a, b;
    load(a, x + i, count);
    load(b, y + i, count);
    to.pack[p] += a * b;
  });
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
