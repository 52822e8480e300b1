// What every op does with tensors: describe them to the kernels, run on the right device, finish a sum.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#ifdef FGBG_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/kernels.h"
#endif
#include "../cpu/kernels.h"

namespace fgbg::ops {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

DType storage_dtype(const Tensor& tensor);  // TypeError where there is no kernel for it
Shape image_shape(const Tensor& image);     // [B, C, *spatial], 1 to 3 spatial dimensions
Shape latent_shape(const Tensor& latent);   // [B, *D], at most 5 dimensions

// `tensor`, broadcast to the sizes behind `shape`, as the kernels see it. Undefined: absent.
View view_of(const Tensor& tensor, const Tensor& like, bool image);
inline View view_of(const OptionalTensor& tensor, const Tensor& like, bool image) {
  return tensor.has_value() ? view_of(*tensor, like, image) : View{};
}

bool is_reduction(std::string_view name);
bool is_likelihood(std::string_view name);
Reduction parse_reduction(std::string_view name);
Likelihood parse_likelihood(std::string_view name);
Composition parse_composition(std::string_view name);
bool has_scale(Likelihood);

// float64 if any operand is, else float32; integers (masks) do not count.
at::ScalarType compute_dtype(std::initializer_list<OptionalTensor> operands);

// What multiplies the sum over the batch; `elements` is what a mean divides by.
double reduction_factor(Reduction reduction, int64_t batch, int64_t elements);
inline Upstream upstream_of(const Tensor& grad, Reduction reduction, double factor) {
  return {grad.const_data_ptr(), reduction == Reduction::sample ? grad.stride(0) : 0, factor, false};
}

// A loss tensor for a reduction other than none.
Tensor empty_loss(const Tensor& like, Reduction reduction, at::ScalarType dtype);

// Tensors that a kernel is about to fill: see results.cpp.
Tensor empty_result(at::IntArrayRef sizes, const at::TensorOptions& options);
Tensor empty_result_like(const Tensor& like, const at::TensorOptions& options);

// The gradients of operands: dense like them, undefined where the caller needs none.
template <size_t N>
using Gradients = std::array<Tensor, N>;

template <size_t N>
Gradients<N> empty_gradients(const OptionalTensor (&operands)[N], const std::array<bool, N>& needs) {
  Gradients<N> out;
  for (size_t i = 0; i < N; ++i)
    if (needs[i] && operands[i]) out[i] = empty_result_like(*operands[i], operands[i]->options());
  return out;
}

// As results of an op: those that nobody needs have no elements, or are left out of a list.
template <size_t N>
auto returned(const Gradients<N>& gradients, const Tensor& like) {
  return std::apply(
      [&](const auto&... g) { return std::tuple((g.defined() ? g : at::empty({0}, like.options()))...); },
      gradients);
}
template <size_t N>
std::vector<Tensor> listed(const Gradients<N>& gradients) {
  std::vector<Tensor> out;
  for (const Tensor& g : gradients)
    if (g.defined()) out.push_back(g);
  return out;
}
template <size_t N>
Gradients<N> from_list(at::TensorList list, const std::array<bool, N>& needs) {
  Gradients<N> out;
  for (size_t i = 0, next = 0; i < N; ++i)
    if (needs[i]) out[i] = list[next++];
  return out;
}

// Whether the gradient that arrives at a reduced loss is one, for every sample. Of a GPU's numbers, which
// cannot be looked at without waiting for them, it is not known: there the kernels look.
bool all_ones(const Tensor& grad);

// Direct callers of torch.ops get these; fgbg_cuda's Python functions check first and say more.
void check_operand(const Tensor& tensor, const Tensor& like, const char* name);
void check_seed(const Tensor& seed);

inline int64_t elements(const NormalArgs& args) { return args.numel; }
template <class Args>
int64_t elements(const Args& args) {
  return args.shape.numel;
}

inline bool has_sums(const NormalArgs&) { return false; }
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
// A number on the device that is 0 whenever a kernel of `stream` starts.
Tensor zero_counter(const Tensor& like, const c10::cuda::CUDAStream& stream);

// The one place that launches: device guard, current stream, launch check.
template <class Args, class Launch>
void on_cuda(const Tensor& like, Args& args, Launch launch) {
  if (elements(args) == 0 && !has_sums(args)) return;
  const c10::cuda::CUDAGuard guard(like.device());
  const c10::cuda::CUDAStream stream = c10::cuda::getCurrentCUDAStream();
  Tensor counter;
  if constexpr (std::is_base_of_v<Sums, Args>) {
    if (has_sums(args)) {
      counter = zero_counter(like, stream);
      args.blocks_done = reinterpret_cast<uint32_t*>(counter.mutable_data_ptr<int32_t>());
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
