// Masked, blended and mixture reconstruction losses: tensors to kernels.
#include <torch/library.h>

#include "common.h"

namespace fgbg::ops {
namespace {

using std::string_view;

ScaleView scale_of(const OptionalTensor& tensor, double value, const Tensor& fg, const char* name) {
  if (!tensor) return {nullptr, DType::f32, 0, value};
  TORCH_CHECK_VALUE(tensor->dim() <= 1 && (tensor->numel() == 1 || tensor->numel() == fg.size(1)),
                    "fgbg: ", name, " must have one element or one per channel, got shape ", tensor->sizes());
  TORCH_CHECK_VALUE(tensor->device() == fg.device(), "fgbg: ", name, " is on ", tensor->device());
  return {tensor->const_data_ptr(), storage_dtype(*tensor), tensor->numel() == 1 ? 0 : tensor->stride(0),
          value};
}

struct Loss {
  Tensor fg;
  OptionalTensor bg;
  Tensor target, mask;
  OptionalTensor fg_scale, bg_scale;
  double fg_scale_value, bg_scale_value;
  string_view composition;
  bool mask_is_logits;
  string_view likelihood;
  double fg_weight, bg_weight;
  bool normalize_area;
  string_view reduction;

  ReconstructionArgs args() const {
    if (bg) check_operand(*bg, fg, "bg");
    check_operand(target, fg, "target");
    auto mask_sizes = fg.sizes().vec();
    TORCH_CHECK_VALUE(fg.dim() >= 3 && fg.size(1) > 0, "fgbg: fg has shape ", fg.sizes());
    TORCH_CHECK_VALUE(mask.dim() == fg.dim() && (mask.size(1) == 1 || mask.size(1) == fg.size(1)),
                      "fgbg: mask has shape ", mask.sizes());
    mask_sizes[1] = mask.size(1);
    TORCH_CHECK_VALUE(mask.sizes() == at::IntArrayRef(mask_sizes), "fgbg: mask has shape ", mask.sizes());
    TORCH_CHECK_VALUE(mask.device() == fg.device(), "fgbg: mask is on ", mask.device());
    ReconstructionArgs a{};
    a.shape = image_shape(fg);
    a.composition = parse_composition(composition);
    a.likelihood = parse_likelihood(likelihood);
    a.mask_kind = mask_is_logits ? MaskKind::logits : MaskKind::probability;
    a.mask_per_channel = mask.size(1) == fg.size(1) && fg.size(1) > 1;
    TORCH_CHECK_VALUE(a.composition != Composition::mixture_joint || !a.mask_per_channel,
                      "fgbg: a joint mixture takes a mask of one channel");
    const bool masked = a.composition == Composition::masked;
    a.fg_weight = masked ? fg_weight : 1.0;
    a.bg_weight = masked ? bg_weight : 0.0;
    a.normalize_area = masked && normalize_area;
    a.fg = view_of(fg, fg, true);
    a.bg = view_of(bg, fg, true);
    a.target = view_of(target, fg, true);
    a.mask = view_of(mask, fg, true);
    a.fg_scale = scale_of(fg_scale, fg_scale_value, fg, "fg_scale");
    a.bg_scale = scale_of(bg_scale, bg_scale_value, fg, "bg_scale");
    return a;
  }

  at::ScalarType dtype() const { return compute_dtype({fg, bg, target, mask, fg_scale, bg_scale}); }

  bool joint() const { return composition == "mixture_joint"; }

