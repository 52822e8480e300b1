// Blocks of Philox normals. g++ does not vectorise the 32 x 32 -> 64 bit products, so they are given as
// SIMD words to the formula in math/philox.h; Box-Muller vectorises by itself.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/philox.h"
#include "memory.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {

#if defined(__AVX512F__)
// 32-bit words in the low halves of 64-bit lanes, where the widening multiply reads them. What stands
// in the high halves is ignored.
struct Words {
  static constexpr int kLanes = 8;
  __m512i v;
};
inline void multiply_high_low(Words a, uint32_t m, Words& high, Words& low) {
  low.v = _mm512_mul_epu32(a.v, _mm512_set1_epi64(m));
  high.v = _mm512_srli_epi64(low.v, 32);
}
inline Words operator^(Words a, Words b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Words operator^(Words a, uint32_t b) { return {_mm512_xor_si512(a.v, _mm512_set1_epi64(b))}; }
inline math::Philox4<Words> counters(uint64_t block) {
  const __m512i b = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(block)),
                                     _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
  return {{b}, {_mm512_srli_epi64(b, 32)}, {_mm512_setzero_si512()}, {_mm512_setzero_si512()}};
}
inline void store(Words w, uint64_t* to) { _mm512_storeu_si512(to, w.v); }
#elif defined(__AVX2__)
struct Words {
  static constexpr int kLanes = 4;
  __m256i v;
};
inline void multiply_high_low(Words a, uint32_t m, Words& high, Words& low) {
  low.v = _mm256_mul_epu32(a.v, _mm256_set1_epi64x(m));
  high.v = _mm256_srli_epi64(low.v, 32);
}
inline Words operator^(Words a, Words b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Words operator^(Words a, uint32_t b) { return {_mm256_xor_si256(a.v, _mm256_set1_epi64x(b))}; }
inline math::Philox4<Words> counters(uint64_t block) {
  const __m256i b =
      _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(block)), _mm256_set_epi64x(3, 2, 1, 0));
  return {{b}, {_mm256_srli_epi64(b, 32)}, {_mm256_setzero_si256()}, {_mm256_setzero_si256()}};
}
inline void store(Words w, uint64_t* to) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), w.v); }
#else
struct Words {
  static constexpr int kLanes = 1;
  uint32_t v;
};
inline void multiply_high_low(Words a, uint32_t m, Words& high, Words& low) {
  math::multiply_high_low(a.v, m, high.v, low.v);
}
inline Words operator^(Words a, Words b) { return {a.v ^ b.v}; }
inline Words operator^(Words a, uint32_t b) { return {a.v ^ b}; }
inline math::Philox4<Words> counters(uint64_t block) {
  return {{static_cast<uint32_t>(block)}, {static_cast<uint32_t>(block >> 32)}, {0u}, {0u}};
}
inline void store(Words w, uint64_t* to) { *to = w.v; }
#endif

class Normals {
 public:
  explicit Normals(const Noise& noise)
      : seed_(noise.seed ? static_cast<uint64_t>(*noise.seed) : 0), offset_(noise.offset) {}

  // Numbers offset + i .. offset + i + n - 1 of the stream; n <= kBlock<float>.
  const float* fill(int64_t i, int64_t n) {
    const uint64_t start = offset_ + static_cast<uint64_t>(i);
    const uint64_t first = start / 4;
    const int64_t skip = static_cast<int64_t>(start % 4), quads = (skip + n + 3) / 4;
    // Whole groups only: every number comes out of the same vector code wherever a block begins.
    for (int64_t q = 0; q < quads; q += kGroup) group(first + static_cast<uint64_t>(q), buffer_ + 4 * q);
    return buffer_ + skip;
  }

 private:
  static constexpr int kGroup = 16;

  void group(uint64_t block, float* out) {
    alignas(64) uint64_t x[4][kGroup];
    const uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    for (int q = 0; q < kGroup; q += Words::kLanes) {
      const auto w = math::philox4x32_10<Words>(counters(block + static_cast<uint64_t>(q)), key0, key1);
      store(w.x0, x[0] + q);
      store(w.x1, x[1] + q);
      store(w.x2, x[2] + q);
      store(w.x3, x[3] + q);
    }
    alignas(64) float normal[4][kGroup];
    for (int pair = 0; pair < 4; pair += 2)
      for (int q = 0; q < kGroup; ++q) {
        const math::NormalPair z =
            math::box_muller(static_cast<uint32_t>(x[pair][q]), static_cast<uint32_t>(x[pair + 1][q]));
        normal[pair][q] = z.first;
        normal[pair + 1][q] = z.second;
      }
    for (int q = 0; q < kGroup; ++q)
      for (int k = 0; k < 4; ++k) out[4 * q + k] = normal[k][q];
  }

  uint64_t seed_, offset_;
  alignas(64) float buffer_[kBlock<float> + 8 * kGroup];
};

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
