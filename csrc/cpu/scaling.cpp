// Gradients for an upstream gradient of one, multiplied in place by the one that arrived.
#include "convert.h"
#include "kernel_table.h"
#include "views.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {
namespace {

template <class T, class S>
void scale_all(T factor, int64_t n, S* x) {
  FGBG_SIMD
  for (int64_t k = 0; k < n; ++k) narrow(widen<T>(x[k]) * factor, x[k]);
}

template <class T>
void scale(const ScalingArgs& args, int64_t begin, int64_t end) {
  for (int64_t task = begin; task < end; ++task) {
    int64_t chunk = task;
    int which = 0;
    for (;; ++which) {
      const int64_t chunks = segments_of(args.gradients[which].numel, ScalingArgs::kTask);
      if (chunk < chunks) break;
      chunk -= chunks;
    }
    const auto& gradient = args.gradients[which];
    const int64_t last = min((chunk + 1) * ScalingArgs::kTask, gradient.numel);
    for (int64_t i = chunk * ScalingArgs::kTask; i < last;) {
      const int64_t b = i / gradient.row, n = min((b + 1) * gradient.row, last) - i;
      const T factor = upstream<T>(args.upstream, b);
      with_storage(gradient.dtype, [&](auto storage) {
        if constexpr (sizeof(storage) > 1)
          scale_all(factor, n, static_cast<decltype(storage)*>(gradient.data) + i);
      });
      i += n;
    }
  }
}

int64_t tasks(const ScalingArgs& args) { return args.tasks; }
int64_t cost(const ScalingArgs&) { return ScalingArgs::kTask / 4; }  // a product, not a likelihood

}  // namespace

void add_scaling(Kernels& table) { table.scale = {tasks, cost, {scale<float>, scale<double>}}; }

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
