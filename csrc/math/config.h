// What lets one header serve g++ (once per instruction set) and nvcc.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define FGBG_FN __host__ __device__ __forceinline__
#else
#define FGBG_FN __attribute__((always_inline)) inline
#endif

// The CPU sources are compiled once per instruction set. The inline namespace keeps the linker from
// merging, say, an AVX-512 copy of an inline function into the portable build.
#ifndef FGBG_ISA
#define FGBG_ISA portable
#endif
