// Where the CUDA kernels of slots keep a number for each slot of the pixels of a thread.
#pragma once

#include "storage.cuh"

namespace fgbg::cuda {

// Bytes of a thread for each slot, and of a block: of more slots they lie in scratch memory.
constexpr int64_t kScratch = kVector * sizeof(float), kMaxScratch = 32 << 10;

}  // namespace fgbg::cuda
