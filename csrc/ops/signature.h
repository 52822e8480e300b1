// What an op takes, said once: a struct whose fields() names every argument in the order of the schema. From
// it come the schema itself, the way from and to the dispatcher's stack, and what autograd saves. So an
// argument is added in one place, and none is told apart by its position.
//
// fields(v) calls, for each argument:
//   v.operand(name, Tensor&)   a tensor that gets a gradient
//   v.optional(name, Tensor&)  the same, or undefined
//   v.scale(name, Number&)     the same, or a number
//   v.constant(name, Tensor&)  a tensor without a gradient
//   v.number(name, Number&)    a number, in a compiled graph a tensor that holds it
//   v.option(name, T&)         anything else
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <ATen/core/stack.h>

#include "words.h"

namespace fgbg::ops {

using at::Tensor;
using variable_list = std::vector<Tensor>;  // torch::autograd has the same

constexpr size_t kTensors = 8;  // room for those of an op; with more, a list of them is moved as it grows

// Bit i: operand i needs a gradient. kKeepSlope: forward is to keep dz/dspread for backward.
using Needs = int64_t;
constexpr Needs kKeepSlope = 1 << 16;
constexpr bool needs_operand(Needs needs, size_t i) { return (needs >> i & 1) != 0; }

// A number, or a tensor with it on the device of the data: what a compiled graph passes, so that another
// value needs no other graph. `absent` is what no argument stands for.
struct Number {
  double absent, value = absent;
  Tensor tensor = {};
};

// Of what a visitor of operands or tensors leaves alone.
struct Visitor {
  template <class T>
  void option(const char*, T&) {}
  void constant(const char*, Tensor&) {}
  void number(const char*, Number&) {}
};

class SchemaVisitor {
 public:
  void operand(const char* name, Tensor&) { add("Tensor", name); }
  void optional(const char* name, Tensor&) { add("Tensor?", name); }
  void scale(const char* name, Number&) { add("Tensor?", name); }
  void constant(const char* name, Tensor&) { add("Tensor", name); }
  void number(const char* name, Number&) { add("Tensor?", name); }
  void option(const char* name, bool&) { add("bool", name); }
  void option(const char* name, int64_t&) { add("int", name); }
  void option(const char* name, c10::SymInt&) { add("SymInt", name); }
  void option(const char* name, std::optional<c10::SymInt>&) { add("SymInt?", name); }
  template <class Word>
  void option(const char* name, Word&) {
    add("str", name);
  }
  void add(const char* type, const char* name) {
    text += (text.empty() ? "" : ", ") + std::string(type) + " " + name;
  }

  std::string text;
};

// The tensors that get gradients, in order; undefined where absent.
struct OperandVisitor : Visitor {
  OperandVisitor() { all.reserve(kTensors); }
  void operand(const char*, Tensor& t) { all.push_back(t); }
  void optional(const char*, Tensor& t) { all.push_back(t); }
  void scale(const char*, Number& x) { all.push_back(x.tensor); }

  variable_list all;
};

// Calls body(Tensor&) for every tensor field.
template <class Body>
struct TensorVisitor : Visitor {
  explicit TensorVisitor(Body b) : body(b) {}
  void operand(const char*, Tensor& t) { body(t); }
  void optional(const char*, Tensor& t) { body(t); }
  void scale(const char*, Number& x) { body(x.tensor); }
  void constant(const char*, Tensor& t) { body(t); }
  void number(const char*, Number& x) { body(x.tensor); }

  Body body;
};

// Everything but the tensors, as autograd saves it: numbers alone, which compiled autograd can compare.
struct SaveOptions {
  SaveOptions() { all.reserve(16); }
  void operand(const char*, Tensor&) {}
  void optional(const char*, Tensor&) {}
  void constant(const char*, Tensor&) {}
  void scale(const char*, Number& x) { all.emplace_back(x.value); }
  void number(const char*, Number& x) { all.emplace_back(x.value); }
  void option(const char*, bool& x) { all.emplace_back(x); }
  void option(const char*, int64_t& x) { all.emplace_back(x); }
  void option(const char*, c10::SymInt& x) { all.emplace_back(x); }
  void option(const char*, std::optional<c10::SymInt>& x) {
    all.push_back(x ? c10::IValue(*x) : c10::IValue());
  }
  template <class Word>
  void option(const char*, Word& x) {
    all.emplace_back(static_cast<int64_t>(x));
  }

