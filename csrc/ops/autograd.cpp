#include "autograd.h"

#include <ATen/TensorSubclassLikeUtils.h>
#include <ATen/TracerMode.h>

namespace fgbg::ops {

bool callable_directly(at::TensorList tensors) {
  return !c10::impl::dispatch_mode_enabled() && !at::tracer::impl::is_dispatch_enabled() &&
         std::all_of(tensors.begin(), tensors.end(), [](const Tensor& t) {
           // Negated views and tensors of nothing but zeros are made real by the dispatcher.
           return !t.defined() || (has_kernels(t.device()) && !at::isTensorSubclassLike(t) && !t.is_neg() &&
                                   !t._is_zerotensor());
         });
}

bool may_write_unit_gradients(const variable_list& operands, Needs needs) {
  for (size_t i = 0; i < operands.size(); ++i)
    if (needs_operand(needs, i) && operands[i].scalar_type() == at::kHalf) return false;
  return needs != 0;
}

namespace {

template <class T>
bool all_ones_of(const Tensor& grad) {
  const Tensor flat = grad.dim() > 1 ? grad.reshape(-1) : grad;
  const T* values = flat.const_data_ptr<T>();
  const int64_t stride = flat.dim() == 0 ? 0 : flat.stride(0);
  for (int64_t b = 0; b < flat.numel(); ++b)
    if (values[b * stride] != T(1)) return false;
  return true;
}

// Of a GPU's numbers, which cannot be looked at without waiting for them, it is not known; there the kernel
// looks.
bool known_to_be_ones(const Tensor& grad) {
  if (grad.is_cuda()) return false;
  return grad.scalar_type() == at::kDouble ? all_ones_of<double>(grad) : all_ones_of<float>(grad);
}

// In torch's own operations, out of place, for whatever `grad` is (batched, traced): a number, or one for
// each sample.
Tensor scaled(const Tensor& gradient, const Tensor& grad) {
  Tensor factor = grad;
  while (grad.dim() > 0 && factor.dim() < gradient.dim()) factor = factor.unsqueeze(-1);
  if (gradient.scalar_type() == grad.scalar_type()) return gradient.mul(factor);
  return gradient.to(grad.scalar_type()).mul(factor).to(gradient.scalar_type());
}

}  // namespace

Needs scale_unit_gradients(const variable_list& grads, const variable_list& saved, Needs needs,
                           bool overwrite, variable_list& out) {
  const bool terms = grads.size() > 1 && grads[1].defined();
  if (saved.empty() || !grads[0].defined() || terms) return needs;
  if (overwrite && !known_to_be_ones(grads[0])) scale_in_place(saved, grads[0]);
  out = by_operand(saved, needs, out.size());
  for (Tensor& gradient : out)
    if (!overwrite && gradient.defined()) gradient = scaled(gradient, grads[0]);
  return 0;
}

}  // namespace fgbg::ops
