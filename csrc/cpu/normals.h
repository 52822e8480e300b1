// Blocks of Philox normals. g++ vectorises neither the 32 x 32 -> 64 bit products nor the last step, which
// interleaves the four numbers of each Philox block, so both are written with intrinsics; Box-Muller, in
// between, vectorises by itself.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "../math/philox.h"
#include "views.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {

// Lanes::kBlocks Philox blocks at a time. A Register holds half of them, as 32-bit words in the low halves of
// 64-bit lanes, where the widening multiply reads them; what stands in the high halves is ignored. A second
// Register is packed into those. Which block goes to which lane is chosen such that unpacking within 128-bit
// parts, the one interleaving that is cheap, brings the results into order: part p of the registers that
// interleave() makes has the blocks p, p + kParts, p + 2 kParts, p + 3 kParts.
#if defined(__AVX512F__)
struct Register {
  __m512i v;
};
constexpr int kChains = 4;
inline void multiply_high_low(Register a, uint32_t m, Register& high, Register& low) {
  low.v = _mm512_mul_epu32(a.v, _mm512_set1_epi64(m));
  high.v = _mm512_srli_epi64(low.v, 32);
}
inline Register operator^(Register a, Register b) { return {_mm512_xor_si512(a.v, b.v)}; }
inline Register operator^(Register a, uint32_t b) { return {_mm512_xor_si512(a.v, _mm512_set1_epi64(b))}; }

struct Lanes {
  static constexpr int kBlocks = 16, kParts = 4;
  static math::Philox4<Register> counters(uint64_t first) {
    const __m512i b = _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)),
                                       _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11));
    return {{b}, {_mm512_srli_epi64(b, 32)}, {_mm512_setzero_si512()}, {_mm512_setzero_si512()}};
  }
  static void pack(Register even, Register odd, uint32_t* to) {
    _mm512_store_si512(to, _mm512_mask_blend_epi32(0xaaaa, even.v, _mm512_slli_epi64(odd.v, 32)));
  }
  static void interleave(const float* a, const float* b, const float* c, const float* d, float* out) {
    const __m512 n0 = _mm512_load_ps(a), n1 = _mm512_load_ps(b), n2 = _mm512_load_ps(c),
                 n3 = _mm512_load_ps(d);
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(n0, n1));
    const __m512d low23 = _mm512_castps_pd(_mm512_unpacklo_ps(n2, n3));
    const __m512d high01 = _mm512_castps_pd(_mm512_unpackhi_ps(n0, n1));
    const __m512d high23 = _mm512_castps_pd(_mm512_unpackhi_ps(n2, n3));
    _mm512_storeu_pd(out, _mm512_unpacklo_pd(low01, low23));
    _mm512_storeu_pd(out + 16, _mm512_unpackhi_pd(low01, low23));
    _mm512_storeu_pd(out + 32, _mm512_unpacklo_pd(high01, high23));
    _mm512_storeu_pd(out + 48, _mm512_unpackhi_pd(high01, high23));
  }
};
#elif defined(__AVX2__)
struct Register {
  __m256i v;
};
constexpr int kChains = 2;
inline void multiply_high_low(Register a, uint32_t m, Register& high, Register& low) {
  low.v = _mm256_mul_epu32(a.v, _mm256_set1_epi64x(m));
  high.v = _mm256_srli_epi64(low.v, 32);
}
inline Register operator^(Register a, Register b) { return {_mm256_xor_si256(a.v, b.v)}; }
inline Register operator^(Register a, uint32_t b) { return {_mm256_xor_si256(a.v, _mm256_set1_epi64x(b))}; }

struct Lanes {
  static constexpr int kBlocks = 8, kParts = 2;
  static math::Philox4<Register> counters(uint64_t first) {
    const __m256i b =
        _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_setr_epi64x(0, 4, 1, 5));
    return {{b}, {_mm256_srli_epi64(b, 32)}, {_mm256_setzero_si256()}, {_mm256_setzero_si256()}};
  }
  static void pack(Register even, Register odd, uint32_t* to) {
    const __m256i packed = _mm256_blend_epi32(even.v, _mm256_slli_epi64(odd.v, 32), 0xaa);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), packed);
  }
  static void interleave(const float* a, const float* b, const float* c, const float* d, float* out) {
    const __m256 n0 = _mm256_load_ps(a), n1 = _mm256_load_ps(b), n2 = _mm256_load_ps(c),
                 n3 = _mm256_load_ps(d);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(n0, n1));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(n2, n3));
    const __m256d high01 = _mm256_castps_pd(_mm256_unpackhi_ps(n0, n1));
    const __m256d high23 = _mm256_castps_pd(_mm256_unpackhi_ps(n2, n3));
    _mm256_storeu_ps(out, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
    _mm256_storeu_ps(out + 8, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
    _mm256_storeu_ps(out + 16, _mm256_castpd_ps(_mm256_unpacklo_pd(high01, high23)));
    _mm256_storeu_ps(out + 24, _mm256_castpd_ps(_mm256_unpackhi_pd(high01, high23)));
  }
};
#else
using Register = uint32_t;
using math::multiply_high_low;
constexpr int kChains = 2;

