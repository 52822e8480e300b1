// Masked, blended and mixture reconstruction losses: tensors to kernels. For _with_gradients and _backward_
// see latents.cpp.
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
    a.fg_weight.value = masked ? fg_weight : 1.0;
    a.bg_weight.value = masked ? bg_weight : 0.0;
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

// What a forward kernel writes: the loss per element, or the sums that it and the terms are made of, and how
// those are finished.
struct Results {
  Tensor loss, terms, partial;

  Results(ReconstructionArgs& args, const Loss& call, Reduction reduction, bool return_terms) {
    const Tensor& fg = call.fg;
    const auto options = fg.options().dtype(call.dtype());
    const bool masked = args.composition == Composition::masked;
    const bool wants_terms = masked && (return_terms || args.normalize_area);
    args.areas = wants_terms;
    terms = at::empty(wants_terms ? at::IntArrayRef({kTerms, fg.size(0)}) : at::IntArrayRef({0}), options);
    if (reduction == Reduction::none) {
      loss = call.joint() ? at::empty(call.mask.sizes(), options) : empty_result_like(fg, options);
      args.loss = view_of(loss, fg, true);
    } else {
      loss = empty_loss(fg, reduction, call.dtype());
    }
    if (reduction != Reduction::none || wants_terms) {
      const int64_t segments = FGBG_ON_DEVICE(pixel_segments, args.shape, fg);
      partial = at::empty({kTerms, fg.size(0), fg.numel() > 0 ? segments : 0}, options.dtype(at::kDouble));
      args.partial = partial.mutable_data_ptr<double>();
      FinalReduction& f = args.final_reductions[0];
      f.partial = args.partial;
      f.terms = wants_terms ? kTerms : (masked ? 2 : 1);
      f.batch = partial.size(1);
      f.segments = partial.size(2);
      f.reduction = reduction;
      f.factor = reduction_factor(reduction, f.batch, call.elements());
      f.fg_weight = args.fg_weight;
      f.bg_weight = args.bg_weight;
      f.normalize_area = args.normalize_area;
      f.channels = static_cast<double>(fg.size(1));
      f.dtype = storage_dtype(loss);
      f.loss = reduction == Reduction::none ? nullptr : loss.mutable_data_ptr();
      f.out_terms = terms.numel() > 0 ? terms.mutable_data_ptr() : nullptr;
    }
  }
};

using Needs = std::array<bool, 6>;  // of fg, bg, target, mask, fg_scale, bg_scale

Gradients<6> empty_gradients(const Loss& call, Needs needs) {
  const auto out = ops::empty_gradients<6>(
      {call.fg, call.bg, call.target, call.mask, call.fg_scale, call.bg_scale}, needs);
  // Of images without pixels, what is summed over them.
  if (call.fg.numel() == 0)
    for (size_t i = 3; i < 6; ++i)
      if (out[i].defined()) out[i].zero_();
  return out;
}

// Runs the backward kernel. The gradients of the scales are sums too.
void run_gradients(ReconstructionArgs& args, const Loss& call, const Gradients<6>& to) {
  const Tensor& fg = call.fg;
  const bool f64 = call.dtype() == at::kDouble;
  args.grad_fg = view_of(to[0], fg, true);
  args.grad_bg = view_of(to[1], fg, true);
  args.grad_target = view_of(to[2], fg, true);
  args.grad_mask = view_of(to[3], fg, true);
  if (fg.numel() == 0 || (!to[4].defined() && !to[5].defined())) {
    FGBG_RUN(reconstruction_backward, args, f64, fg);
    return;
  }
  const int64_t channels = fg.size(1), tasks = fg.size(0) * FGBG_ON_DEVICE(pixel_segments, args.shape, fg);
  const Tensor partial = at::empty({2, channels, tasks}, fg.options().dtype(at::kDouble));
  args.scale_partial = partial.mutable_data_ptr<double>();
  for (int which = 0; which < 2; ++which) {
    const Tensor& gradient = to[4 + which];
    if (!gradient.defined()) continue;
    const bool shared = gradient.numel() == 1;
    FinalReduction& f = args.final_reductions[1 + which];
    f.partial = args.scale_partial + which * channels * tasks;
    f.terms = 1;
    f.batch = gradient.numel();
    f.segments = shared ? channels * tasks : tasks;
    f.reduction = Reduction::sample;
    f.loss = gradient.mutable_data_ptr();
    f.dtype = storage_dtype(gradient);
  }
  FGBG_RUN(reconstruction_backward, args, f64, fg);
}

void set_upstream(ReconstructionArgs& args, const Loss& call, const Tensor& grad, Reduction reduction) {
  if (reduction == Reduction::none)
    args.grad_loss_elements = view_of(grad, call.fg, true);
  else
    args.grad_loss =
        upstream_of(grad, reduction, reduction_factor(reduction, call.fg.size(0), call.elements()));
}

#define FGBG_LOSS_PARAMETERS                                                                       \
  const Tensor &fg, const OptionalTensor &bg, const Tensor &target, const Tensor &mask,            \
      const OptionalTensor &fg_scale, const OptionalTensor &bg_scale, double fg_scale_value,       \
      double bg_scale_value, string_view composition, bool mask_is_logits, string_view likelihood, \
      double fg_weight, double bg_weight, bool normalize_area, string_view reduction_name
#define FGBG_LOSS                                                                                          \
  Loss {                                                                                                   \
    fg, bg, target, mask, fg_scale, bg_scale, fg_scale_value, bg_scale_value, composition, mask_is_logits, \
        likelihood, fg_weight, bg_weight, normalize_area, reduction_name                                   \
  }

