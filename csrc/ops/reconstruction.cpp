#include "reconstruction.h"

#include "broadcast.h"

namespace fgbg::ops {
namespace {

bool joint(const ReconstructionLoss& op) { return op.composition == Composition::mixture_joint; }
bool plain(const ReconstructionLoss& op) { return op.composition == Composition::plain; }
// How errors call the first operand, and its scale.
const char* image_name(const ReconstructionLoss& op) { return plain(op) ? "prediction" : "fg"; }
const char* scale_name(const ReconstructionLoss& op) {
  return plain(op) || op.composition == Composition::blended ? "scale" : "fg_scale";
}

// One loss for each element, or for each pixel.
c10::SymDimVector loss_sizes(const ReconstructionLoss& op) {
  const auto sizes = op.fg.sym_sizes();
  c10::SymDimVector out(sizes.begin(), sizes.end());
  if (joint(op)) out[1] = 1;
  return out;
}
int64_t loss_elements(const ReconstructionLoss& op) {
  return joint(op) ? op.fg.numel() / op.fg.size(1) : op.fg.numel();
}

// Whether a scale has elements of its own along more than the channels.
bool is_map(const Number& scale) { return scale.tensor.defined() && scale.tensor.dim() > 1; }
void set_scale(const Number& scale, const Tensor& fg, ScaleView& by_channel, View& map) {
  if (is_map(scale))
    map = view_of(scale.tensor, fg, true);
  else
    by_channel = scale_view(scale);
}

// The operands whose gradients are as large as they are, and those that may be broadcast, in the order of
// fields().
constexpr size_t kImages = 4, kFgScale = 4, kBgScale = 5, kWeight = 6;

ReconstructionArgs args_of(const ReconstructionLoss& op) {
  const Tensor& fg = op.fg;
  ReconstructionArgs a{};
  a.shape = image_shape(fg);
  a.composition = op.composition;
  a.likelihood = op.likelihood;
  a.mask_kind = op.mask_is_logits ? MaskKind::logits : MaskKind::probability;
  a.mask_per_channel = op.mask.defined() && op.mask.size(1) == fg.size(1) && fg.size(1) > 1;
  const bool masked = op.composition == Composition::masked;
  a.fg_weight = masked ? scale_view(op.fg_weight) : scale_view({1.0});
  a.bg_weight = masked ? scale_view(op.bg_weight) : scale_view({0.0});
  a.normalize_area = op.normalize_area;
  a.fg = view_of(fg, fg, true);
  a.bg = view_of(op.bg, fg, true);
  a.target = view_of(op.target, fg, true);
  a.mask = view_of(op.mask, fg, true);
  if (op.weight.defined()) a.weight = view_of(op.weight, fg, true);
  set_scale(op.fg_scale, fg, a.fg_scale, a.fg_scale_map);
  set_scale(op.bg_scale, fg, a.bg_scale, a.bg_scale_map);
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
  const Tensor partial = empty_sums({kTerms, fg.size(0), fg.numel() > 0 ? segments : 0}, fg);
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
  for (size_t i = kImages - 1; i < ReconstructionLoss::kOperands; ++i)
    if (gradients[i].defined()) gradients[i].zero_();
}

// Has the kernel sum the gradients of scales of channels; returns the partial sums, which have to outlive it.
Tensor set_scale_sums(ReconstructionArgs& args, const ReconstructionLoss& op, const variable_list& to) {
  const Tensor gradients[] = {is_map(op.fg_scale) ? Tensor() : to[kFgScale],
                              is_map(op.bg_scale) ? Tensor() : to[kBgScale]};
  if (!gradients[0].defined() && !gradients[1].defined()) return {};
  const int64_t channels = op.fg.size(1);
  const int64_t tasks = op.fg.size(0) * FGBG_ON_DEVICE(pixel_segments, args.shape, op.fg);
  const Tensor partial = empty_sums({2, channels, tasks}, op.fg);
  args.scale_partial = partial.mutable_data_ptr<double>();
  for (int which = 0; which < 2; ++which) {
    const Tensor& gradient = gradients[which];
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
  return partial;
}

// Runs the backward kernel. The gradients of the scales are sums too.
void run_backward(ReconstructionArgs& args, const ReconstructionLoss& op, const variable_list& to) {
  const Tensor& fg = op.fg;
  zero_sums_of_nothing(op, to);
  if (fg.numel() == 0) {
    FGBG_RUN(reconstruction_backward, args, op.dtype() == at::kDouble, fg);
    return;
  }
  args.grad_fg = view_of(to[0], fg, true);
  args.grad_bg = view_of(to[1], fg, true);
  args.grad_target = view_of(to[2], fg, true);
  args.grad_mask = view_of(to[3], fg, true);
  const Tensor partial = set_scale_sums(args, op, to);
  const BroadcastGradients maps(
      {is_map(op.fg_scale) ? to[kFgScale] : Tensor(), is_map(op.bg_scale) ? to[kBgScale] : Tensor()}, fg,
      op.dtype(), true);
  args.grad_fg_scale_map = view_of(maps[0], fg, true);
  args.grad_bg_scale_map = view_of(maps[1], fg, true);
  const Tensor like_loss = joint(op) ? fg.narrow(1, 0, 1) : fg;
  const BroadcastGradients weights({to[kWeight]}, like_loss, op.dtype(), true);
  args.grad_weight = view_of(weights[0], fg, true);
  FGBG_RUN(reconstruction_backward, args, op.dtype() == at::kDouble, fg);
  maps.sum();
  weights.sum();
}

bool sums_over_samples(const Number& scale, const Tensor& fg) {
  return !is_map(scale) || shared_by_samples(scale.tensor, fg);
}

// Not where a gradient depends on what forward does not know yet: on the areas, or, as a scale's gradient
// sums over the samples, on the upstream gradient of each.
bool writes_gradients(const ReconstructionLoss& op, Needs needs) {
  const bool scales = needs_operand(needs, kFgScale) || needs_operand(needs, kBgScale);
  const bool over_samples = (needs_operand(needs, kFgScale) && sums_over_samples(op.fg_scale, op.fg)) ||
                            (needs_operand(needs, kBgScale) && sums_over_samples(op.bg_scale, op.fg)) ||
                            (needs_operand(needs, kWeight) && shared_by_samples(op.weight, op.fg));
  // On CUDA the kernel of half precision that has these gradients adds in another order than the one that has
  // none, and a loss has the same bits whether its gradients are wanted or not.
  const bool in_order = !op.fg.is_cuda() || op.fg.element_size() > 2 || !(scales || needs_operand(needs, 2));
  return in_order && op.reduction != Reduction::none && !op.normalize_area &&
         !(op.reduction == Reduction::sample && over_samples) &&
         may_write_unit_gradients(operands_of(op), needs);
}

void check_scale(const char* name, const Number& scale, const ReconstructionLoss& op) {
  if (!scale.tensor.defined()) return;
  const Tensor &t = scale.tensor, &fg = op.fg;
  check_float(name, t);
  const bool fits = is_map(scale) ? broadcasts_to(t.sym_sizes(), fg.sym_sizes())
                                  : t.sym_numel() == 1 || t.sym_numel() == fg.sym_size(1);
  TORCH_CHECK_VALUE(fits, name, " has shape ", t.sym_sizes(), ", expected [], [1], one per channel, [",
                    fg.sym_size(1), "], or what broadcasts to ", image_name(op), ", ", fg.sym_sizes());
  check_device(name, t, image_name(op), fg);
}

void check_mask(const ReconstructionLoss& op) {
  if (plain(op)) {
    TORCH_CHECK_VALUE(!op.mask.defined(), "a plain loss has no mask");
    return;
  }
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
  const char* name = image_name(*this);
  check_float(name, fg);
  TORCH_CHECK_VALUE(fg.dim() >= 3 && fg.dim() <= kDims && (plain(*this) || fg.sym_size(1) != 0), name,
                    " has shape ", fg.sym_sizes(),
                    ", expected [B, C, *spatial] with at least one channel and 1 to 3 spatial dimensions");
  TORCH_CHECK_VALUE(fg.sym_size(1) < int64_t{1} << 31, name, " has ", fg.sym_size(1),
                    " channels, expected fewer than 2**31");
  TORCH_CHECK_TYPE(masked || plain(*this) || bg.defined(), "bg must be a tensor, got NoneType");
  TORCH_CHECK_TYPE(plain(*this) || mask.defined(), "mask must be a tensor, got NoneType");
  if (bg.defined()) check_like("bg", bg, name, fg);
  check_like("target", target, name, fg);
  check_mask(*this);
  check_scale(scale_name(*this), fg_scale, *this);
  check_scale("bg_scale", bg_scale, *this);
  check_weight(weight, loss_sizes(*this), name, fg);
  check_number("fg_weight", fg_weight, name, fg);
  check_number("bg_weight", bg_weight, name, fg);
  TORCH_CHECK_VALUE(!(normalize_area && (!masked || reduction == Reduction::none)),
                    "normalize_area is for masked losses that are reduced");
}

Forward ReconstructionLoss::allocate(Needs needs) const {
  const auto options = fg.options().dtype(dtype());
  Forward out;
  if (reduction != Reduction::none)
    out.outputs.push_back(empty_loss(fg, reduction, dtype()));
  else
    out.outputs.push_back(joint(*this) ? empty_result(loss_sizes(*this), options)
                                       : empty_result_like(fg, options));
  if (wants_terms()) out.outputs.push_back(empty_result({kTerms, fg.sym_size(0)}, options));
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
    grad = fg.new_zeros({}, fg.options().dtype(dtype())).expand_as(fg);
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
