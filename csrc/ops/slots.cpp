#include "slots.h"

#include "broadcast.h"

namespace fgbg::ops {
namespace {

bool joint(const SlotLoss& op) { return op.composition == Composition::mixture_joint; }
bool blended(const SlotLoss& op) { return op.composition == Composition::blended; }
// Whether each element has a scale of its own.
bool has_map(const SlotLoss& op) { return op.scale.tensor.defined() && op.scale.tensor.dim() > 1; }
// What a map of scales is broadcast to.
const Tensor& scaled(const SlotLoss& op) { return blended(op) ? op.target : op.slots; }
int64_t loss_elements(const SlotLoss& op) {
  return joint(op) ? op.target.numel() / op.target.size(1) : op.target.numel();
}

SlotView slot_view(const Tensor& tensor, const Tensor& target) {
  if (!tensor.defined()) return {};
  SlotView v{view_of(tensor.select(1, 0), target, true), tensor.size(1) == 1 ? 0 : tensor.stride(1)};
  v.first.vector_aligned &= v.stride * static_cast<int64_t>(tensor.element_size()) % 16 == 0;
  return v;
}
// Of a map of scales, or its gradient.
SlotView map_view(const Tensor& map, const SlotLoss& op) {
  if (!map.defined()) return {};
  return blended(op) ? SlotView{view_of(map, op.target, true)}
                     : slot_view(map.expand_as(op.slots), op.target);
}

SlotArgs args_of(const SlotLoss& op) {
  SlotArgs a{};
  a.shape = image_shape(op.target);
  a.slots = op.slots.size(1);
  a.composition = op.composition;
  a.likelihood = op.likelihood;
  a.mask_kind = op.mask_is_logits ? MaskKind::logits : MaskKind::log_probability;
  a.mask_per_channel = op.mask.size(2) == op.slots.size(2) && op.slots.size(2) > 1;
  a.x = slot_view(op.slots, op.target);
  a.mask = slot_view(op.mask, op.target);
  a.target = view_of(op.target, op.target, true);
  a.weight = view_of(op.weight, op.target, true);
  if (has_map(op))
    a.scale_map = map_view(op.scale.tensor, op);
  else
    a.scale = scale_view(op.scale);
  return a;
}

// Where the results go. The partial sums are returned, and have to outlive the kernel.
Tensor set_results(SlotArgs& args, const SlotLoss& op, const variable_list& outputs) {
  const Tensor& target = op.target;
  if (op.return_responsibilities) args.responsibilities = slot_view(outputs[1], target);
  if (op.reduction == Reduction::none) {
    args.loss = view_of(outputs[0], target, true);
    return {};
  }
  const int64_t segments = FGBG_ON_DEVICE(pixel_segments, args.shape, target);
  const Tensor partial =
      at::empty({target.size(0), target.numel() > 0 ? segments : 0}, target.options().dtype(at::kDouble));
  args.partial = partial.mutable_data_ptr<double>();
  FinalReduction& f = args.final_reductions[0];
  f.partial = args.partial;
  f.terms = 1;
  f.batch = partial.size(0);
  f.segments = partial.size(1);
  f.reduction = op.reduction;
  f.factor = reduction_factor(op.reduction, f.batch, loss_elements(op));
  f.dtype = storage_dtype(outputs[0]);
  f.loss = outputs[0].mutable_data_ptr();
  return partial;
}

// Runs the backward kernel. The gradient of a scale is a sum.
void run_backward(SlotArgs& args, const SlotLoss& op, const variable_list& to) {
  const Tensor& target = op.target;
  const bool f64 = op.dtype() == at::kDouble;
  args.grad_x = slot_view(to[0], target);
  args.grad_target = view_of(to[1], target, true);
  args.grad_mask = slot_view(to[2], target);
  args.grad_weight = view_of(to[4], target, true);
  const Tensor& d_scale = to[3];
  if (!d_scale.defined()) {
    FGBG_RUN(slots_backward, args, f64, target);
    return;
  }
  if (target.numel() == 0) {
    d_scale.zero_();
    FGBG_RUN(slots_backward, args, f64, target);
    return;
  }
  if (has_map(op)) {
    const BroadcastGradients maps({d_scale}, scaled(op), op.dtype(), true);
    args.grad_scale_map = map_view(maps[0], op);
    FGBG_RUN(slots_backward, args, f64, target);
    maps.sum();
    return;
  }
  const int64_t scales = blended(op) ? target.size(1) : op.slots.size(1);
  const int64_t tasks = target.size(0) * FGBG_ON_DEVICE(pixel_segments, args.shape, target);
  const bool shared = d_scale.numel() == 1;
  const Tensor partial = at::empty({shared ? 1 : scales, tasks}, target.options().dtype(at::kDouble));
  args.scale_partial = partial.mutable_data_ptr<double>();
  FinalReduction& f = args.final_reductions[1];
  f.partial = args.scale_partial;
  f.terms = 1;
  f.batch = partial.size(0);
  f.segments = tasks;
  f.reduction = Reduction::sample;
  f.loss = d_scale.mutable_data_ptr();
  f.dtype = storage_dtype(d_scale);
  FGBG_RUN(slots_backward, args, f64, target);
}

// Not where the gradient of a scale sums over samples whose upstream gradients are not known yet.
bool writes_gradients(const SlotLoss& op, Needs needs) {
  const Tensor& scale = op.scale.tensor;
  const bool sums = needs_operand(needs, 3) && (scale.dim() <= 1 || shared_by_samples(scale, scaled(op)));
  return op.reduction != Reduction::none && !(op.reduction == Reduction::sample && sums) &&
         may_write_unit_gradients(operands_of(op), needs);
}

// With the channels of `like`, or of one.
c10::SymDimVector with_channels(c10::SymIntArrayRef like, size_t dim, const c10::SymInt& channels) {
  c10::SymDimVector sizes(like.begin(), like.end());
  sizes[dim] = channels;
  return sizes;
}

// Sizes [..., C, ...] or, with one channel, [..., 1, ...].
void check_sizes(const char* name, const Tensor& t, c10::SymIntArrayRef full, size_t dim, bool per_channel,
                 const char* of, const Tensor& other) {
  const auto one = with_channels(full, dim, 1);
  const bool fits = t.sym_sizes() == c10::SymIntArrayRef(one) || (per_channel && t.sym_sizes() == full);
  if (fits) return;
  if (per_channel && full[dim] > 1)
    TORCH_CHECK_VALUE(false, name, " has shape ", t.sym_sizes(), ", expected ", c10::SymIntArrayRef(one),
                      " or ", full, " for ", of, " of shape ", other.sym_sizes());
  TORCH_CHECK_VALUE(false, name, " has shape ", t.sym_sizes(), ", expected ", c10::SymIntArrayRef(one),
                    " for ", of, " of shape ", other.sym_sizes());
}

bool broadcasts(const Tensor& map, const Tensor& to) {
  if (map.dim() != to.dim()) return false;
  for (int64_t d = 0; d < map.dim(); ++d)
    if (map.sym_size(d) != 1 && map.sym_size(d) != to.sym_size(d)) return false;
  return true;
}

void check_scale(const SlotLoss& op) {
  const Tensor& t = op.scale.tensor;
  if (!t.defined()) return;
  check_float("scale", t);
  const bool of_slots = !blended(op);
  const auto number = of_slots ? op.slots.sym_size(1) : op.target.sym_size(1);
  const bool fits = t.dim() <= 1 ? t.sym_numel() == 1 || t.sym_numel() == number : broadcasts(t, scaled(op));
  TORCH_CHECK_VALUE(fits, "scale has shape ", t.sym_sizes(), ", expected [], [1], one per ",
                    of_slots ? "slot" : "channel", ", [", number, "], or a map that broadcasts to ",
                    scaled(op).sym_sizes());
  check_device("scale", t, "slots", op.slots);
}

}  // namespace

void SlotLoss::check() const {
  check_float("slots", slots);
  TORCH_CHECK_VALUE(
      slots.dim() >= 4 && slots.dim() <= kDims + 1 && slots.sym_size(1) != 0 && slots.sym_size(2) != 0,
      "slots has shape ", slots.sym_sizes(),
      ", expected [B, K, C, *spatial] with at least one slot and channel and 1 to 3 spatial "
      "dimensions");
  TORCH_CHECK_VALUE(slots.sym_size(1) < int64_t{1} << 24 && slots.sym_size(2) < int64_t{1} << 31,
                    "slots has ", slots.sym_size(1), " slots and ", slots.sym_size(2),
                    " channels, expected fewer than 2**24 and 2**31");
  TORCH_CHECK_VALUE(composition != Composition::masked,
                    "composition is 'masked', expected one of 'blended', "
                    "'mixture_joint', 'mixture_independent'");
  check_float("target", target);
  auto image = slots.sym_sizes().vec();
  image.erase(image.begin() + 1);
  TORCH_CHECK_VALUE(target.sym_sizes() == c10::SymIntArrayRef(image), "target has shape ", target.sym_sizes(),
                    ", expected that of a slot, ", c10::SymIntArrayRef(image));
  check_device("target", target, "slots", slots);
  const char* name = mask_is_logits ? "mask_logits" : "log_mask";
  check_float(name, mask);
  check_sizes(name, mask, slots.sym_sizes(), 2, !joint(*this), "slots", slots);
  check_device(name, mask, "slots", slots);
  check_scale(*this);
  if (!weight.defined()) return;
  const bool hard = weight.scalar_type() == at::kBool || weight.scalar_type() == at::kByte;
  TORCH_CHECK_TYPE(hard || is_float(weight.scalar_type()), "weight has dtype ",
                   dtype_name(weight.scalar_type()), ", expected one of ", float_names(),
                   ", torch.bool, torch.uint8");
  check_strided("weight", weight);
  check_sizes("weight", weight, target.sym_sizes(), 1, !joint(*this), "target", target);
  check_device("weight", weight, "slots", slots);
}

Forward SlotLoss::allocate(Needs needs) const {
  const auto options = target.options().dtype(dtype());
  Forward out;
  if (reduction != Reduction::none)
    out.outputs.push_back(empty_loss(target, reduction, dtype()));
  else
    out.outputs.push_back(joint(*this) ? at::empty_symint(with_channels(target.sym_sizes(), 1, 1), options)
                                       : empty_result_like(target, options));
  if (return_responsibilities)
    out.outputs.push_back(empty_result(
        joint(*this) ? with_channels(slots.sym_sizes(), 2, 1) : c10::SymDimVector(slots.sym_sizes().vec()),
        options));
  if (writes_gradients(*this, needs)) out.saved = defined_of(empty_gradients(operands_of(*this), needs));
  return out;
}

Forward SlotLoss::forward(Needs needs) const {
  Forward out = allocate(needs);
  SlotArgs args = args_of(*this);
  const Tensor partial = set_results(args, *this, out.outputs);
  if (out.saved.empty()) {
    FGBG_RUN(slots_forward, args, dtype() == at::kDouble, target);
    return out;
  }
  args.grad_loss.factor = reduction_factor(reduction, target.size(0), loss_elements(*this));
  run_backward(args, *this, by_operand(out.saved, needs, kOperands));
  return out;
}

variable_list SlotLoss::backward(const variable_list& grads, const Tensor&, Needs needs, bool) const {
  variable_list out = empty_gradients(operands_of(*this), needs);
  if (!grads[0].defined()) return out;
  SlotArgs args = args_of(*this);
  if (reduction == Reduction::none)
    args.grad_loss_elements = view_of(grads[0], target, true);
  else
    args.grad_loss =
        upstream_of(grads[0], reduction, reduction_factor(reduction, target.size(0), loss_elements(*this)));
  run_backward(args, *this, out);
  return out;
}

}  // namespace fgbg::ops
