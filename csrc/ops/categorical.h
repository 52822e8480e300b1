// categorical_kl.
#pragma once

#include "op.h"

namespace fgbg::ops {

struct CategoricalKl : OpDefaults {
  Tensor logits;        // at most kDims dimensions besides that of the outcomes
  Tensor prior_logits;  // broadcast to it; absent: uniform
  int64_t dim = 1;      // of the outcomes, not negative
  Reduction reduction = Reduction::batchmean;
  int64_t batch_dims = 1;

  static constexpr const char* kName = "categorical_kl";
  static constexpr size_t kOperands = 2, kOutputs = 1;
  static constexpr std::array kGradNames = {"grad_kl"};

  template <class V>
  void fields(V&& v) {
    v.operand("logits", logits);
    v.optional("prior_logits", prior_logits);
    v.option("dim", dim);
    v.option("reduction", reduction);
    v.option("batch_dims", batch_dims);
  }
  void check() const;
  const Tensor& like() const { return logits; }
  at::ScalarType dtype() const { return compute_dtype(logits, prior_logits); }

  Forward forward(Needs needs) const;
  Forward allocate(Needs needs) const;
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return scale_unit_gradients(grads, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const;
};

}  // namespace fgbg::ops
