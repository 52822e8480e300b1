#include "tensors.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/ScalarType.h>

#include "../cpu/caching_allocator.h"

#ifdef FGBG_WITH_CUDA
#include <ATen/cuda/CUDAGeneratorImpl.h>

#include <map>
#include <mutex>

#include "../math/philox.h"
#endif

namespace fgbg::ops {

bool is_float(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kDouble;
}

std::string dtype_name(at::ScalarType dtype) {
  return "torch." + std::string(c10::getDtypeNames(dtype).first);
}
std::string float_names() { return "torch.float64, torch.float32, torch.bfloat16, torch.float16"; }

void check_strided(const char* name, const Tensor& t) {
  TORCH_CHECK_VALUE(!t.is_nested(), name, " is nested, expected a tensor of layout torch.strided");
  TORCH_CHECK_VALUE(t.layout() == at::kStrided, name, " is of layout ", t.layout(),
                    ", expected a tensor of layout torch.strided");
}

void check_float(const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(is_float(t.scalar_type()), name, " has dtype ", dtype_name(t.scalar_type()),
                   ", expected one of ", float_names());
  check_strided(name, t);
}

void check_device(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  TORCH_CHECK_VALUE(t.device() == other.device(), name, " is on ", t.device(), ", expected the device of ",
                    other_name, ", ", other.device());
}

void check_like(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  check_float(name, t);
  TORCH_CHECK_VALUE(t.sym_sizes() == other.sym_sizes(), name, " has shape ", t.sym_sizes(),
                    ", expected that of ", other_name, ", ", other.sym_sizes());
  check_device(name, t, other_name, other);
}

void check_broadcasts(const char* name, const Tensor& t, const char* other_name, const Tensor& other) {
  check_float(name, t);
  const int64_t missing = other.dim() - t.dim();
  bool fits = missing >= 0;
  for (int64_t d = 0; fits && d < t.dim(); ++d)
    fits = t.sym_size(d) == 1 || t.sym_size(d) == other.sym_size(missing + d);
  TORCH_CHECK_VALUE(fits, name, " has shape ", t.sym_sizes(), ", expected one that broadcasts to that of ",
                    other_name, ", ", other.sym_sizes());
  check_device(name, t, other_name, other);
}

void check_seed(const Tensor& seed, const Tensor& other) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "seed has dtype ", dtype_name(seed.scalar_type()),
                   ", expected torch.int64");
  TORCH_CHECK_VALUE(seed.sym_numel() == 1, "seed has shape ", seed.sym_sizes(), ", expected one element");
  TORCH_CHECK_VALUE(!other.defined() || seed.is_cpu() || seed.device() == other.device(), "seed is on ",
                    seed.device(), ", expected the CPU or the device of mu, ", other.device());
}

void check_number(const char* name, const Number& number, const char* other_name, const Tensor& other) {
  const Tensor& t = number.tensor;
  if (!t.defined()) return;
  check_float(name, t);
  TORCH_CHECK_VALUE(t.sym_numel() == 1, name, " has shape ", t.sym_sizes(), ", expected one element");
  TORCH_CHECK_VALUE(!t.requires_grad(), name, " requires a gradient, expected a number, which gets none");
  check_device(name, t, other_name, other);
}

void check_at_least(const char* name, const c10::SymInt& value, int64_t minimum) {
  TORCH_CHECK_VALUE(value >= minimum, name, " is ", value, ", expected an integer from ", minimum,
                    " to 2**63 - 1");
}

DType storage_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kBool:
    case at::kByte: return DType::u8;
    default: TORCH_CHECK_TYPE(false, "no kernel for dtype ", dtype_name(t.scalar_type()));
  }
}

namespace {

// Position among [B, C, S0, S1, S2] of dimension d of a tensor of `rank` dimensions: the batch leads,
// an image's channels follow, everything else is aligned to the right.
int position(int64_t d, int64_t rank, bool image) {
  if (d == 0 || (image && d == 1)) return static_cast<int>(d);
  return static_cast<int>(kDims - rank + d);
}

Shape shape_of(const Tensor& t, bool image) {
  TORCH_CHECK_VALUE(t.dim() <= kDims, "kernels take up to ", kDims, " dimensions, got ", t.dim());
  Shape s = {{1, 1, 1, 1, 1}, 1, 1, t.numel(), 1, 1};
  for (int64_t d = 0; d < t.dim(); ++d) s.size[position(d, t.dim(), image)] = t.size(d);
  s.plane = s.size[2] * s.size[3] * s.size[4];
  s.row = s.size[1] * s.plane;
  s.samples = s.size[0];
  return s;
}

}  // namespace

