#include "philox.h"

namespace fgbg::ops {
namespace {

Tensor empty_noise(const Tensor& seed, c10::SymIntArrayRef size, const c10::SymInt& offset,
                   at::ScalarType dtype, const at::Device& device) {
  check_seed(seed, {});
  check_at_least("offset", offset, 0);
  TORCH_CHECK_TYPE(is_float(dtype), "dtype is ", dtype_name(dtype), ", expected one of ", float_names());
  return empty_result(size, seed.options().dtype(dtype).device(device));
}

}  // namespace

Tensor philox_normal(const Tensor& seed, c10::SymIntArrayRef size, const c10::SymInt& offset,
                     at::ScalarType dtype, const at::Device& device) {
  Tensor out = empty_noise(seed, size, offset, dtype, device);
  if (out.numel() == 0) return out;
  const Tensor flat = out.view({1, -1});
  NormalArgs args{};
  args.noise = noise_of(seed, offset.expect_int());
  args.out = view_of(flat, flat, false);
  args.numel = out.numel();
  FGBG_RUN(normal, args, dtype == at::kDouble, out);
  return out;
}

Tensor philox_normal_kernel(const Tensor& seed, c10::SymIntArrayRef size, c10::SymInt offset,
                            at::ScalarType dtype) {
  return philox_normal(seed, size, offset, dtype, seed.device());
}
Tensor philox_normal_meta(const Tensor& seed, c10::SymIntArrayRef size, c10::SymInt offset,
                          at::ScalarType dtype) {
  return empty_noise(seed, size, offset, dtype, seed.device());
}

}  // namespace fgbg::ops
