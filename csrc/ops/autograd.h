// Forward and backward of every op, as dispatcher ops (what compilers and modes see) and as one autograd
// function, the same whether they are reached eagerly or through the dispatcher.
//
// What forward saves depends on its arguments alone, never on earlier calls: activation checkpointing repeats
// a forward pass and compares. A reduced loss is linear in its upstream gradient, so forward writes the
// gradients for one, and backward multiplies them by the one that arrives, in place if nobody else can see
// them. The derivatives of the backward ops are in _ops.py: those of reference.py, so that no second-order
// formula is written again here.
#pragma once

#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/library.h>

#include "op.h"

namespace fgbg::ops {

// Whether kernels may be called on these tensors, past the dispatcher: neither a mode, a tracer nor a
// subclass wants to see the op.
bool callable_directly(at::TensorList tensors);

// --- schemas --------------------------------------------------------------------------------------

template <class Op>
std::string arguments_of() {
  SchemaVisitor v;
  Op op;
  op.fields(v);
  return v.text;
}

inline std::string results(size_t tensors) {
  std::string text;
  for (size_t i = 0; i < tensors; ++i) text += i == 0 ? "Tensor" : ", Tensor";
  return text;
}

template <class Op>
void define(torch::Library& m) {
  const std::string name = Op::kName, arguments = arguments_of<Op>();
  m.def((name + "(" + arguments + ", int needs=0) -> (" + results(Op::kOutputs) + ", Tensor[])").c_str());
  SchemaVisitor v;
  for (const char* name : Op::kGradNames) v.add("Tensor?", name);
  v.text += ", " + arguments;
  if (Op::kKept) v.add("Tensor?", Op::kKept);
  m.def((name + "_backward(" + v.text + ", int needs) -> (" + results(Op::kOperands) + ")").c_str());
}

// --- the dispatcher's stack -----------------------------------------------------------------------

inline Tensor optional_tensor(const c10::IValue& value) {
  return value.isNone() ? Tensor() : value.toTensor();
}
inline c10::IValue optional_value(const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); }

template <class Op>
Op from_stack(const c10::IValue* arguments) {
  Op op;
  op.fields(FromStack{arguments});
  return op;
}
template <class Op>
void push(const Op& op, torch::jit::Stack& stack) {
  visit(op, ToStack{stack, op.like(), op.dtype()});
}

// Tensors that nobody asked for have no elements.
inline void push(const variable_list& tensors, size_t count, const Tensor& like, torch::jit::Stack& stack) {
  for (size_t i = 0; i < count; ++i)
    stack.emplace_back(i < tensors.size() && tensors[i].defined() ? tensors[i]
                                                                  : at::empty({0}, like.options()));
}

template <class Op>
const c10::OperatorHandle& handle(const char* suffix) {
  static const auto forward =
      c10::Dispatcher::singleton().findSchemaOrThrow(("fgbg::" + std::string(Op::kName)).c_str(), "");
  static const auto backward = c10::Dispatcher::singleton().findSchemaOrThrow(
      ("fgbg::" + std::string(Op::kName) + "_backward").c_str(), "");
  return *suffix ? backward : forward;
}

template <class Op>
Forward dispatch_forward(const Op& op, Needs needs) {
  torch::jit::Stack stack;
  push(op, stack);
  stack.emplace_back(needs);
  handle<Op>("").callBoxed(stack);
  Forward out;
  for (size_t i = 0; i < op.wanted(); ++i) out.outputs.push_back(stack[i].toTensor());
  out.saved = stack[Op::kOutputs].toTensorVector();
  return out;
}

template <class Op>
variable_list dispatch_backward(const Op& op, const variable_list& grads, const Tensor& kept, Needs needs) {
  torch::jit::Stack stack;
  for (size_t i = 0; i < Op::kOutputs; ++i)
    stack.push_back(i < grads.size() ? optional_value(grads[i]) : c10::IValue());
  push(op, stack);
  if (Op::kKept) stack.push_back(optional_value(kept));
  stack.emplace_back(needs);
  handle<Op>("_backward").callBoxed(stack);
  variable_list out(Op::kOperands);
  for (size_t i = 0; i < Op::kOperands; ++i)
    if (needs_operand(needs, i)) out[i] = stack[i].toTensor();
  return out;
}

