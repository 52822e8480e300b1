// philox_normal: the noise of reparameterize, as a tensor. Not differentiable.
#pragma once

#include "tensors.h"

namespace fgbg::ops {

Tensor philox_normal(const Tensor& seed, c10::SymIntArrayRef size, const c10::SymInt& offset,
                     at::ScalarType dtype, const at::Device& device);

// For the dispatcher: on the device of the seed.
Tensor philox_normal_kernel(const Tensor& seed, c10::SymIntArrayRef size, c10::SymInt offset,
                            at::ScalarType dtype);
Tensor philox_normal_meta(const Tensor& seed, c10::SymIntArrayRef size, c10::SymInt offset,
                          at::ScalarType dtype);

}  // namespace fgbg::ops
