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

bool shared_by_samples(const Tensor& operand, const Tensor& like) {
  return operand.defined() && like.sym_size(0) != 1 &&
         (operand.dim() < like.dim() || operand.sym_size(0) == 1);
}

}  // namespace fgbg::ops
