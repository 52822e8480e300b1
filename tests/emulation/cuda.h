// As much of the CUDA language as the kernels of csrc/cuda use, for g++. Included ahead of each source
// (-include).
//
// All threads are fibers of one thread of the machine, so that threadIdx and shared memory can be
// ordinary variables: cuda.cpp sets them whenever it goes from one fiber to another. g++ sees no
// __CUDA_ARCH__ and no __CUDACC__, so csrc/math takes its host branches.
#pragma once

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
void run(const void* kernel, int blocks, int threads, const std::function<void()>& thread);

// __shared__ T name[count], as __init__.py rewrites it: T* name = shared<T>(count); and __shared__ T name.
// Poisoned before each block. Arrays end where a guard page begins, single variables do not.
void* shared_memory(size_t bytes, int line, bool at_end);
template <class T>
T* shared(size_t count, int line = __builtin_LINE()) {
  return static_cast<T*>(shared_memory(count * sizeof(T), line, true));
}
template <class T>
T& shared_variable(int line = __builtin_LINE()) {
  return *static_cast<T*>(shared_memory(sizeof(T), line, false));
}

// Waits until the whole warp is there; the value of the lane `delta` above, or one's own at the end.
uint64_t shuffle_down(unsigned mask, uint64_t bits, unsigned delta, int line);

// How many threads may run at a time, and of how many multiprocessors: few, so that small tensors suffice for
// a thread to get several items of work.
constexpr int kMultiprocessors = 3, kBlocksOfEach = 2;

// kernel<<<blocks, threads, shared, stream>>>(args), as __init__.py rewrites it:
// launch(kernel, blocks, threads, shared, stream)(args)
template <class Args>
auto launch(void (*kernel)(Args), int blocks, int threads, int, cudaStream_t) {
  return [=](const Args& args) {
    run(reinterpret_cast<const void*>(kernel), blocks, threads, [&] { kernel(args); });
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

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = emulation::shuffle_down(mask, bits, delta, line);
  memcpy(&value, &bits, sizeof(T));
  return value;
}
