// Losses of an image that K slots make up: a mixture of them, or their blend. One op.
#pragma once

#include "op.h"

namespace fgbg::ops {

struct SlotLoss : OpDefaults {
  Tensor slots;                // [B, K, C, *spatial]
  Tensor target;               // [B, C, *spatial]
  Tensor mask;                 // [B, K, 1, *spatial] or [B, K, C, *spatial]
  Number scale = {1.0};        // of a mixture [] or [K], of a blend [] or [C]; or a map that broadcasts
  Tensor weight;               // [B, 1, *spatial] or [B, C, *spatial], or absent
  Composition composition{};   // not masked
  bool mask_is_logits = true;  // or log-probabilities
  Likelihood likelihood{};
  Reduction reduction = Reduction::batchmean;
  bool return_responsibilities = false;

  enum Operand : size_t { kSlots, kTarget, kMask, kScale, kWeight };  // in the order of fields()
  static constexpr const char* kName = "slot_loss";
  static constexpr size_t kOperands = 5, kOutputs = 2;
  static constexpr std::array kGradNames = {"grad_loss", "grad_responsibilities"};  // of these there is none

  template <class V>
  void fields(V&& v) {
    v.operand("slots", slots);
    v.operand("target", target);
    v.operand("mask", mask);
    v.scale("scale", scale);
    v.optional("weight", weight);
    v.option("composition", composition);
    v.option("mask_is_logits", mask_is_logits);
    v.option("likelihood", likelihood);
    v.option("reduction", reduction);
    v.option("return_responsibilities", return_responsibilities);
  }
  void check() const;
  const Tensor& like() const { return target; }
  at::ScalarType dtype() const { return compute_dtype(slots, target, mask, scale.tensor, weight); }
  size_t wanted() const { return return_responsibilities ? 2 : 1; }
  bool returns_terms() const { return false; }

  Forward forward(Needs needs) const;
  Forward allocate(Needs needs) const;
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return scale_unit_gradients({grads[0]}, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const;
};

}  // namespace fgbg::ops
