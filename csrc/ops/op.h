// An op is a struct (see signature.h) with
//   kName, kOperands, kOutputs, kGradNames   for the schemas
//   kKept           what backward can use of what forward has saved, by name
//   check()         raises what is wrong with the tensors
//   like(), dtype() the tensor that results resemble; the type of the computation
//   allocate(needs) the outputs and what is saved, yet to be filled: all there is to do while tracing
//   forward(needs)  the same, filled
//   backward(grads, kept, needs, overwrite)    the gradients that are needed, one for each operand
//   reuse(grads, saved, needs, overwrite, out) those that follow from what forward has saved; returns the
//                   needs that are left to backward()
// and where it differs from OpDefaults: what is said there.
#pragma once

#include "signature.h"
#include "tensors.h"

namespace fgbg::ops {

struct Forward {
  variable_list outputs;
  variable_list saved;  // for backward
};

struct OpDefaults {
  static constexpr const char* kKept = nullptr;

  // How many of the outputs are asked for, the first ones.
  size_t wanted() const { return 1; }
  // Whether the second output is differentiable, and whether backward needs it.
  bool returns_terms() const { return true; }
  bool saves_terms() const { return false; }
  // What forward is to save besides.
  Needs also_needs(Needs) const { return 0; }
  // kKept, of what was saved.
  Tensor kept(const variable_list&) const { return {}; }
};

// Turns the gradients for an upstream gradient of one, saved in the order of the operands that need one, into
// those for grads[0]; returns the needs that are left, none or all. In place if `overwrite`.
Needs scale_unit_gradients(const variable_list& grads, const variable_list& saved, Needs needs,
                           bool overwrite, variable_list& out);

// Gradients in float16 are computed in backward: those for an upstream gradient of one could underflow before
// the loss scale arrives.
bool may_write_unit_gradients(const variable_list& operands, Needs needs);

}  // namespace fgbg::ops
