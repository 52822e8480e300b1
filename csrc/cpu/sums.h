// Sums whose order, and so whose bits, depend on the number of terms alone.
#pragma once

#include <cstring>
#include <type_traits>

#include "../math/config.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {

// A 64-byte vector, independent of the ISA, so that sums are formed in one order on every CPU.
typedef float PackOfFloat __attribute__((vector_size(64)));
typedef double PackOfDouble __attribute__((vector_size(64)));
template <class T>
using Pack = std::conditional_t<sizeof(T) == 8, PackOfDouble, PackOfFloat>;
template <class T>
constexpr int64_t kLanes = 64 / sizeof(T);

// Loads the first `count` lanes of a pack and zeroes the others. (Packs are passed by reference: by value
// their calling convention depends on the instruction set.)
template <class T>
inline void load(Pack<T>& pack, const T* from, int64_t count = kLanes<T>) {
  pack = Pack<T>{};
  std::memcpy(&pack, from, static_cast<size_t>(count) * sizeof(T));
}

// A sum kept lane by lane in four packs, which hides the latency of an addition. flush() adds the lanes to a
// total in float64, so that rounding in float32 stays bounded by the number of terms between two flushes.
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

// Calls visit(i, count, p) for each pack of elements, [i, i + count), to be added to accumulator p. The
// partition depends on n alone. `count` is a compile-time constant, except for the last, partial pack.
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

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
