#include "reconstruction.h"

namespace fgbg::ops {
namespace {

bool joint(const ReconstructionLoss& op) { return op.composition == Composition::mixture_joint; }
int64_t loss_elements(const ReconstructionLoss& op) {
  return joint(op) ? op.fg.numel() / op.fg.size(1) : op.fg.numel();
}

ReconstructionArgs args_of(const ReconstructionLoss& op) {
  const Tensor& fg = op.fg;
  ReconstructionArgs a{};
  a.shape = image_shape(fg);
  a.composition = op.composition;
  a.likelihood = op.likelihood;
  a.mask_kind = op.mask_is_logits ? MaskKind::logits : MaskKind::probability;
  a.mask_per_channel = op.mask.size(1) == fg.size(1) && fg.size(1) > 1;
  const bool masked = op.composition == Composition::masked;
  a.fg_weight = masked ? scale_view(op.fg_weight) : scale_view({1.0});
  a.bg_weight = masked ? scale_view(op.bg_weight) : scale_view({0.0});
  a.normalize_area = op.normalize_area;
  a.fg = view_of(fg, fg, true);
  a.bg = view_of(op.bg, fg, true);
  a.target = view_of(op.target, fg, true);
  a.mask = view_of(op.mask, fg, true);
  a.fg_scale = scale_view(op.fg_scale);
  a.bg_scale = scale_view(op.bg_scale);
  return a;
}

// Where the loss goes: by element, or as partial sums, which are returned and have to outlive the kernel.
Tensor set_results(ReconstructionArgs& args, const ReconstructionLoss& op, const variable_list& outputs) {
  const Tensor& fg = op.fg;
  const bool masked = op.composition == Composition::masked;
  args.areas = op.wants_terms();
  if (op.reduction == Reduction::none) {
    args.loss = view_of(outputs[0], fg, true);
    if (!op.wants_terms()) return {};
  }
  const int64_t segments = FGBG_ON_DEVICE(pixel_segments, args.shape, fg);
  const Tensor partial =
      at::empty({kTerms, fg.size(0), fg.numel() > 0 ? segments : 0}, fg.options().dtype(at::kDouble));
  args.partial = partial.mutable_data_ptr<double>();
  FinalReduction& f = args.final_reductions[0];
  f.partial = args.partial;
  f.terms = op.wants_terms() ? kTerms : (masked ? 2 : 1);
  f.batch = partial.size(1);
  f.segments = partial.size(2);
  f.reduction = op.reduction;
  f.factor = reduction_factor(op.reduction, f.batch, loss_elements(op));
  f.fg_weight = args.fg_weight;
  f.bg_weight = args.bg_weight;
  f.normalize_area = args.normalize_area;
  f.channels = static_cast<double>(fg.size(1));
  f.dtype = storage_dtype(outputs[0]);
  f.loss = op.reduction == Reduction::none ? nullptr : outputs[0].mutable_data_ptr();
  f.out_terms = op.wants_terms() ? outputs[1].mutable_data_ptr() : nullptr;
  return partial;
}

// Of images without pixels, what is summed over them is 0, and no kernel runs.
void zero_sums_of_nothing(const ReconstructionLoss& op, const variable_list& gradients) {
  if (op.fg.numel() > 0) return;
  for (size_t i = 3; i < ReconstructionLoss::kOperands; ++i)
    if (gradients[i].defined()) gradients[i].zero_();
}

// Runs the backward kernel. The gradients of the scales are sums too.
void run_backward(ReconstructionArgs& args, const ReconstructionLoss& op, const variable_list& to) {
  const Tensor& fg = op.fg;
  const bool f64 = op.dtype() == at::kDouble;
  zero_sums_of_nothing(op, to);
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

// Not where a gradient depends on what forward does not know yet: on the areas, or, as a scale's gradient
// sums over the samples, on the upstream gradient of each.
bool writes_gradients(const ReconstructionLoss& op, Needs needs) {
  const bool scales = needs_operand(needs, 4) || needs_operand(needs, 5);
  // On CUDA the kernel of half precision that has these gradients adds in another order than the one that has
  // none, and a loss has the same bits whether its gradients are wanted or not.
  const bool in_order = !op.fg.is_cuda() || op.fg.element_size() > 2 || !(scales || needs_operand(needs, 2));
  return in_order && op.reduction != Reduction::none && !op.normalize_area &&
         !(op.reduction == Reduction::sample && scales) && may_write_unit_gradients(operands_of(op), needs);
}

void check_scale(const char* name, const Number& scale, const Tensor& fg) {
  if (!scale.tensor.defined()) return;
  const Tensor& t = scale.tensor;
  check_float(name, t);
  TORCH_CHECK_VALUE(t.dim() <= 1 && (t.sym_numel() == 1 || t.sym_numel() == fg.sym_size(1)), name,
                    " has shape ", t.sym_sizes(), ", expected [], [1] or one per channel, [", fg.sym_size(1),
                    "]");
  check_device(name, t, "fg", fg);
}

void check_mask(const ReconstructionLoss& op) {
  const char* name = op.mask_is_logits ? "mask_logits" : "mask";
  const Tensor &mask = op.mask, &fg = op.fg;
  const bool select = mask.scalar_type() == at::kBool || mask.scalar_type() == at::kByte;
  TORCH_CHECK_TYPE(is_float(mask.scalar_type()) || (select && !op.mask_is_logits), name, " has dtype ",
                   dtype_name(mask.scalar_type()), ", expected one of ", float_names(),
                   op.mask_is_logits ? "" : ", torch.bool, torch.uint8");
  check_strided(name, mask);
  const bool per_channel = !joint(op);
  const bool fits = mask.dim() == fg.dim() && mask.sym_size(0) == fg.sym_size(0) &&
                    mask.sym_sizes().slice(2) == fg.sym_sizes().slice(2) &&
                    (mask.sym_size(1) == 1 || (per_channel && mask.sym_size(1) == fg.sym_size(1)));
  if (!fits) {
    auto one = fg.sym_sizes().vec();
    one[1] = 1;
    const c10::SymIntArrayRef single(one);
    if (per_channel && fg.sym_size(1) > 1)
      TORCH_CHECK_VALUE(false, name, " has shape ", mask.sym_sizes(), ", expected ", single, " or ",
                        fg.sym_sizes(), " for fg of shape ", fg.sym_sizes());
    TORCH_CHECK_VALUE(false, name, " has shape ", mask.sym_sizes(), ", expected ", single,
                      " for fg of shape ", fg.sym_sizes());
  }
  check_device(name, mask, "fg", fg);
}

}  // namespace

void ReconstructionLoss::check() const {
  const bool masked = composition == Composition::masked;
  check_float("fg", fg);
  TORCH_CHECK_VALUE(fg.dim() >= 3 && fg.dim() <= kDims && fg.sym_size(1) != 0, "fg has shape ",
                    fg.sym_sizes(),
                    ", expected [B, C, *spatial] with at least one channel and 1 to 3 spatial dimensions");
  TORCH_CHECK_VALUE(fg.sym_size(1) < int64_t{1} << 31, "fg has ", fg.sym_size(1),
                    " channels, expected fewer than 2**31");
  TORCH_CHECK_TYPE(masked || bg.defined(), "bg must be a tensor, got NoneType");
  if (bg.defined()) check_like("bg", bg, "fg", fg);
  check_like("target", target, "fg", fg);
  check_mask(*this);
  check_scale(composition == Composition::blended ? "scale" : "fg_scale", fg_scale, fg);
  check_scale("bg_scale", bg_scale, fg);
  check_number("fg_weight", fg_weight, "fg", fg);
  check_number("bg_weight", bg_weight, "fg", fg);
  TORCH_CHECK_VALUE(!(normalize_area && (!masked || reduction == Reduction::none)),
                    "normalize_area is for masked losses that are reduced");
}

Forward ReconstructionLoss::allocate(Needs needs) const {
  const auto options = fg.options().dtype(dtype());
  Forward out;
  if (reduction != Reduction::none)
    out.outputs.push_back(empty_loss(fg, reduction, dtype()));
  else
    out.outputs.push_back(joint(*this) ? at::empty_symint(mask.sym_sizes(), options)
                                       : empty_result_like(fg, options));
  if (wants_terms()) out.outputs.push_back(at::empty_symint({kTerms, fg.sym_size(0)}, options));
  if (writes_gradients(*this, needs)) out.saved = defined_of(empty_gradients(operands_of(*this), needs));
  return out;
}

Forward ReconstructionLoss::forward(Needs needs) const {
  Forward out = allocate(needs);
  ReconstructionArgs args = args_of(*this);
  const Tensor partial = set_results(args, *this, out.outputs);
  if (out.saved.empty()) {
    FGBG_RUN(reconstruction_forward, args, dtype() == at::kDouble, fg);
    return out;
  }
  args.grad_loss.factor = reduction_factor(reduction, fg.size(0), loss_elements(*this));
  run_backward(args, *this, by_operand(out.saved, needs, kOperands));
  return out;
}

variable_list ReconstructionLoss::backward(const variable_list& grads, const Tensor& terms, Needs needs,
                                           bool) const {
  ReconstructionArgs args = args_of(*this);
  variable_list out = empty_gradients(operands_of(*this), needs);
  Tensor grad = grads[0], grad_terms;
  if (!grad.defined() && reduction == Reduction::none)  // an upstream gradient of the terms alone
    grad = at::zeros({}, fg.options().dtype(dtype())).expand_as(fg);
  if (grad.defined() && reduction == Reduction::none)
    args.grad_loss_elements = view_of(grad, fg, true);
  else if (grad.defined())
    args.grad_loss =
        upstream_of(grad, reduction, reduction_factor(reduction, fg.size(0), loss_elements(*this)));
  if (grads.size() > 1 && grads[1].defined()) {
    grad_terms = grads[1].contiguous();
    args.grad_terms = grad_terms.const_data_ptr();
  }
  if (normalize_area) {
    TORCH_CHECK_VALUE(terms.defined(), "normalize_area needs the terms of the forward pass");
    args.terms = terms.const_data_ptr();
  }
  run_backward(args, *this, out);
  return out;
}

}  // namespace fgbg::ops