struct Lanes {
  static constexpr int kBlocks = 2, kParts = 1;
  static math::Philox4<Register> counters(uint64_t first) {
    return {static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), 0u, 0u};
  }
  static void pack(Register even, Register odd, uint32_t* to) {
    to[0] = even;
    to[1] = odd;
  }
  static void interleave(const float* a, const float* b, const float* c, const float* d, float* out) {
    for (int q = 0; q < kBlocks; ++q, out += 4) {
      out[0] = a[q];
      out[1] = b[q];
      out[2] = c[q];
      out[3] = d[q];
    }
  }
};
#endif

// The words of kChains registers, interleaved step by step: within one register every step depends on the one
// before, so that latency would dominate.
struct Words {
  Register v[kChains];
};
inline void multiply_high_low(Words a, uint32_t m, Words& high, Words& low) {
  for (int i = 0; i < kChains; ++i) multiply_high_low(a.v[i], m, high.v[i], low.v[i]);
}
inline Words operator^(Words a, Words b) {
  for (int i = 0; i < kChains; ++i) a.v[i] = a.v[i] ^ b.v[i];
  return a;
}
inline Words operator^(Words a, uint32_t b) {
  for (int i = 0; i < kChains; ++i) a.v[i] = a.v[i] ^ b;
  return a;
}

class Normals {
 public:
  explicit Normals(const Noise& noise) : seed_(static_cast<uint64_t>(noise.seed)), offset_(noise.offset) {}

  // Numbers offset + i .. offset + i + n - 1 of the stream; n <= kBlock<float>.
  const float* fill(int64_t i, int64_t n) {
    const uint64_t start = offset_ + static_cast<uint64_t>(i);
    const uint64_t first = start / 4;
    const int64_t skip = static_cast<int64_t>(start % 4), quads = (skip + n + 3) / 4;
    const uint32_t key0 = static_cast<uint32_t>(seed_), key1 = static_cast<uint32_t>(seed_ >> 32);
    // Whole groups only: every number comes out of the same vector code wherever a block begins. Three
    // loops rather than one, for instruction-level parallelism.
    int64_t end = 0;
    for (; end < quads; end += kGroup) {
      const auto x = math::philox4x32_10<Words>(counters(first + static_cast<uint64_t>(end)), key0, key1);
      pack(x.x0, bits_[0] + end);
      pack(x.x1, bits_[1] + end);
      pack(x.x2, bits_[2] + end);
      pack(x.x3, bits_[3] + end);
    }
    for (int pair = 0; pair < 4; pair += 2) {
      FGBG_SIMD
      for (int64_t q = 0; q < end; ++q) {
        const math::NormalPair z = math::box_muller(bits_[pair][q], bits_[pair + 1][q]);
        normals_[pair][q] = z.first;
        normals_[pair + 1][q] = z.second;
      }
    }
    for (int64_t q = 0; q < end; q += Lanes::kBlocks)
      Lanes::interleave(normals_[0] + q, normals_[1] + q, normals_[2] + q, normals_[3] + q, buffer_ + 4 * q);
    return buffer_ + skip;
  }

 private:
  static constexpr int64_t kGroup = Lanes::kBlocks * kChains / 2;
  // The requested numbers, and those that share a group with the first or the last of them.
  static constexpr int64_t kQuads = kBlock<float> / 4 + 2 * kGroup;

  static math::Philox4<Words> counters(uint64_t first) {
    math::Philox4<Words> out;
    for (int i = 0; i < kChains; ++i) {
      const auto c =
          Lanes::counters(first + static_cast<uint64_t>(i / 2 * Lanes::kBlocks + i % 2 * Lanes::kParts));
      out.x0.v[i] = c.x0;
      out.x1.v[i] = c.x1;
      out.x2.v[i] = c.x2;
      out.x3.v[i] = c.x3;
    }
    return out;
  }
  static void pack(const Words& words, uint32_t* to) {
    for (int i = 0; i < kChains; i += 2) Lanes::pack(words.v[i], words.v[i + 1], to + i / 2 * Lanes::kBlocks);
  }

  uint64_t seed_, offset_;
  alignas(64) uint32_t bits_[4][kQuads];
  alignas(64) float normals_[4][kQuads], buffer_[4 * kQuads];
};

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
