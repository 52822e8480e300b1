#include "broadcast.h"

namespace fgbg::ops {

BroadcastGradients::BroadcastGradients(at::TensorList gradients, const Tensor& like, at::ScalarType dtype,
                                       bool image)
    : gradients_(gradients.begin(), gradients.end()), like_(like), image_(image), full_(gradients_) {
  for (Tensor& g : full_)
    if (g.defined() && g.numel() != like.numel()) g = empty_result_like(like, like.options().dtype(dtype));
}

void BroadcastGradients::sum() const {
  for (size_t i = 0; i < full_.size(); ++i)
    if (gradients_[i].defined() && !full_[i].is_same(gradients_[i]))
      sum_broadcast(full_[i], gradients_[i], like_, image_);
}

void sum_broadcast(const Tensor& from, const Tensor& to, const Tensor& like, bool image) {
  if (from.is_cuda()) {
    to.copy_(from.sum_to_size(to.sizes()));
    return;
  }
  if (like.numel() == 0) {
    to.zero_();
    return;
  }
  BroadcastArgs args{};
  args.shape = image ? image_shape(like) : latent_shape(like);
  args.from = view_of(from, like, image);
  args.to = view_of(to, like, image);
  run_cpu(cpu::kernels().broadcast_sum, args, from.scalar_type() == at::kDouble);
}

bool broadcasts_to(c10::SymIntArrayRef sizes, c10::SymIntArrayRef full) {
  if (sizes.size() > full.size()) return false;
  const size_t before = full.size() - sizes.size();
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] != 1 && sizes[d] != full[before + d]) return false;
  return true;
}

void check_weight(const Tensor& weight, c10::SymIntArrayRef elements, const char* other_name,
                  const Tensor& other) {
  if (!weight.defined()) return;
  const bool select = weight.scalar_type() == at::kBool || weight.scalar_type() == at::kByte;
  TORCH_CHECK_TYPE(is_float(weight.scalar_type()) || select, "weight has dtype ",
                   dtype_name(weight.scalar_type()), ", expected one of ", float_names(),
                   ", torch.bool, torch.uint8");
  check_strided("weight", weight);
  TORCH_CHECK_VALUE(broadcasts_to(weight.sym_sizes(), elements), "weight has shape ", weight.sym_sizes(),
                    ", expected what broadcasts to the elements of the loss, ", elements);
  check_device("weight", weight, other_name, other);
}

bool shared_by_samples(const Tensor& operand, const Tensor& like, int64_t batch_dims) {
  if (!operand.defined()) return false;
  if (operand.dim() < like.dim()) return true;
  for (int64_t d = 0; d < batch_dims; ++d)
    if (operand.sym_size(d) != like.sym_size(d)) return true;
  return false;
}

}  // namespace fgbg::ops