// How many arguments an op has in its schema, without `needs`.
template <class Op>
size_t argument_count() {
  static const size_t count = handle<Op>("").schema().arguments().size() - 1;
  return count;
}

template <class Op, bool kMeta>
void forward_kernel(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const c10::IValue* first = &*(stack->end() - static_cast<std::ptrdiff_t>(argument_count<Op>() + 1));
  const Op op = from_stack<Op>(first);
  const Needs needs = stack->back().toInt();
  op.check();
  const Forward out = kMeta ? op.allocate(needs) : op.forward(needs);
  torch::jit::drop(*stack, argument_count<Op>() + 1);
  push(out.outputs, Op::kOutputs, op.like(), *stack);
  stack->emplace_back(out.saved);
}

template <class Op, bool kMeta>
void backward_kernel(const c10::OperatorHandle&, torch::jit::Stack* stack) {
  const size_t count = Op::kOutputs + argument_count<Op>() + (Op::kKept ? 1 : 0) + 1;
  const c10::IValue* first = &*(stack->end() - static_cast<std::ptrdiff_t>(count));
  variable_list grads(Op::kOutputs);
  for (size_t i = 0; i < Op::kOutputs; ++i) grads[i] = optional_tensor(first[i]);
  const Op op = from_stack<Op>(first + Op::kOutputs);
  const Tensor kept = Op::kKept ? optional_tensor(first[count - 2]) : Tensor();
  const Needs needs = stack->back().toInt();
  op.check();
  const variable_list out =
      kMeta ? empty_gradients(operands_of(op), needs) : op.backward(grads, kept, needs, false);
  torch::jit::drop(*stack, count);
  push(out, Op::kOperands, op.like(), *stack);
}

template <class Op, bool kMeta = false>
void register_kernels(torch::Library& m) {
  using torch::CppFunction;
  m.impl(Op::kName, CppFunction::makeFromBoxedFunction<&forward_kernel<Op, kMeta>>());
  m.impl((std::string(Op::kName) + "_backward").c_str(),
         CppFunction::makeFromBoxedFunction<&backward_kernel<Op, kMeta>>());
}

// --- autograd -------------------------------------------------------------------------------------

// What profilers call a kernel that was called past the dispatcher.
template <class Op>
const char* record_name(const char* suffix) {
  static const std::string forward = "fgbg::" + std::string(Op::kName), backward = forward + "_backward";
  return (*suffix ? backward : forward).c_str();
}

template <class Op>
Forward forward_directly(const Op& op, Needs needs) {
  RECORD_FUNCTION(record_name<Op>(""), c10::ArrayRef<const c10::IValue>{});
  return op.forward(needs);
}
template <class Op>
variable_list backward_directly(const Op& op, const variable_list& grads, const Tensor& kept, Needs needs,
                                bool overwrite) {
  RECORD_FUNCTION(record_name<Op>("_backward"), c10::ArrayRef<const c10::IValue>{});
  return op.backward(grads, kept, needs, overwrite);
}