  c10::impl::GenericList all{c10::AnyType::get()};
};

struct RestoreOptions {
  void operand(const char*, Tensor&) {}
  void optional(const char*, Tensor&) {}
  void constant(const char*, Tensor&) {}
  void scale(const char*, Number& x) { x.value = (next++)->toDouble(); }
  void number(const char*, Number& x) { x.value = (next++)->toDouble(); }
  void option(const char*, bool& x) { x = (next++)->toBool(); }
  void option(const char*, int64_t& x) { x = (next++)->toInt(); }
  void option(const char*, c10::SymInt& x) { x = (next++)->toSymInt(); }
  void option(const char*, std::optional<c10::SymInt>& x) {
    x = next->isNone() ? std::nullopt : std::optional(next->toSymInt());
    ++next;
  }
  template <class Word>
  void option(const char*, Word& x) {
    x = static_cast<Word>((next++)->toInt());
  }

  const c10::IValue* next;
};

struct FromStack {
  void operand(const char*, Tensor& t) { t = (next++)->toTensor(); }
  void optional(const char*, Tensor& t) {
    if (!next->isNone()) t = next->toTensor();
    ++next;
  }
  void constant(const char* name, Tensor& t) { operand(name, t); }
  void scale(const char* name, Number& x) { optional(name, x.tensor); }
  void number(const char* name, Number& x) { optional(name, x.tensor); }
  void option(const char*, bool& x) { x = (next++)->toBool(); }
  void option(const char*, int64_t& x) { x = (next++)->toInt(); }
  void option(const char*, c10::SymInt& x) { x = (next++)->toSymInt(); }
  void option(const char*, std::optional<c10::SymInt>& x) {
    if (!next->isNone()) x = next->toSymInt();
    ++next;
  }
  template <class Word>
  void option(const char* name, Word& x) {
    x = parse<Word>(name, (next++)->toStringView());
  }

  const c10::IValue* next;
};

struct ToStack {
  torch::jit::Stack& stack;
  const Tensor& like;  // whose kind numbers become, tensors of this type
  at::ScalarType dtype;

  void operand(const char*, Tensor& t) { stack.emplace_back(t); }
  void optional(const char*, Tensor& t) { stack.push_back(t.defined() ? c10::IValue(t) : c10::IValue()); }
  void constant(const char* name, Tensor& t) { operand(name, t); }
  void scale(const char* name, Number& x) { number(name, x); }
  void number(const char*, Number& x) {
    if (x.tensor.defined())
      stack.emplace_back(x.tensor);
    else
      stack.push_back(x.value == x.absent ? c10::IValue() : c10::IValue(like.new_full({}, x.value, dtype)));
  }
  void option(const char*, bool& x) { stack.emplace_back(x); }
  void option(const char*, int64_t& x) { stack.emplace_back(x); }
  void option(const char*, c10::SymInt& x) { stack.emplace_back(x); }
  void option(const char*, std::optional<c10::SymInt>& x) {
    stack.push_back(x ? c10::IValue(*x) : c10::IValue());
  }
  template <class Word>
  void option(const char*, Word& x) {
    stack.emplace_back(std::string(word(x)));
  }
};

// fields() serves readers and writers alike, so it is not const; these do not change the op.
template <class Op, class V>
void visit(const Op& op, V&& visitor) {
  const_cast<Op&>(op).fields(visitor);
}

template <class Op>
variable_list operands_of(const Op& op) {
  OperandVisitor v;
  visit(op, v);
  return std::move(v.all);
}

template <class Op, class Body>
void for_tensors(Op& op, Body body) {
  TensorVisitor<Body> v(body);
  op.fields(v);
}

template <class Op>
variable_list tensors_of(const Op& op) {
  variable_list all;
  all.reserve(kTensors + 4);  // with what forward saves
  for_tensors(const_cast<Op&>(op), [&](Tensor& t) { all.push_back(t); });
  return all;
}

}  // namespace fgbg::ops
