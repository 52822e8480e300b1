// How work is cut for the CUDA kernels. An item is a segment of one sample; a team takes one item after the
// other and writes the item's own partial sums, in an order that the sizes alone decide.
#pragma once

#include <algorithm>
#include <map>
#include <utility>

#include "storage.cuh"

namespace fgbg::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// The minimum occupancy, in blocks per multiprocessor, which bounds the registers of a kernel. Weights and
// maps of scales need many.
template <class F>
constexpr int kBlocks = F::kMaps ? 1 : 2;
// The code for GPUs before Hopper takes a few registers more, which then would be in memory.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kBeforeHopper = true;
#else
constexpr bool kBeforeHopper = false;
#endif

// A team is a warp where samples are short, and else a block. An item is short, so that small tensors occupy
// many multiprocessors and the last round of large ones is a small part of all, but longer where that would
// make too many sums for the one block that adds them (and never as long as 2^31). A segment does not depend
// on the format: sums have the same order for all that have the same width.
constexpr int64_t kWarpSegment = 256, kBlockSegment = 2048, kMaxSums = 8192;

struct Cut {
  int team;         // threads
  int64_t segment;  // elements
};
inline Cut cut_of(const Shape& shape, int64_t extent) {
  Cut cut = extent < kBlockSegment ? Cut{kWarp, kWarpSegment} : Cut{kThreads, kBlockSegment};
  while (cut.segment < extent && shape.samples * segments_of(extent, cut.segment) > kMaxSums)
    cut.segment *= 2;
  return cut;
}

// threadIdx.x, read where it is needed rather than kept in a register from the beginning of a kernel to its
// end.
__device__ __forceinline__ int thread_of_block() {
#if defined(__CUDA_ARCH__)
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
#else
  return static_cast<int>(threadIdx.x);
#endif
}

// How many blocks of a kernel the device has room for at a time.
inline int64_t resident_blocks(const void* kernel, size_t shared) {
  int device = 0;
  cudaGetDevice(&device);
  // Constant, so it is queried once rather than at every launch.
  thread_local std::map<std::pair<int, std::pair<const void*, size_t>>, int64_t> known;
  int64_t& blocks = known[{device, {kernel, shared}}];
  if (blocks == 0) {
    int multiprocessors = 1, each = 1;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kernel, kThreads, shared);
    blocks = std::max<int64_t>(1, static_cast<int64_t>(multiprocessors) * each);
  }
  return blocks;
}

// Launches `kernel` with a team of so many threads for each item of work, as long as the device has room;
// beyond that each team takes several. Without any work it is launched if there is a sum to be finished.
// `shared`: bytes of dynamic shared memory.
template <class Args>
void launch(void (*kernel)(Args), int64_t items, int team, const Args& args, bool finishes, size_t shared,
            cudaStream_t stream) {
  const int64_t wanted = std::max<int64_t>(finishes ? 1 : 0, (items * team + kThreads - 1) / kThreads);
  if (wanted == 0) return;
  const int64_t blocks = std::min(wanted, resident_blocks(reinterpret_cast<const void*>(kernel), shared));
  kernel<<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(args);
}

}  // namespace fgbg::cuda
