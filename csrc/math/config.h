// What lets one header serve g++ (once per instruction set) and nvcc.
#pragma once

#include <cstdint>

// g++ says with it whether a flag such as -ffast-math or -Ofast breaks IEEE arithmetic. (Below 2: one does.)
#if defined(__GCC_IEC_559) && __GCC_IEC_559 < 2
#error "fgbg_cuda relies on IEEE arithmetic: take -ffast-math, -Ofast and their like out of CXXFLAGS"
#endif

#if defined(__CUDACC__)
#define FGBG_FN __host__ __device__ __forceinline__
#else
#define FGBG_FN __attribute__((always_inline)) inline
#endif

// Ahead of what only some elements need and a selection then takes: a warp of CUDA skips it where none does;
// a vector loop on the CPU computes it for all, without a branch.
#if defined(__CUDA_ARCH__)
#define FGBG_WHEN(condition) if (condition)
#else
#define FGBG_WHEN(condition)
#endif

// In device code CUDA's elementary functions, which come from its own tables, serve in the place of
// polynomials. (The emulation of the tests defines it too, with models of those functions.)
#if defined(__CUDA_ARCH__)
#define FGBG_CUDA_MATH
#endif

// The CPU sources are compiled once per instruction set. The inline namespace keeps the linker from
// merging, say, an AVX-512 copy of an inline function into the portable build.
#ifndef FGBG_ISA
#define FGBG_ISA portable
#endif
