// As much of the CUDA language as the kernels of csrc/cuda use, for g++. Included ahead of each source
// (-include).
//
// All threads are fibers of one thread of the machine, so that threadIdx and shared memory can be
// ordinary variables: cuda.cpp sets them whenever it goes from one fiber to another. g++ sees no
// __CUDA_ARCH__ and no __CUDACC__; with FGBG_CUDA_MATH csrc/math calls the models of CUDA's functions below.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct Index {
  unsigned x, y, z;
};
extern Index threadIdx, blockIdx, blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;

namespace emulation {

// Runs `thread` for each thread of each block. `kernel` is its address, by which the tests know that it ran.
// Throws std::runtime_error for an access outside memory, a misaligned one, or threads that part at a
// barrier.
void run(const void* kernel, int blocks, int threads, size_t shared, const std::function<void()>& thread);

// A number for a place in the sources.
constexpr int place(const char* file, int line) {
  unsigned hash = static_cast<unsigned>(line);
  for (; *file != 0; ++file) hash = hash * 31u + static_cast<unsigned char>(*file);
  return static_cast<int>(hash & 0x7fffffffu);
}

// __shared__ T name[count], as __init__.py rewrites it: T* name = shared<T>(count); and __shared__ T name.
// Poisoned before each block. Arrays end where a guard page begins, single variables do not.
void* shared_memory(size_t bytes, int place, bool at_end);
template <class T>
T* shared(size_t count, const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return static_cast<T*>(shared_memory(count * sizeof(T), place(file, line), true));
}
template <class T>
T& shared_variable(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  return *static_cast<T*>(shared_memory(sizeof(T), place(file, line), false));
}

// extern __shared__ T name[], as __init__.py rewrites it: T* name = dynamic_shared<T>(). As many bytes as the
// launch asked for, up to a guard page.
void* dynamic_shared_memory();
template <class T>
T* dynamic_shared() {
  return static_cast<T*>(dynamic_shared_memory());
}

// Waits until the whole warp is there; the value of the lane `delta` above, or one's own at the end.
uint64_t shuffle_down(unsigned mask, uint64_t bits, unsigned delta, int line);

// How many threads may run at a time, and of how many multiprocessors: few, so that small tensors suffice for
// a thread to get several items of work.
constexpr int kMultiprocessors = 3, kBlocksOfEach = 2;

// kernel<<<blocks, threads, shared, stream>>>(args), as __init__.py rewrites it:
// launch(kernel, blocks, threads, shared, stream)(args)
template <class Args>
auto launch(void (*kernel)(Args), int blocks, int threads, size_t shared, cudaStream_t) {
  return [=](const Args& args) {
    run(reinterpret_cast<const void*>(kernel), blocks, threads, shared, [&] { kernel(args); });
  };
}

}  // namespace emulation

// Of the runtime.
enum { cudaDevAttrMultiProcessorCount };
inline void cudaGetDevice(int* device) { *device = 0; }
inline void cudaDeviceGetAttribute(int* value, int, int) { *value = emulation::kMultiprocessors; }
inline void cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = emulation::kBlocksOfEach;
}

// One thread runs at a time, and sees what the others have written.
inline void __threadfence() {}
inline unsigned atomicAdd(unsigned* to, unsigned value) {
  const unsigned before = *to;
  *to += value;
  return before;
}
template <class T>
T __ldcg(const T* from) {
  return *from;
}

// The line of the call tells barriers apart: a thread that waits at another one than its neighbours is an
// error.
void __syncthreads(int line = __builtin_LINE());

// (A shuffle that exchanges nothing.)
inline void __syncwarp(int line = __builtin_LINE()) { emulation::shuffle_down(0xffffffffu, 0, 0, line); }

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle_down(mask, bits, delta, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

// CUDA's elementary functions in float32: the exact value, rounded, and then moved up or down by as many ulp
// as the documentation allows (CUDA C++ Programming Guide, "Mathematical Functions"; PTX ISA for the
// approximations). How far depends on the argument's bits, so that the same argument always has the same
// value.
namespace emulation {

inline float perturbed(double exact, float argument, int most_ulp) {
  float value = static_cast<float>(exact);
  uint32_t bits;
  memcpy(&bits, &argument, sizeof bits);
  bits = (bits ^ bits >> 15) * 0x2c1b3c6du;
  const int ulp = static_cast<int>((bits >> 16) % (2 * most_ulp + 1)) - most_ulp;
  if (!std::isfinite(value) || value == 0.0f) return value;
  for (int k = 0; k < (ulp < 0 ? -ulp : ulp); ++k)
    value = std::nextafterf(value, ulp < 0 ? -HUGE_VALF : HUGE_VALF);
  return value;
}

// exp and log have special values of their own that are exact.
inline float expf_model(float x) { return x == 0.0f ? 1.0f : perturbed(std::exp(double{x}), x, 1); }
inline float logf_model(float x) { return x == 1.0f ? 0.0f : perturbed(std::log(double{x}), x, 1); }

}  // namespace emulation

#define expf emulation::expf_model
#define logf emulation::logf_model

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float rcp_approx_ftz(float x) { return flushed(emulation::perturbed(1.0 / double{flushed(x)}, x, 1)); }
// Its bound is 2^-23 relative, at most 2 ulp.
inline float sqrt_approx_ftz(float x) {
  return flushed(emulation::perturbed(std::sqrt(double{flushed(x)}), x, 2));
}

// Conversions, which round to nearest even; CUDA makes any NaN 0x7fff.
struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half h) { return h.bits; }
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline float __half2float(__half h) {
  _Float16 value;
  memcpy(&value, &h, sizeof value);
  return static_cast<float>(value);
}
inline __half __float2half_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  const auto value = static_cast<_Float16>(x);
  __half h;
  memcpy(&h, &value, sizeof h);
  return h;
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  if (std::isnan(x)) return {0x7fff};
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  const uint32_t low = bits & 0xffffu;
  bits >>= 16;
  return {static_cast<uint16_t>(bits + (low > 0x8000u || (low == 0x8000u && (bits & 1u) != 0)))};
}
inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}
