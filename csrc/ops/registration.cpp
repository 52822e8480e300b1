// Every op, as the dispatcher is told of it.
#include "autograd.h"
#include "bernoulli.h"
#include "categorical.h"
#include "gaussian.h"
#include "log_prob.h"
#include "philox.h"
#include "reconstruction.h"
#include "slots.h"

namespace fgbg::ops {
namespace {

template <class... Ops>
struct List {
  static void define_all(torch::Library& m) { (define<Ops>(m), ...); }
  template <bool kMeta>
  static void register_all(torch::Library& m) {
    (register_kernels<Ops, kMeta>(m), ...);
  }
  static void register_all_autograd(torch::Library& m) { (register_autograd<Ops>(m), ...); }
};
using Differentiables = List<Reparameterize, GaussianKl, SampleGaussian, GaussianLogProb, BernoulliKl,
                             CategoricalKl, ReconstructionLoss, SlotLoss>;

void kernels(torch::Library& m) {
  Differentiables::register_all<false>(m);
  m.impl("philox_normal", philox_normal_kernel);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(fgbg, m) {
  Differentiables::define_all(m);
  m.def("philox_normal(Tensor seed, SymInt[] size, SymInt offset, ScalarType dtype) -> Tensor");
}
TORCH_LIBRARY_IMPL(fgbg, CPU, m) { kernels(m); }
#ifdef FGBG_WITH_CUDA
TORCH_LIBRARY_IMPL(fgbg, CUDA, m) { kernels(m); }
#endif
TORCH_LIBRARY_IMPL(fgbg, Meta, m) {
  Differentiables::register_all<true>(m);
  m.impl("philox_normal", philox_normal_meta);
}
TORCH_LIBRARY_IMPL(fgbg, Autograd, m) { Differentiables::register_all_autograd(m); }

}  // namespace fgbg::ops
