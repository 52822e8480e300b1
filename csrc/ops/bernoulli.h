// bernoulli_kl.
#pragma once

#include "op.h"

namespace fgbg::ops {

struct BernoulliKl : OpDefaults {
  Tensor logits;  // [*batch, *D], at most kDims dimensions
  Number prior_logits = {0.0};
  Reduction reduction = Reduction::batchmean;
  int64_t batch_dims = 1;

  static constexpr const char* kName = "bernoulli_kl";
  static constexpr size_t kOperands = 2, kOutputs = 1;
  static constexpr std::array kGradNames = {"grad_kl"};

  template <class V>
  void fields(V&& v) {
    v.operand("logits", logits);
    v.scale("prior_logits", prior_logits);
    v.option("reduction", reduction);
    v.option("batch_dims", batch_dims);
  }
  void check() const;
  const Tensor& like() const { return logits; }
  at::ScalarType dtype() const { return compute_dtype(logits, prior_logits.tensor); }

  Forward forward(Needs needs) const;
  Forward allocate(Needs needs) const;
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return scale_unit_gradients(grads, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const;
};

}  // namespace fgbg::ops
