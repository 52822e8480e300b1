#include "common.h"

#include <map>
#include <mutex>

#include "../math/likelihood.h"

namespace fgbg::ops {

DType storage_dtype(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return DType::f64;
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    case at::kBool:
    case at::kByte: return DType::u8;
    default: TORCH_CHECK_TYPE(false, "fgbg: no kernel for dtype ", t.scalar_type());
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
  TORCH_CHECK_VALUE(t.dim() >= (image ? 3 : 1) && t.dim() <= kDims, "fgbg: unsupported rank ", t.dim());
  Shape s = {{1, 1, 1, 1, 1}, 1, 1, t.numel()};
  for (int64_t d = 0; d < t.dim(); ++d) s.size[position(d, t.dim(), image)] = t.size(d);
  s.plane = s.size[2] * s.size[3] * s.size[4];
  s.row = s.size[1] * s.plane;
  return s;
}

}  // namespace

Shape image_shape(const Tensor& image) { return shape_of(image, true); }
Shape latent_shape(const Tensor& latent) { return shape_of(latent, false); }

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

namespace {

template <class T>
bool all_ones_of(const Tensor& grad) {
  const T* values = grad.const_data_ptr<T>();
  const int64_t stride = grad.dim() == 0 ? 0 : grad.stride(0);
  for (int64_t b = 0; b < grad.numel(); ++b)
    if (values[b * stride] != T(1)) return false;
  return true;
}

}  // namespace

bool all_ones(const Tensor& grad) {
  if (grad.is_cuda()) return false;
  return grad.scalar_type() == at::kDouble ? all_ones_of<double>(grad) : all_ones_of<float>(grad);
}

namespace {

constexpr std::string_view kReductions[] = {"none", "sample", "batchmean", "sum", "mean"};
#define FGBG_NAME(L, text) text,
constexpr std::string_view kLikelihoods[] = {FGBG_FOR_EACH_LIKELIHOOD(FGBG_NAME)};
#undef FGBG_NAME
constexpr std::string_view kCompositions[] = {"masked", "blended", "mixture_joint", "mixture_independent"};

// The position of a name in a list, or -1.
template <size_t N>
int find(const std::string_view (&names)[N], std::string_view name) {
  for (size_t i = 0; i < N; ++i)
    if (names[i] == name) return static_cast<int>(i);
  return -1;
}

template <class Enum, size_t N>
Enum parse(const std::string_view (&names)[N], std::string_view name, const char* what) {
  const int i = find(names, name);
  TORCH_CHECK_VALUE(i >= 0, "fgbg: unknown ", what, " '", name, "'");
  return static_cast<Enum>(i);
}

}  // namespace

bool is_reduction(std::string_view name) { return find(kReductions, name) >= 0; }
bool is_likelihood(std::string_view name) { return find(kLikelihoods, name) >= 0; }
Reduction parse_reduction(std::string_view name) { return parse<Reduction>(kReductions, name, "reduction"); }
Likelihood parse_likelihood(std::string_view name) {
  return parse<Likelihood>(kLikelihoods, name, "likelihood");
}
Composition parse_composition(std::string_view name) {
  return parse<Composition>(kCompositions, name, "composition");
}

bool has_scale(Likelihood likelihood) {
#define FGBG_HAS_SCALE(L, text) !std::is_base_of_v<math::Unscaled, math::L>,
  constexpr bool kHasScale[] = {FGBG_FOR_EACH_LIKELIHOOD(FGBG_HAS_SCALE)};
#undef FGBG_HAS_SCALE
  return kHasScale[static_cast<size_t>(likelihood)];
}

at::ScalarType compute_dtype(std::initializer_list<OptionalTensor> operands) {
  for (const OptionalTensor& t : operands)
    if (t.has_value() && t->scalar_type() == at::kDouble) return at::kDouble;
  return at::kFloat;
}

#ifdef FGBG_WITH_CUDA
Tensor zero_counter(const Tensor& like, const c10::cuda::CUDAStream& stream) {
  const auto options = like.options().dtype(at::kInt);
  // A captured graph may be replayed beside any other work, so it has counters of its own, and zeroes them.
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) {
    const Tensor counter = at::empty({1}, options);
    C10_CUDA_CHECK(cudaMemsetAsync(counter.mutable_data_ptr(), 0, sizeof(int32_t), stream.stream()));
    return counter;
  }
  // The kernels of a stream follow each other, and each leaves its counter at 0. Never destroyed: CUDA may be
  // gone by then.
  static std::mutex mutex;
  static auto& counters = *new std::map<std::pair<c10::DeviceIndex, c10::StreamId>, Tensor>;
  const std::lock_guard<std::mutex> lock(mutex);
  Tensor& counter = counters[{stream.device_index(), stream.id()}];
  if (!counter.defined()) counter = at::zeros({1}, options);
  return counter;
}
#endif

double reduction_factor(Reduction reduction, int64_t batch, int64_t elements) {
  if (reduction == Reduction::batchmean) return 1.0 / static_cast<double>(batch);
  if (reduction == Reduction::mean) return 1.0 / static_cast<double>(elements);
  return 1.0;
}

Tensor empty_loss(const Tensor& like, Reduction reduction, at::ScalarType dtype) {
  const auto options = like.options().dtype(dtype);
  return reduction == Reduction::sample ? at::empty({like.size(0)}, options) : at::empty({}, options);
}

void check_operand(const Tensor& tensor, const Tensor& like, const char* name) {
  TORCH_CHECK_VALUE(tensor.sizes() == like.sizes(), "fgbg: ", name, " has shape ", tensor.sizes(),
                    ", expected ", like.sizes());
  TORCH_CHECK_VALUE(tensor.device() == like.device(), "fgbg: ", name, " is on ", tensor.device(),
                    ", expected ", like.device());
}

void check_seed(const Tensor& seed) {
  TORCH_CHECK_TYPE(seed.scalar_type() == at::kLong, "fgbg: seed must be int64, got ", seed.scalar_type());
  TORCH_CHECK_VALUE(seed.numel() == 1, "fgbg: seed must have one element, got ", seed.numel());
}

}  // namespace fgbg::ops
