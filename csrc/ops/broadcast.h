// Gradients of operands that are broadcast.
#pragma once

#include "tensors.h"

namespace fgbg::ops {

// What a kernel writes gradients to: the gradients themselves or, where an operand is broadcast to the shape
// of `like`, one of that shape, in the type of the computation, which sum() adds up: in one order, whatever
// the number of threads.
class BroadcastGradients {
 public:
  BroadcastGradients(at::TensorList gradients, const Tensor& like, at::ScalarType dtype, bool image);
  const Tensor& operator[](size_t i) const { return full_[i]; }
  void sum() const;

 private:
  using Few = c10::SmallVector<Tensor, 4>;
  const Few gradients_;
  const Tensor& like_;
  const bool image_;
  Few full_;
};

// Adds `from`, of the shape of `like`, up to the shape of `to`, in one order.
void sum_broadcast(const Tensor& from, const Tensor& to, const Tensor& like, bool image);

// Whether `sizes` broadcast to `full`.
bool broadcasts_to(c10::SymIntArrayRef sizes, c10::SymIntArrayRef full);

// A weight of the elements of a loss: a float, bool or uint8 tensor that broadcasts to their sizes.
void check_weight(const Tensor& weight, c10::SymIntArrayRef elements, const char* other_name,
                  const Tensor& other);

// Whether an operand is broadcast along one of the leading dimensions of `like`, which index samples: its
// gradient then sums over samples.
bool shared_by_samples(const Tensor& operand, const Tensor& like, int64_t batch_dims = 1);

}  // namespace fgbg::ops