std::tuple<Tensor, Tensor> reconstruction_loss(FGBG_LOSS_PARAMETERS, bool return_terms) {
  const Loss call = FGBG_LOSS;
  ReconstructionArgs args = call.args();
  const Reduction reduction = parse_reduction(reduction_name);
  TORCH_CHECK_VALUE(!(args.normalize_area && reduction == Reduction::none),
                    "fgbg: normalize_area has no unreduced kernel");
  const Results results(args, call, reduction, return_terms);
  FGBG_RUN(reconstruction_forward, args, call.dtype() == at::kDouble, fg);
  return {results.loss, results.terms};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> reconstruction_loss_backward(
    const OptionalTensor& grad_loss, const OptionalTensor& grad_terms, const OptionalTensor& terms,
    FGBG_LOSS_PARAMETERS, Needs needs) {
  const Loss call = FGBG_LOSS;
  ReconstructionArgs args = call.args();
  const Reduction reduction = parse_reduction(reduction_name);
  const Gradients<6> out = empty_gradients(call, needs);
  Tensor upstream = grad_loss.value_or(Tensor()), term_gradient;
  if (!grad_loss && reduction == Reduction::none)  // a gradient that reaches the terms alone
    upstream = at::zeros({}, fg.options().dtype(call.dtype())).expand_as(fg);
  if (upstream.defined()) set_upstream(args, call, upstream, reduction);
  if (grad_terms) {
    term_gradient = grad_terms->contiguous();
    args.grad_terms = term_gradient.const_data_ptr();
  }
  if (args.normalize_area) {
    TORCH_CHECK_VALUE(terms.has_value(), "fgbg: normalize_area needs the terms of the forward pass");
    args.terms = terms->const_data_ptr();
  }
  run_gradients(args, call, out);
  return returned(out, fg);
}

// The gradients that the fused forward pass cannot write, since it does not know yet what they depend on:
// the areas; or, where a scale's gradient sums over samples, what arrives at each of them.
void check_fusable(const ReconstructionArgs& args, Reduction reduction, Needs needs) {
  TORCH_CHECK_VALUE(reduction != Reduction::none && !args.normalize_area &&
                        !(reduction == Reduction::sample && (needs[4] || needs[5])),
                    "fgbg: these gradients cannot be written by the forward pass");
}

std::tuple<Tensor, Tensor, std::vector<Tensor>> reconstruction_loss_with_gradients(FGBG_LOSS_PARAMETERS,
                                                                                   bool return_terms,
                                                                                   Needs needs) {
  const Loss call = FGBG_LOSS;
  ReconstructionArgs args = call.args();
  const Reduction reduction = parse_reduction(reduction_name);
  check_fusable(args, reduction, needs);
  const Results results(args, call, reduction, return_terms);
  const Gradients<6> out = empty_gradients(call, needs);
  args.grad_loss.factor = reduction_factor(reduction, fg.size(0), call.elements());
  run_gradients(args, call, out);
  return {results.loss, results.terms, listed(out)};
}

void reconstruction_loss_backward_(at::TensorList gradients, const Tensor& grad_loss, FGBG_LOSS_PARAMETERS,
                                   Needs needs) {
  if (all_ones(grad_loss)) return;
  const Loss call = FGBG_LOSS;
  ReconstructionArgs args = call.args();
  const Reduction reduction = parse_reduction(reduction_name);
  check_fusable(args, reduction, needs);
  set_upstream(args, call, grad_loss, reduction);
  args.grad_loss.stored = true;
  run_gradients(args, call, from_list<6>(gradients, needs));
}

void register_kernels(torch::Library& m) {
  m.impl("reconstruction_loss", reconstruction_loss);
  m.impl("reconstruction_loss_backward", reconstruction_loss_backward);
  m.impl("reconstruction_loss_with_gradients", reconstruction_loss_with_gradients);
  m.impl("reconstruction_loss_backward_", reconstruction_loss_backward_);
}

}  // namespace

#define FGBG_LOSS_SCHEMA                                                                               \
  "Tensor fg, Tensor? bg, Tensor target, Tensor mask, Tensor? fg_scale, Tensor? bg_scale, "            \
  "float fg_scale_value, float bg_scale_value, str composition, bool mask_is_logits, str likelihood, " \
  "float fg_weight, float bg_weight, bool normalize_area, str reduction"

TORCH_LIBRARY_FRAGMENT(fgbg, m) {
  m.def("reconstruction_loss(" FGBG_LOSS_SCHEMA ", bool return_terms) -> (Tensor, Tensor)");
  m.def("reconstruction_loss_backward(Tensor? grad_loss, Tensor? grad_terms, Tensor? terms, " FGBG_LOSS_SCHEMA
        ", bool[6] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("reconstruction_loss_with_gradients(" FGBG_LOSS_SCHEMA
        ", bool return_terms, bool[6] needs) -> (Tensor, Tensor, Tensor[])");
  m.def("reconstruction_loss_backward_(Tensor(a!)[] gradients, Tensor grad_loss, " FGBG_LOSS_SCHEMA
        ", bool[6] needs) -> ()");
}

TORCH_LIBRARY_IMPL(fgbg, CPU, m) { register_kernels(m); }
#ifdef FGBG_WITH_CUDA
TORCH_LIBRARY_IMPL(fgbg, CUDA, m) { register_kernels(m); }
#endif

}  // namespace fgbg::ops