Shape image_shape(const Tensor& image) { return shape_of(image, true); }
Shape latent_shape(const Tensor& latent, int64_t batch_dims) {
  Shape s = shape_of(latent, false);
  for (int64_t d = 1; d < batch_dims; ++d) {
    const int last = position(d, latent.dim(), false);
    for (; s.leading <= last; ++s.leading) s.samples *= s.size[s.leading];
  }
  s.row = 1;
  for (int d = s.leading; d < kDims; ++d) s.row *= s.size[d];
  return s;
}

View view_of(const Tensor& tensor, const Tensor& like, bool image) {
  View v;
  if (!tensor.defined()) return v;
  const Tensor t = tensor.sizes() == like.sizes() ? tensor : tensor.expand_as(like);
  const Shape s = shape_of(t, image);
  v.data = const_cast<void*>(t.const_data_ptr());
  v.dtype = storage_dtype(t);
  for (int64_t d = 0; d < t.dim(); ++d) v.stride[position(d, t.dim(), image)] = t.stride(d);

  bool flat = true, first = true;
  int64_t expected = 0;
  v.plane_stride = 1;
  for (int d = kDims - 1; d >= 2; --d) {
    if (s.size[d] == 1) continue;
    if (first) v.plane_stride = v.stride[d];
    flat = flat && (first || v.stride[d] == expected);
    expected = v.stride[d] * s.size[d];
    first = false;
  }
  if (!flat) v.plane_stride = -1;

  for (int d = kDims - 1; d >= 0; --d) {
    if (s.size[d] == 1) continue;
    if (v.stride[d] != v.run) break;
    v.run *= s.size[d];
  }

  const int64_t bytes = static_cast<int64_t>(t.element_size());
  v.vector_aligned = reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
  for (int d = 0; d < 2; ++d) v.vector_aligned &= s.size[d] == 1 || v.stride[d] * bytes % 16 == 0;
  return v;
}

ScaleView scale_view(const Number& number) {
  if (!number.tensor.defined()) return {nullptr, DType::f32, 0, number.value};
  const Tensor& t = number.tensor;
  return {t.const_data_ptr(), storage_dtype(t), t.numel() == 1 ? 0 : t.stride(0), number.value};
}

BroadcastView broadcast_view(const Number& number, const Tensor& like) {
  if (!number.tensor.defined() || number.tensor.numel() == 1) return {{}, scale_view(number)};
  return {view_of(number.tensor, like, false), {}};
}

#ifdef FGBG_WITH_CUDA
namespace {

bool capturing() {
  return c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None;
}

// Counters that are 0 from the start. Not from torch's allocator, whose memory may belong to a graph, and
// never freed: CUDA may be gone by then.
class Counters {
 public:
  // Null if there is none: they are made by a call that is not captured, such as the warm-up that a capture
  // needs.
  uint32_t* of_stream(const c10::cuda::CUDAStream& stream) {
    uint32_t*& counter = of_streams_[stream.id()];
    if (!counter) counter = next(stream);
    return counter;
  }
  // A captured graph may be replayed beside any other work, so its launches have counters of their own, for
  // good.
  uint32_t* of_graph() { return zeros_ && next_ < kCount ? zeros_ + next_++ : nullptr; }

 private:
  static constexpr int64_t kCount = 16384;

  uint32_t* next(const c10::cuda::CUDAStream& stream) {
    if (!zeros_) {
      void* memory = nullptr;
      C10_CUDA_CHECK(cudaMalloc(&memory, kCount * sizeof(uint32_t)));
      C10_CUDA_CHECK(cudaMemsetAsync(memory, 0, kCount * sizeof(uint32_t), stream.stream()));
      C10_CUDA_CHECK(
          cudaStreamSynchronize(stream.stream()));  // once for each device: other streams use it too
      zeros_ = static_cast<uint32_t*>(memory);
    }
    return next_ < kCount ? zeros_ + next_++ : nullptr;
  }

  uint32_t* zeros_ = nullptr;
  int64_t next_ = 0;
  std::map<c10::StreamId, uint32_t*> of_streams_;
};

// Streams of torch's own pool have an odd id, and the default stream 0. Any other id is the handle of a
// stream that somebody else made: such a handle can stand for several streams, of different threads or one
// after the other.
bool is_external(const c10::cuda::CUDAStream& stream) { return stream.id() != 0 && stream.id() % 2 == 0; }

}  // namespace

Counter zero_counter(const Tensor& like, const c10::cuda::CUDAStream& stream) {
  static std::mutex mutex;
  static auto& of_devices = *new std::map<c10::DeviceIndex, Counters>;
  uint32_t* counter = nullptr;
  if (!is_external(stream)) {
    const std::lock_guard<std::mutex> lock(mutex);
    Counters& counters = of_devices[stream.device_index()];
    // The kernels of a stream follow each other, and each leaves its counter at 0.
    counter = capturing() ? counters.of_graph() : counters.of_stream(stream);
  }
  if (counter) return {counter, {}};
  const Tensor memory = at::empty({1}, like.options().dtype(at::kInt));
  counter = reinterpret_cast<uint32_t*>(memory.mutable_data_ptr<int32_t>());
  C10_CUDA_CHECK(cudaMemsetAsync(counter, 0, sizeof(uint32_t), stream.stream()));
  return {counter, memory};
}