template <class Op>
struct Differentiable : torch::autograd::Function<Differentiable<Op>> {
  // Torch looks for the edges of the graph among the first argument's tensors, the operands that are present.
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList /* present */,
                               const Op& op) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const variable_list operands = operands_of(op);
    Needs needs = 0;
    for (size_t i = 0; i < operands.size(); ++i)
      needs |= static_cast<Needs>(operands[i].defined() && operands[i].requires_grad()) << i;

    variable_list tensors = tensors_of(op);
    // Decided here, where a tensor that is traced still says what device it is for.
    const Needs asked = needs | op.also_needs(needs);
    const bool direct = callable_directly(tensors);
    Forward out = direct ? forward_directly(op, asked) : dispatch_forward(op, asked);
    if (op.saves_terms()) out.saved = {out.outputs[1]};
    if (!op.returns_terms() && out.outputs.size() > 1) ctx->mark_non_differentiable({out.outputs[1]});

    SaveOptions options;
    options.all.emplace_back(needs);
    // Hooks, modes and subclasses have seen what is saved, and may hold it.
    options.all.emplace_back(!direct || at::SavedTensorDefaultHooks::get_hooks().has_value());
    visit(op, options);
    ctx->saved_data["options"] = std::move(options.all);
    tensors.insert(tensors.end(), out.saved.begin(), out.saved.end());
    ctx->save_for_backward(std::move(tensors));
    ctx->set_materialize_grads(false);
    return std::move(out.outputs);
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grads) {
    variable_list tensors = ctx->get_saved_variables();
    const c10::IValue* next = ctx->saved_data["options"].toListRef().data();
    const Needs needs = next[0].toInt();
    const bool seen = next[1].toBool();
    Op op;
    op.fields(RestoreOptions{next + 2});
    size_t inputs = 0;
    for_tensors(op, [&](Tensor& t) { t = tensors[inputs++]; });
    const variable_list saved(tensors.begin() + static_cast<std::ptrdiff_t>(inputs), tensors.end());
    tensors.insert(tensors.end(), grads.begin(), grads.end());
    const variable_list all = gradients(op, grads, saved, needs, callable_directly(tensors), seen);

    variable_list out;
    const variable_list operands = operands_of(op);
    for (size_t i = 0; i < Op::kOperands; ++i)
      if (operands[i].defined()) out.push_back(all[i]);
    out.emplace_back();  // of `op`
    return out;
  }

 private:
  // Of every operand that needs one. `direct`: past the dispatcher; `seen`: others may hold what is saved.
  static variable_list gradients(const Op& op, const variable_list& grads, const variable_list& saved,
                                 Needs needs, bool direct, bool seen) {
    variable_list out(Op::kOperands);
    if (std::none_of(grads.begin(), grads.end(), [](const Tensor& g) { return g.defined(); })) return out;
    if (at::GradMode::is_enabled()) return dispatch_backward(op, grads, op.kept(saved), needs);
    const at::AutoDispatchBelowADInplaceOrView guard;
    const bool overwrite = direct && !seen && !torch::autograd::get_current_graph_task_keep_graph();
    needs = op.reuse(grads, saved, needs, overwrite, out);
    if (needs == 0) return out;
    const variable_list rest = direct ? backward_directly(op, grads, op.kept(saved), needs, overwrite)
                                      : dispatch_backward(op, grads, op.kept(saved), needs);
    for (size_t i = 0; i < Op::kOperands; ++i)
      if (needs_operand(needs, i)) out[i] = rest[i];
    return out;
  }
};

inline bool any_requires_grad(const variable_list& operands) {
  return at::GradMode::is_enabled() && std::any_of(operands.begin(), operands.end(), [](const Tensor& t) {
           return t.defined() && t.requires_grad();
         });
}

// An eager call of an op whose tensors have been checked: the outputs that it wants.
template <class Op>
variable_list call(const Op& op) {
  const variable_list operands = operands_of(op);
  if (any_requires_grad(operands)) return Differentiable<Op>::apply(at::TensorList(defined_of(operands)), op);
  const at::AutoDispatchBelowADInplaceOrView guard;
  return (callable_directly(tensors_of(op)) ? forward_directly(op, 0) : dispatch_forward(op, 0)).outputs;
}

template <class Op>
void autograd_kernel(const c10::OperatorHandle& schema, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
  if (at::GradMode::is_enabled()) {
    const size_t count = argument_count<Op>() + 1;
    const Op op = from_stack<Op>(&*(stack->end() - static_cast<std::ptrdiff_t>(count)));
    const variable_list operands = operands_of(op);
    if (any_requires_grad(operands)) {
      const variable_list outputs = Differentiable<Op>::apply(at::TensorList(defined_of(operands)), op);
      torch::jit::drop(*stack, count);
      push(outputs, Op::kOutputs, op.like(), *stack);
      stack->emplace_back(variable_list());
      return;
    }
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  schema.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
}

template <class Op>
void register_autograd(torch::Library& m) {
  static_assert(Op::kOperands <= ScalingArgs::kMax,
                "the kernel that scales gradients has no room for so many");
  m.impl(Op::kName, torch::CppFunction::makeFromBoxedFunction<&autograd_kernel<Op>>());
}

}  // namespace fgbg::ops
