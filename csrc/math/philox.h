// Counter-based standard normals: Philox4x32-10 and the Box-Muller transform.
//
// Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The constants and
// the round are the paper's; tests/test_philox.py checks the Random123 known-answer vectors.
#pragma once

#include "elementary.h"

namespace fgbg::math {
inline namespace FGBG_ISA {

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxW0 = 0x9E3779B9u, kPhiloxW1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 10;

template <class Word>
struct Philox4 {
  Word x0, x1, x2, x3;
};

FGBG_FN void multiply_high_low(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
  const uint64_t product = static_cast<uint64_t>(a) * m;
  high = static_cast<uint32_t>(product >> 32);
  low = static_cast<uint32_t>(product);
}

// Word is uint32_t, or a SIMD vector of 32-bit words with its own multiply_high_low and ^.
template <class Word>
FGBG_FN Philox4<Word> philox_round(const Philox4<Word>& counter, uint32_t key0, uint32_t key1) {
  Word high0, low0, high1, low1;
  multiply_high_low(counter.x0, kPhiloxM0, high0, low0);
  multiply_high_low(counter.x2, kPhiloxM1, high1, low1);
  return {high1 ^ counter.x1 ^ key0, low1, high0 ^ counter.x3 ^ key1, low0};
}
template <class Word>
FGBG_FN Philox4<Word> philox4x32_10(Philox4<Word> counter, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < kPhiloxRounds; ++round) {
    counter = philox_round(counter, key0, key1);
    key0 += kPhiloxW0;
    key1 += kPhiloxW1;
  }
  return counter;
}

// The keys of all rounds, for those who have them at hand.
struct PhiloxKeys {
  uint32_t key0[kPhiloxRounds], key1[kPhiloxRounds];
};
FGBG_FN PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
    keys.key0[round] = static_cast<uint32_t>(seed) + round * kPhiloxW0;
    keys.key1[round] = static_cast<uint32_t>(seed >> 32) + round * kPhiloxW1;
  }
  return keys;
}

// The four words behind elements 4 * block .. 4 * block + 3 of the stream of `seed`.
FGBG_FN Philox4<uint32_t> philox_counter(uint64_t block) {
  return {static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32), 0u, 0u};
}
FGBG_FN Philox4<uint32_t> philox_block(uint64_t seed, uint64_t block) {
  return philox4x32_10(philox_counter(block), static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}
FGBG_FN Philox4<uint32_t> philox_block(const PhiloxKeys& keys, uint64_t block) {
  Philox4<uint32_t> counter = philox_counter(block);
  for (int round = 0; round < kPhiloxRounds; ++round)
    counter = philox_round(counter, keys.key0[round], keys.key1[round]);
  return counter;
}

// (x + 0.5) 2^-32 in float32 with one rounding of the sum: every one of the 32 bits counts near 0,
// where the tail of the normal is made.
FGBG_FN float uniform_from_bits(uint32_t x) {
  return fma(static_cast<float>(x), 2.3283064365386963e-10f, 1.1641532182693481e-10f);
}

struct NormalPair {
  float first, second;
};

// Box-Muller: sqrt(-2 ln u0) * (cos, sin)(2 pi u1).
FGBG_FN NormalPair box_muller(uint32_t x0, uint32_t x1) {
  const float radius = sqrt_normal(-2.0f * log_normal(uniform_from_bits(x0)));
  const SinCos angle = sincos_turns(uniform_from_bits(x1));
  return {radius * angle.cos, radius * angle.sin};
}

struct Normal4 {
  float n[4];
};

// seed: that of the stream, or its keys.
template <class Seed>
FGBG_FN Normal4 normal4(const Seed& seed, uint64_t block) {
  const Philox4<uint32_t> x = philox_block(seed, block);
  const NormalPair a = box_muller(x.x0, x.x1), b = box_muller(x.x2, x.x3);
  return {{a.first, a.second, b.first, b.second}};
}

}  // namespace FGBG_ISA
}  // namespace fgbg::math
