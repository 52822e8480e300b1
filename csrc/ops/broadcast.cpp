#include "broadcast.h"

#include <ATen/ExpandUtils.h>

namespace fgbg::ops {

BroadcastGradients::BroadcastGradients(variable_list gradients, const Tensor& like, at::ScalarType dtype,
                                       bool image)
    : gradients_(std::move(gradients)), like_(like), image_(image), full_(gradients_) {
  for (Tensor& g : full_)
    if (g.defined() && g.numel() != like.numel()) g = empty_result_like(like, like.options().dtype(dtype));
}

void BroadcastGradients::sum() const {
  for (size_t i = 0; i < full_.size(); ++i) {
    const Tensor &to = gradients_[i], &from = full_[i];
    if (!to.defined() || from.is_same(to)) continue;
    if (from.is_cuda()) {
      to.copy_(at::sum_to(from, to.sizes()));
      continue;
    }
    if (like_.numel() == 0) {
      to.zero_();
      continue;
    }
    BroadcastArgs args{};
    args.shape = image_ ? image_shape(like_) : latent_shape(like_);
    args.from = view_of(from, like_, image_);
    args.to = view_of(to, like_, image_);
    run_cpu(cpu::kernels().broadcast_sum, args, from.scalar_type() == at::kDouble);
  }
}

bool shared_by_samples(const Tensor& operand, const Tensor& like, int64_t batch_dims) {
  if (!operand.defined()) return false;
  if (operand.dim() < like.dim()) return true;
  for (int64_t d = 0; d < batch_dims; ++d)
    if (operand.sym_size(d) != like.sym_size(d)) return true;
  return false;
}

}  // namespace fgbg::ops
