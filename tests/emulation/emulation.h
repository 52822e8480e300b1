// What the two halves of the emulation share: cuda.cpp runs kernels, torch.cpp gives them memory.
#pragma once

#include <cstddef>
#include <random>
#include <set>

namespace emulation {

// NaN in every floating-point type, so that memory that was never written shows in every result.
constexpr int kPoison = 0xff;

// Poisoned memory between inaccessible pages, flush with the one after it (at_end) or the one before it.
char* guarded_allocate(size_t bytes, bool at_end);

extern std::mt19937_64 random_numbers;
extern std::set<const void*> kernels_run;

// What the ops asked of the device since the emulation started.
struct Counts {
  size_t launches, memsets, allocations;
};
extern Counts counts;

}  // namespace emulation
