// Reconstruction losses of one image, or of two layers, masked, blended or as a mixture: one op.
#pragma once

#include "op.h"

namespace fgbg::ops {

struct ReconstructionLoss : OpDefaults {
  // [B, C, *spatial]. bg may be absent from a masked loss: fg in both regions. A plain loss has fg and
  // target.
  Tensor fg, bg, target;
  Tensor mask;                                // [B, 1, *spatial] or [B, C, *spatial]
  Number fg_scale = {1.0}, bg_scale = {1.0};  // a number, one for each channel, or broadcast to fg
  Tensor weight;                              // broadcast to the elements of the loss, or absent
  Composition composition = Composition::masked;
  bool mask_is_logits = false;
  Likelihood likelihood{};
  Number fg_weight = {1.0}, bg_weight = {1.0};
  bool normalize_area = false;
  Reduction reduction = Reduction::batchmean;
  bool return_terms = false;

  static constexpr const char* kName = "reconstruction_loss";
  static constexpr size_t kOperands = 7, kOutputs = 2;
  static constexpr std::array kGradNames = {"grad_loss", "grad_terms"};
  static constexpr const char* kKept = "terms";

  template <class V>
  void fields(V&& v) {
    v.operand("fg", fg);
    v.optional("bg", bg);
    v.operand("target", target);
    v.optional("mask", mask);
    v.scale("fg_scale", fg_scale);
    v.scale("bg_scale", bg_scale);
    v.optional("weight", weight);
    v.option("composition", composition);
    v.option("mask_is_logits", mask_is_logits);
    v.option("likelihood", likelihood);
    v.number("fg_weight", fg_weight);
    v.number("bg_weight", bg_weight);
    v.option("normalize_area", normalize_area);
    v.option("reduction", reduction);
    v.option("return_terms", return_terms);
  }
  void check() const;
  const Tensor& like() const { return fg; }
  at::ScalarType dtype() const {
    return compute_dtype(fg, bg, target, mask, fg_scale.tensor, bg_scale.tensor, weight);
  }
  // The terms are [4, B]: foreground nats, background nats, foreground area, background area.
  bool wants_terms() const { return composition == Composition::masked && (return_terms || normalize_area); }
  size_t wanted() const { return wants_terms() ? 2 : 1; }
  bool saves_terms() const { return normalize_area; }
  bool returns_terms() const { return return_terms; }
  Tensor kept(const variable_list& saved) const { return normalize_area ? saved[0] : Tensor(); }

  Forward forward(Needs needs) const;
  Forward allocate(Needs needs) const;
  Needs reuse(const variable_list& grads, const variable_list& saved, Needs needs, bool overwrite,
              variable_list& out) const {
    return normalize_area ? needs : scale_unit_gradients(grads, saved, needs, overwrite, out);
  }
  variable_list backward(const variable_list& grads, const Tensor& kept, Needs needs, bool overwrite) const;
};

}  // namespace fgbg::ops
