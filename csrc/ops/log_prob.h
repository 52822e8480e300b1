// gaussian_log_prob.
#pragma once

#include "op.h"

namespace fgbg::ops {

struct GaussianLogProb : OpDefaults {
  Tensor z;                           // [*batch, *D], at most kDims dimensions
  Number mu = {0.0}, spread = {0.0};  // broadcast to it; an absent std is 1
  Parameterization parameterization = Parameterization::logvar;
  Reduction reduction = Reduction::batchmean;
  int64_t batch_dims = 1;

  static constexpr const char* kName = "gaussian_log_prob";
  static constexpr size_t kOperands = 3, kOutputs = 1;
  static constexpr std::array kGradNames = {"grad_log_prob"};

  template <class V>
  void fields(V&& v) {
    v.operand("z", z);
    v.scale("mu", mu);
    v.scale("logvar", spread);
    v.option("parameterization", parameterization);
    v.option("reduction", reduction);
    v.option("batch_dims", batch_dims);
  }
  void check() const;
  const Tensor& like() const { return z; }
  at::ScalarType dtype() const { return compute_dtype(z, mu.tensor, spread.tensor); }

  Forward forward(Needs needs) const;
  Forward allocate(Needs needs) const;
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return scale_unit_gradients(grads, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const;
};

}  // namespace fgbg::ops
