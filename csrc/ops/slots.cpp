#include "slots.h"

#include "broadcast.h"

namespace fgbg::ops {
namespace {

bool joint(const SlotLoss& op) { return op.composition == Composition::mixture_joint; }
bool blended(const SlotLoss& op) { return op.composition == Composition::blended; }
// Whether a scale has elements of its own along more than the slots (of a blend the channels).
bool has_map(const SlotLoss& op) { return op.scale.tensor.defined() && op.scale.tensor.dim() > 1; }
// What it is broadcast to.
const Tensor& scaled(const SlotLoss& op) { return blended(op) ? op.target : op.slots; }

// With one channel where there is one value for each pixel.
c10::SymDimVector joined(const Tensor& t, int64_t channel_dim, const SlotLoss& op) {
  const auto sizes = t.sym_sizes();
  c10::SymDimVector out(sizes.begin(), sizes.end());
  if (joint(op)) out[static_cast<size_t>(channel_dim)] = 1;
  return out;
}
c10::SymDimVector loss_sizes(const SlotLoss& op) { return joined(op.target, 1, op); }
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
  a.one_scale = has_map(op) || !op.scale.tensor.defined() || op.scale.tensor.numel() == 1;
  return a;
}

// Runs a kernel. On CUDA many slots need memory beyond the kernel's own.
#ifdef FGBG_WITH_CUDA
Tensor set_scratch(SlotArgs& args, const SlotLoss& op) {
  const int64_t size = op.target.is_cuda() && op.target.numel() > 0 ? cuda::slot_scratch(args) : 0;
  if (size == 0) return {};
  const Tensor scratch = empty_result({size}, op.target.options().dtype(op.dtype()));
  args.scratch = scratch.mutable_data_ptr();
  return scratch;
}
#else
Tensor set_scratch(SlotArgs&, const SlotLoss&) { return {}; }
#endif
void run_forward_kernel(SlotArgs& args, const SlotLoss& op) {
  const Tensor scratch = set_scratch(args, op);
  FGBG_RUN(slots_forward, args, op.dtype() == at::kDouble, op.target);
}
void run_backward_kernel(SlotArgs& args, const SlotLoss& op) {
  const Tensor scratch = set_scratch(args, op);
  FGBG_RUN(slots_backward, args, op.dtype() == at::kDouble, op.target);
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
  const Tensor partial = empty_sums({target.size(0), target.numel() > 0 ? segments : 0}, target);
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

// Has the kernel sum the gradients of the scales of slots (of a blend of channels); returns the partial sums,
// which have to outlive it.
Tensor set_scale_sums(SlotArgs& args, const SlotLoss& op, const Tensor& d_scale) {
  if (!d_scale.defined() || has_map(op)) return {};
  const int64_t scales = d_scale.numel();
  const int64_t tasks = op.target.size(0) * FGBG_ON_DEVICE(pixel_segments, args.shape, op.target);
  const Tensor partial = empty_sums({scales, tasks}, op.target);
  args.scale_partial = partial.mutable_data_ptr<double>();
  FinalReduction& f = args.final_reductions[1];
  f.partial = args.scale_partial;
  f.terms = 1;
  f.batch = scales;
  f.segments = tasks;
  f.reduction = Reduction::sample;
  f.loss = d_scale.mutable_data_ptr();
  f.dtype = storage_dtype(d_scale);
  return partial;
}

// Adds up gradients of all elements of the slots to that of an operand which is broadcast to them: slot by
// slot, since kernels index no more dimensions.
void sum_of_slots(const Tensor& full, const Tensor& gradient, const SlotLoss& op) {
  std::vector<int64_t> sizes(static_cast<size_t>(op.slots.dim() - gradient.dim()), 1);
  sizes.insert(sizes.end(), gradient.sizes().begin(), gradient.sizes().end());
  const Tensor to = gradient.view(sizes);
  const int64_t slots = op.slots.size(1);
  if (to.size(1) == slots) {
    for (int64_t k = 0; k < slots; ++k) sum_broadcast(full.select(1, k), to.select(1, k), op.target, true);
    return;
  }
  sizes[1] = slots;
  const Tensor of_slots = full.new_empty(sizes);
  for (int64_t k = 0; k < slots; ++k)
    sum_broadcast(full.select(1, k), of_slots.select(1, k), op.target, true);
  to.copy_(of_slots.sum(1, true));
}

void run_backward(SlotArgs& args, const SlotLoss& op, const variable_list& to) {
  const Tensor& target = op.target;
  const Tensor& d_scale = to[SlotLoss::kScale];
  if (target.numel() == 0) {  // sums over nothing
    for (const SlotLoss::Operand operand : {SlotLoss::kScale, SlotLoss::kWeight})
      if (to[operand].defined()) to[operand].zero_();
    run_backward_kernel(args, op);
    return;
  }
  args.grad_x = slot_view(to[SlotLoss::kSlots], target);
  // On CUDA it is added up slot by slot where it ends up.
  Tensor d_target = to[SlotLoss::kTarget];
  if (d_target.defined() && target.is_cuda() && d_target.scalar_type() != op.dtype())
    d_target = empty_result_like(target, target.options().dtype(op.dtype()));
  args.grad_target = view_of(d_target, target, true);
  // A mask that channels share gets a gradient from each of an independent mixture.
  Tensor d_mask = to[SlotLoss::kMask];
  if (d_mask.defined() && op.composition == Composition::mixture_independent &&
      d_mask.numel() != op.slots.numel())
    d_mask = empty_result_like(op.slots, target.options().dtype(op.dtype()));
  args.grad_mask = slot_view(d_mask, target);
  const Tensor partial = set_scale_sums(args, op, d_scale);
  Tensor full = has_map(op) ? d_scale : Tensor();
  if (full.defined() && full.numel() != scaled(op).numel())
    full = empty_result_like(scaled(op), target.options().dtype(op.dtype()));
  args.grad_scale_map = map_view(full, op);
  const Tensor like_loss = joint(op) ? target.narrow(1, 0, 1) : target;
  const BroadcastGradients weights({to[SlotLoss::kWeight]}, like_loss, op.dtype(), true);
  args.grad_weight = view_of(weights[0], target, true);
  run_backward_kernel(args, op);
  if (full.defined() && !full.is_same(d_scale))
    blended(op) ? sum_broadcast(full, d_scale, target, true) : sum_of_slots(full, d_scale, op);
  if (d_mask.defined() && !d_mask.is_same(to[SlotLoss::kMask])) sum_of_slots(d_mask, to[SlotLoss::kMask], op);
  if (d_target.defined() && !d_target.is_same(to[SlotLoss::kTarget])) to[SlotLoss::kTarget].copy_(d_target);
  weights.sum();
}

// Not where a gradient sums over samples whose upstream gradients are not known yet.
bool writes_gradients(const SlotLoss& op, Needs needs) {
  const bool over_samples =
      (needs_operand(needs, SlotLoss::kScale) &&
       (!has_map(op) || shared_by_samples(op.scale.tensor, scaled(op)))) ||
      (needs_operand(needs, SlotLoss::kWeight) && shared_by_samples(op.weight, op.target));
  return op.reduction != Reduction::none && !(op.reduction == Reduction::sample && over_samples) &&
         may_write_unit_gradients(operands_of(op), needs);
}

void check_mask(const SlotLoss& op) {
  const char* name = op.mask_is_logits ? "mask_logits" : "log_mask";
  const Tensor& mask = op.mask;
  check_float(name, mask);
  const auto full = op.slots.sym_sizes();
  auto one = full.vec();
  one[2] = 1;
  const c10::SymIntArrayRef single(one);
  const bool per_channel = !joint(op) && full[2] > 1;
  const bool fits = mask.sym_sizes() == single || (per_channel && mask.sym_sizes() == full);
  if (!fits && per_channel)
    TORCH_CHECK_VALUE(false, name, " has shape ", mask.sym_sizes(), ", expected ", single, " or ", full,
                      " for slots of shape ", full);
  TORCH_CHECK_VALUE(fits, name, " has shape ", mask.sym_sizes(), ", expected ", single,
                    " for slots of shape ", full);
  check_device(name, mask, "slots", op.slots);
}

void check_scale(const SlotLoss& op) {
  const Tensor& t = op.scale.tensor;
  if (!t.defined()) return;
  check_float("scale", t);
  const c10::SymInt number = blended(op) ? op.target.sym_size(1) : op.slots.sym_size(1);
  const bool fits = has_map(op) ? broadcasts_to(t.sym_sizes(), scaled(op).sym_sizes())
                                : t.sym_numel() == 1 || t.sym_numel() == number;
  TORCH_CHECK_VALUE(fits, "scale has shape ", t.sym_sizes(), ", expected [], [1], one per ",
                    blended(op) ? "channel" : "slot", ", [", number, "], or what broadcasts to ",
                    blended(op) ? "target, " : "slots, ", scaled(op).sym_sizes());
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
  check_mask(*this);
  check_scale(*this);
  check_weight(weight, loss_sizes(*this), "slots", slots);
}

Forward SlotLoss::allocate(Needs needs) const {
  const auto options = target.options().dtype(dtype());
  Forward out;
  if (reduction != Reduction::none)
    out.outputs.push_back(empty_loss(target, reduction, dtype()));
  else
    out.outputs.push_back(joint(*this) ? empty_result(loss_sizes(*this), options)
                                       : empty_result_like(target, options));
  if (return_responsibilities) out.outputs.push_back(empty_result(joined(slots, 2, *this), options));
  if (writes_gradients(*this, needs)) out.saved = defined_of(empty_gradients(operands_of(*this), needs));
  return out;
}

Forward SlotLoss::forward(Needs needs) const {
  Forward out = allocate(needs);
  SlotArgs args = args_of(*this);
  const Tensor partial = set_results(args, *this, out.outputs);
  if (out.saved.empty()) {
    run_forward_kernel(args, *this);
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
