// Compiles csrc/ops in its CUDA configuration for a machine without CUDA. Included ahead of it (-include).
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/library.h>

#define FGBG_WITH_CUDA
// CPU tensors take the CUDA path. (After the headers of torch, which declare it.)
#define is_cuda is_cpu

struct CUstream_st;
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
};
struct Stream {
  CUstream_st* stream() const { return nullptr; }
};
inline Stream getCurrentCUDAStream() { return {}; }
}  // namespace c10::cuda
#define C10_CUDA_KERNEL_LAUNCH_CHECK()

// The ops exist already, with their CPU kernels: no schemas, and implementations for start() to put in place.
namespace emulation {
using Implement = void (*)(torch::Library&);
bool add_implementation(c10::DispatchKey, Implement);
}  // namespace emulation

#undef TORCH_LIBRARY_FRAGMENT
#define TORCH_LIBRARY_FRAGMENT(name, m) \
  [[maybe_unused]] static void C10_CONCATENATE(define_, C10_UID)(torch::Library & m)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(name, key, m) EMULATED_IMPL(key, m, C10_UID)
#define EMULATED_IMPL(key, m, uid)                                                            \
  static void C10_CONCATENATE(implement_, uid)(torch::Library&);                              \
  [[maybe_unused]] static const bool C10_CONCATENATE(implemented_, uid) =                     \
      emulation::add_implementation(c10::DispatchKey::key, C10_CONCATENATE(implement_, uid)); \
  void C10_CONCATENATE(implement_, uid)(torch::Library & m)