std::optional<int64_t> draw_cuda_seed(const at::Device& device) {
  const c10::cuda::CUDAGuard guard(device);
  if (capturing()) return std::nullopt;
  at::Generator generator = at::cuda::detail::getDefaultCUDAGenerator(guard.current_device().index());
  at::PhiloxCudaState state;
  {
    const std::lock_guard<std::mutex> lock(generator.mutex());
    state = at::check_generator<at::CUDAGeneratorImpl>(generator)->philox_cuda_state(4);
  }
  // One block of our stream of the state's seed, far from where noise of that seed would be.
  const auto bits = math::philox4x32_10<uint32_t>(
      {static_cast<uint32_t>(state.offset_.val), static_cast<uint32_t>(state.offset_.val >> 32), 0x73656564u,
       0u},
      static_cast<uint32_t>(state.seed_.val), static_cast<uint32_t>(state.seed_.val >> 32));
  return static_cast<int64_t>((static_cast<uint64_t>(bits.x1) << 32 | bits.x0) >> 1);
}
#endif

double reduction_factor(Reduction reduction, int64_t batch, int64_t elements) {
  if (reduction == Reduction::batchmean) return 1.0 / static_cast<double>(batch);
  if (reduction == Reduction::mean) return 1.0 / static_cast<double>(elements);
  return 1.0;
}

Tensor empty_result(c10::SymIntArrayRef sizes, const at::TensorOptions& options) {
  if (options.device().is_cpu())
    if (const auto known = c10::asIntArrayRefSlowOpt(sizes))
      return cpu::empty(*known, c10::typeMetaToScalarType(options.dtype()));
  return at::empty_symint(sizes, options);
}

Tensor empty_result_like(const Tensor& like, const at::TensorOptions& options) {
  return options.device().is_cpu() ? cpu::empty_like(like, c10::typeMetaToScalarType(options.dtype()))
                                   : at::empty_like(like, options);
}

Tensor empty_sums(at::IntArrayRef sizes, const Tensor& like) {
  return like.is_cpu() ? cpu::empty(sizes, at::kDouble) : at::empty(sizes, like.options().dtype(at::kDouble));
}

Tensor empty_loss(const Tensor& like, Reduction reduction, at::ScalarType dtype, int64_t batch_dims) {
  const auto options = like.options().dtype(dtype);
  if (reduction != Reduction::sample) return empty_result({}, options);
  return empty_result(like.sym_sizes().slice(0, static_cast<size_t>(batch_dims)), options);
}

variable_list empty_gradients(const variable_list& operands, Needs needs) {
  variable_list out(operands.size());
  for (size_t i = 0; i < operands.size(); ++i)
    if (needs_operand(needs, i) && operands[i].defined())
      out[i] = empty_result_like(operands[i], operands[i].options());
  return out;
}

variable_list defined_of(const variable_list& gradients) {
  variable_list out;
  out.reserve(gradients.size());
  for (const Tensor& g : gradients)
    if (g.defined()) out.push_back(g);
  return out;
}

variable_list by_operand(const variable_list& needed, Needs needs, size_t operands) {
  variable_list out(operands);
  for (size_t i = 0, next = 0; i < operands; ++i)
    if (needs_operand(needs, i)) out[i] = needed[next++];
  return out;
}

void scale_in_place(const variable_list& gradients, const Tensor& upstream) {
  const bool of_samples = upstream.dim() > 0;
  const Tensor grad = of_samples ? upstream.reshape(-1) : upstream;
  ScalingArgs args{};
  args.upstream = upstream_of(grad, of_samples ? Reduction::sample : Reduction::sum, 1.0);
  for (const Tensor& g : gradients) {
    if (g.numel() == 0) continue;
    const int64_t row = of_samples ? g.numel() / grad.numel() : g.numel();
    bool in_order = true;  // whether the samples follow each other
    int64_t next = row;
    for (int64_t d = upstream.dim() - 1; d >= 0; next *= g.size(d--))
      in_order &= g.size(d) == 1 || g.stride(d) == next;
    if (!in_order) {
      auto sizes = upstream.sizes().vec();
      sizes.resize(static_cast<size_t>(g.dim()), 1);
      g.copy_(g.to(grad.scalar_type()).mul_(upstream.reshape(sizes)));
      continue;
    }
    args.gradients[args.count++] = {g.mutable_data_ptr(), storage_dtype(g), g.numel(), row};
    args.tasks += segments_of(g.numel(), ScalingArgs::kTask);
  }
  if (args.count > 0) FGBG_RUN(scale, args, grad.scalar_type() == at::kDouble, gradients[0]);
}

}  // namespace fgbg::ops
