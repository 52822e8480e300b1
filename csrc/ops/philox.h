// philox_normal: the noise of reparameterize, as a tensor. Not differentiable.
#pragma once

#include "tensors.h"

namespace fgbg::ops {

Tensor philox_normal(const Tensor& seed, c10::SymIntArrayRef size, const c10::SymInt& offset,
                     at::ScalarType dtype, const at::Device& device);

}  // namespace fgbg::ops