  int64_t elements() const { return joint() ? fg.numel() / fg.size(1) : fg.numel(); }
};

std::tuple<Tensor, Tensor> reconstruction_loss(
    const Tensor& fg, const OptionalTensor& bg, const Tensor& target, const Tensor& mask,
    const OptionalTensor& fg_scale, const OptionalTensor& bg_scale, double fg_scale_value,
    double bg_scale_value, string_view composition, bool mask_is_logits, string_view likelihood,
    double fg_weight, double bg_weight, bool normalize_area, string_view reduction_name, bool return_terms) {
  const Loss loss{fg,
                  bg,
                  target,
                  mask,
                  fg_scale,
                  bg_scale,
                  fg_scale_value,
                  bg_scale_value,
                  composition,
                  mask_is_logits,
                  likelihood,
                  fg_weight,
                  bg_weight,
                  normalize_area,
                  reduction_name};
  ReconstructionArgs args = loss.args();
  const Reduction reduction = parse_reduction(reduction_name);
  TORCH_CHECK_VALUE(!(args.normalize_area && reduction == Reduction::none),
                    "fgbg: normalize_area has no unreduced kernel");
  const auto dtype = loss.dtype();
  const auto options = fg.options().dtype(dtype);
  const bool masked = args.composition == Composition::masked;
  const bool wants_terms = masked && (return_terms || args.normalize_area);

  Tensor out, partial;
  Tensor terms =
      at::empty(wants_terms ? at::IntArrayRef({kTerms, fg.size(0)}) : at::IntArrayRef({0}), options);
  if (reduction == Reduction::none) {
    out = loss.joint() ? at::empty(mask.sizes(), options) : at::empty_like(fg, options);
    args.loss = view_of(out, fg, true);
  } else {
    out = empty_loss(fg, reduction, dtype);
  }
  if (reduction != Reduction::none || wants_terms) {
    const int64_t segments = FGBG_ON_DEVICE(pixel_segments, args.shape, fg);
    partial = at::empty({kTerms, fg.size(0), fg.numel() > 0 ? segments : 0}, options.dtype(at::kDouble));
    args.partial = partial.mutable_data_ptr<double>();
  }
  if (fg.numel() > 0) FGBG_RUN(reconstruction_forward, args, dtype == at::kDouble, fg);
  if (partial.defined()) {
    FinishArgs f{};
    f.partial = partial.const_data_ptr<double>();
    f.terms = kTerms;
    f.batch = partial.size(1);
    f.segments = partial.size(2);
    f.reduction = reduction;
    f.factor = reduction_factor(reduction, f.batch, loss.elements());
    f.fg_weight = args.fg_weight;
    f.bg_weight = args.bg_weight;
    f.normalize_area = args.normalize_area;
    f.channels = static_cast<double>(fg.size(1));
    f.dtype = kernel_dtype(dtype);
    f.loss = reduction == Reduction::none ? nullptr : out.mutable_data_ptr();
    f.out_terms = wants_terms ? terms.mutable_data_ptr() : nullptr;
    finish(f, fg);
  }
  return {out, terms};
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients reconstruction_loss_backward(const OptionalTensor& grad_loss, const OptionalTensor& grad_terms,
                                       const OptionalTensor& terms, const Tensor& fg,
                                       const OptionalTensor& bg, const Tensor& target, const Tensor& mask,
                                       const OptionalTensor& fg_scale, const OptionalTensor& bg_scale,
                                       double fg_scale_value, double bg_scale_value, string_view composition,
                                       bool mask_is_logits, string_view likelihood, double fg_weight,
                                       double bg_weight, bool normalize_area, string_view reduction_name,
                                       std::array<bool, 6> needs) {
  const Loss loss{fg,
                  bg,
                  target,
                  mask,
                  fg_scale,
                  bg_scale,
                  fg_scale_value,
                  bg_scale_value,
                  composition,
                  mask_is_logits,
                  likelihood,
                  fg_weight,
                  bg_weight,
                  normalize_area,
                  reduction_name};
  ReconstructionArgs args = loss.args();
  const Reduction reduction = parse_reduction(reduction_name);
  const auto dtype = loss.dtype();
  Gradients out{empty_gradient(fg, needs[0], fg),       empty_gradient(bg, needs[1], fg),
                empty_gradient(target, needs[2], fg),   empty_gradient(mask, needs[3], fg),
                empty_gradient(fg_scale, needs[4], fg), empty_gradient(bg_scale, needs[5], fg)};
  auto& [d_fg, d_bg, d_target, d_mask, d_fg_scale, d_bg_scale] = out;
  if (fg.numel() == 0) {
    for (Tensor* t : {&d_mask, &d_fg_scale, &d_bg_scale}) t->zero_();
    return out;
  }
  Tensor upstream = grad_loss.value_or(Tensor());
  // A gradient that reaches the terms alone.
  if (!upstream.defined())
    upstream =
        reduction == Reduction::none ? at::zeros({}, fg.options().dtype(dtype)).expand_as(fg) : Tensor();
  if (reduction == Reduction::none)
    args.grad_loss_elements = view_of(upstream, fg, true);
  else if (upstream.defined())
    args.grad_loss =
        upstream_of(upstream, reduction, reduction_factor(reduction, fg.size(0), loss.elements()));
  Tensor term_gradient;
  if (grad_terms) {
    term_gradient = grad_terms->contiguous();
    args.grad_terms = term_gradient.const_data_ptr();
  }
  if (args.normalize_area) {
    TORCH_CHECK_VALUE(terms.has_value(), "fgbg: normalize_area needs the terms of the forward pass");
    args.terms = terms->const_data_ptr();
  }
  if (needs[0]) args.grad_fg = view_of(d_fg, fg, true);
  if (needs[1] && bg) args.grad_bg = view_of(d_bg, fg, true);
  if (needs[2]) args.grad_target = view_of(d_target, fg, true);
  if (needs[3]) args.grad_mask = view_of(d_mask, fg, true);
  Tensor scale_partial;
  const bool wants_scale = (needs[4] && fg_scale) || (needs[5] && bg_scale);
  if (wants_scale) {
    const int64_t segments = FGBG_ON_DEVICE(pixel_segments, args.shape, fg);
    scale_partial = at::empty({2, fg.size(1), fg.size(0) * segments}, fg.options().dtype(at::kDouble));
    args.scale_partial = scale_partial.mutable_data_ptr<double>();
  }
  FGBG_RUN(reconstruction_backward, args, dtype == at::kDouble, fg);
  if (wants_scale) {
    const int64_t tasks = scale_partial.size(2), channels = fg.size(1);
    const auto finish_scale = [&](Tensor& gradient, int which) {
      const bool shared = gradient.numel() == 1;
      const Tensor sums = at::empty({shared ? 1 : channels}, fg.options().dtype(dtype));
      FinishArgs f{};
      f.partial = scale_partial.const_data_ptr<double>() + which * channels * tasks;
      f.terms = 1;
      f.batch = sums.numel();
      f.segments = shared ? channels * tasks : tasks;
      f.reduction = Reduction::sample;
      f.dtype = kernel_dtype(dtype);
      f.loss = sums.mutable_data_ptr();
      finish(f, fg);
      gradient.copy_(sums.view_as(gradient));
    };
    if (needs[4] && fg_scale) finish_scale(d_fg_scale, 0);
    if (needs[5] && bg_scale) finish_scale(d_bg_scale, 1);
  }
  return out;
}

void register_kernels(torch::Library& m) {
  m.impl("reconstruction_loss", reconstruction_loss);
  m.impl("reconstruction_loss_backward", reconstruction_loss_backward);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fgbg, m) {
  m.def(
      "reconstruction_loss(Tensor fg, Tensor? bg, Tensor target, Tensor mask, Tensor? fg_scale, Tensor? "
      "bg_scale, "
      "float fg_scale_value, float bg_scale_value, str composition, bool mask_is_logits, str likelihood, "
      "float fg_weight, float bg_weight, bool normalize_area, str reduction, bool return_terms) -> "
      "(Tensor, Tensor)");
  m.def(
      "reconstruction_loss_backward(Tensor? grad_loss, Tensor? grad_terms, Tensor? terms, Tensor fg, Tensor? "
      "bg, "
      "Tensor target, Tensor mask, Tensor? fg_scale, Tensor? bg_scale, float fg_scale_value, "
      "float bg_scale_value, str composition, bool mask_is_logits, str likelihood, float fg_weight, "
      "float bg_weight, bool normalize_area, str reduction, bool[6] needs) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(fgbg, CPU, m) { register_kernels(m); }
#ifdef FGBG_WITH_CUDA
TORCH_LIBRARY_IMPL(fgbg, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fgbg::ops
