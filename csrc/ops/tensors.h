// Tensors as the kernels see them: what is accepted, views of operands, results, and running a kernel.
#pragma once

// Not ATen/ATen.h, nor headers of torch/csrc/autograd, which take g++ twice as long.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#ifdef FGBG_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/kernels.h"
#endif
#include "../cpu/kernels.h"
#include "signature.h"

namespace fgbg::ops {

inline bool has_kernels(const at::Device& device) {
#ifdef FGBG_WITH_CUDA
  if (device.is_cuda()) return true;
#endif
  return device.is_cpu();
}

// --- what is accepted -----------------------------------------------------------------------------
// The one place where it is decided for tensors. Eager calls, compiled graphs and direct callers of torch.ops
// come here; sizes may be symbolic. (What Python values are accepted, _checks.py decides: in a compiled graph
// they have a value only there.)

bool is_float(at::ScalarType dtype);
// "float32", without "torch."
std::string dtype_name(at::ScalarType dtype);
std::string float_names();

// A dense float tensor.
void check_float(const char* name, const Tensor& tensor);
// The same, with the shape and on the device of another.
void check_like(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_device(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
void check_strided(const char* name, const Tensor& tensor);
// Floats that broadcast to the shape of another, on its device.
void check_broadcasts(const char* name, const Tensor& tensor, const char* other_name, const Tensor& other);
// One int64 number, on the CPU or on the device of `other`, if that is defined.
void check_seed(const Tensor& seed, const Tensor& other);
// Where the number is a tensor: one float on the device of another tensor, without a gradient.
void check_number(const char* name, const Number& number, const char* other_name, const Tensor& other);
void check_at_least(const char* name, const c10::SymInt& value, int64_t minimum);

// --- views ----------------------------------------------------------------------------------------

DType storage_dtype(const Tensor& tensor);
Shape image_shape(const Tensor& image);  // [B, C, *spatial], 1 to 3 spatial dimensions
// [*batch, *D], at most 5 dimensions, of which `batch_dims` index samples.
Shape latent_shape(const Tensor& latent, int64_t batch_dims = 1);

// `tensor`, broadcast to the sizes behind `shape`, as the kernels see it. Undefined: absent.
View view_of(const Tensor& tensor, const Tensor& like, bool image);

// A number, or the elements of a tensor of at most one dimension.
ScaleView scale_view(const Number& number);
// A number, or a tensor that is broadcast to the sizes of latents.
BroadcastView broadcast_view(const Number& number, const Tensor& like);

// float64 if any operand is, else float32; integers (masks) do not count.
template <class... Tensors>
at::ScalarType compute_dtype(const Tensors&... operands) {
  const bool wide = ((operands.defined() && operands.scalar_type() == at::kDouble) || ...);
  return wide ? at::kDouble : at::kFloat;
}

// A seed that the CPU holds goes to the kernels as a number.
inline Noise noise_of(const Tensor& seed, int64_t offset) {
  const int64_t* data = seed.const_data_ptr<int64_t>();
  const bool known = seed.is_cpu();
  return {known ? nullptr : data, known ? *data : 0, static_cast<uint64_t>(offset)};
}

// What multiplies the sum over the batch; `elements` is what a mean divides by.
double reduction_factor(Reduction reduction, int64_t batch, int64_t elements);
// `grad` is a number, or a vector of one for each sample.
inline Upstream upstream_of(const Tensor& grad, Reduction reduction, double factor) {
  return {grad.const_data_ptr(), reduction == Reduction::sample ? grad.stride(0) : 0, factor};
}

// --- results --------------------------------------------------------------------------------------

// Tensors that a kernel is about to fill.
Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options);
Tensor empty_result_like(const Tensor& like, const at::TensorOptions& options);

// Partial sums of a kernel, on the device of another tensor.
Tensor empty_sums(at::IntArrayRef sizes, const Tensor& like);

// A loss tensor for a reduction other than none.
Tensor empty_loss(const Tensor& like, Reduction reduction, at::ScalarType dtype, int64_t batch_dims = 1);

// The gradients of operands: dense like them, undefined where none is needed.
variable_list empty_gradients(const variable_list& operands, Needs needs);
// Those that are needed; and these again at the places of their operands.
variable_list defined_of(const variable_list& gradients);
variable_list by_operand(const variable_list& needed, Needs needs, size_t operands);

// Multiplies dense gradients of a reduced loss by the upstream gradient: one number, or one for each sample,
// which the leading dimensions index.
void scale_in_place(const variable_list& gradients, const Tensor& grad);

// --- running a kernel -----------------------------------------------------------------------------

inline int64_t elements(const NormalArgs& args) { return args.numel; }
inline int64_t elements(const ScalingArgs& args) { return args.tasks; }
template <class Args>
int64_t elements(const Args& args) {
  return args.shape.numel;
}

inline bool has_sums(const NormalArgs&) { return false; }
inline bool has_sums(const ScalingArgs&) { return false; }
inline bool has_sums(const Sums& args) {
  return std::any_of(std::begin(args.final_reductions), std::end(args.final_reductions),
                     [](const FinalReduction& f) { return static_cast<bool>(f); });
}

// Runs a kernel, and finishes its sums.
template <class Args>
void run_cpu(const cpu::Kernel<Args>& kernel, const Args& args, bool f64) {
  // Below this many elements a second thread costs more than it brings.
  constexpr int64_t kGrain = 16384;
  if (elements(args) > 0) {
    const int64_t cost = std::max<int64_t>(1, kernel.cost(args));
    const int64_t grain = std::max<int64_t>(1, kGrain / cost);
    at::parallel_for(0, kernel.tasks(args), grain,
                     [&](int64_t begin, int64_t end) { kernel.run[f64 ? 1 : 0](args, begin, end); });
  }
  if constexpr (std::is_base_of_v<Sums, Args>)
    for (const FinalReduction& f : args.final_reductions)
      if (f) cpu::final_reduction(f);
}

#ifdef FGBG_WITH_CUDA
// A number on the device that is 0 whenever the next kernel of `stream` starts, and its memory, if it is its
// own.
struct Counter {
  uint32_t* data;
  Tensor memory;
};
Counter zero_counter(const Tensor& like, const c10::cuda::CUDAStream& stream);

// A seed from the default generator of a CUDA device, as its own kernels draw: on the CPU, without a kernel.
// None while a graph is captured, whose replays need another seed each.
std::optional<int64_t> draw_cuda_seed(const at::Device& device);

// The one place that launches: device guard, current stream, launch check.
template <class Args, class Launch>
void on_cuda(const Tensor& like, Args& args, Launch launch) {
  if (elements(args) == 0 && !has_sums(args)) return;
  const c10::cuda::CUDAGuard guard(like.device());
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  Counter counter;
  if constexpr (std::is_base_of_v<Sums, Args>) {
    if (has_sums(args)) {
      counter = zero_counter(like, stream);
      args.blocks_done = counter.data;
    }
  }
  launch(stream.stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}
#define FGBG_RUN(kernel, args, f64, like)                                                                    \
  (like).is_cuda() ? ops::on_cuda(like, args, [&](cuda::Stream stream) { cuda::kernel(args, f64, stream); }) \
                   : ops::run_cpu(cpu::kernels().kernel, args, f64)
#define FGBG_ON_DEVICE(function, args, like) ((like).is_cuda() ? cuda::function(args) : cpu::function(args))
#else
#define FGBG_RUN(kernel, args, f64, like) ops::run_cpu(cpu::kernels().kernel, args, f64)
#define FGBG_ON_DEVICE(function, args, like) cpu::function(args)
#endif

}  // namespace fgbg::ops
