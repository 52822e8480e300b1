// bernoulli_kl.
#pragma once

#include "autograd.h"

namespace fgbg::ops {

struct BernoulliKl : OpDefaults {
  Tensor logits, prior_logits;  // [B, *D], at most kDims dimensions
  Number prior_logit = {0.0};   // where prior_logits is absent
  Reduction reduction = Reduction::batchmean;

  static constexpr const char* kName = "bernoulli_kl";
  static constexpr size_t kOperands = 2, kOutputs = 1;
  static constexpr std::array kGradNames = {"grad_kl"};

  template <class V>
  void fields(V&& v) {
    v.operand("logits", logits);
    v.optional("prior_logits", prior_logits);
    v.number("prior_logit", prior_logit);
    v.option("reduction", reduction);
  }
  void check() const;
  const Tensor& like() const { return logits; }
  at::ScalarType dtype() const { return compute_dtype({logits, prior_logits}); }

  Forward forward(Needs needs) const;
  Forward allocate(Needs needs) const;
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return scale_unit_gradients(grads, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const;
};

}  // namespace fgbg::ops
