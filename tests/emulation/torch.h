// Compiles csrc/ops in its CUDA configuration for a machine without CUDA. Included ahead of it (-include).
#pragma once

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#define FGBG_WITH_CUDA
#define FGBG_NO_CPU_CACHE  // every tensor lies between guard pages
// CPU tensors take the CUDA path. (After the headers of torch, which declare it.)
#define is_cuda is_cpu

struct CUstream_st;
namespace c10::cuda {
struct CUDAGuard {
  explicit CUDAGuard(c10::Device) {}
  c10::Device current_device() const { return {c10::DeviceType::CPU, 0}; }
};
struct CUDAStream {
  CUstream_st* stream() const { return nullptr; }
  c10::DeviceIndex device_index() const { return 0; }
  c10::StreamId id() const { return stream_id; }
  // Another one each time that the emulation starts: a kernel that failed leaves its stream unusable. Odd, as
  // those of torch's pool are.
  inline static c10::StreamId stream_id = 1;
};
inline CUDAStream getCurrentCUDAStream() { return {}; }
enum class CaptureStatus { None, Active };
extern CaptureStatus capture_status;
inline CaptureStatus currentStreamCaptureStatusMayInitCtx() { return capture_status; }
}  // namespace c10::cuda
#define C10_CUDA_KERNEL_LAUNCH_CHECK()
#define C10_CUDA_CHECK(call) call
void cudaMalloc(void** to, size_t bytes);
inline void cudaStreamSynchronize(CUstream_st*) {}
void cudaMemsetAsync(void* to, int value, size_t bytes, CUstream_st*);

// The default generator of a CUDA device, from that of the CPU, so that torch.manual_seed governs it.
namespace at {
struct PhiloxCudaState {
  struct {
    uint64_t val;
  } seed_, offset_;
};
struct CUDAGeneratorImpl : CPUGeneratorImpl {
  PhiloxCudaState philox_cuda_state(uint64_t) { return {{current_seed()}, {random64()}}; }
};
namespace cuda::detail {
inline const Generator& getDefaultCUDAGenerator(c10::DeviceIndex) {
  return at::detail::getDefaultCPUGenerator();
}
}  // namespace cuda::detail
}  // namespace at

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
