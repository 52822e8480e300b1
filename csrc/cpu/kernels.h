// The CPU kernels, one table of them per instruction set.
#pragma once

#include "../kernels.h"

namespace fgbg::cpu {

template <class Args>
struct Kernel {
  int64_t (*tasks)(const Args&);  // independent pieces of work, the same for every thread count
  int64_t (*cost)(const Args&);   // elements per task, to choose how many tasks a thread takes
  // [0]: float32 arithmetic, [1]: float64
  void (*run[2])(const Args&, int64_t begin, int64_t end);
};

struct Kernels {
  const char* name;
  Kernel<NormalArgs> normal;
  Kernel<GaussianArgs> gaussian_forward, gaussian_backward;
  Kernel<BernoulliArgs> bernoulli_forward, bernoulli_backward;
  Kernel<LogProbArgs> log_prob_forward, log_prob_backward;
  Kernel<CategoricalArgs> categorical_forward, categorical_backward;
  Kernel<ReconstructionArgs> reconstruction_forward, reconstruction_backward;
  Kernel<SlotArgs> slots_forward, slots_backward;
  Kernel<ScalingArgs> scale;
  Kernel<BroadcastArgs> broadcast_sum;
};

// The fastest this machine runs; the environment variable FGBG_CPU_CAPABILITY (portable, avx2, avx512)
// asks for a lower one.
const Kernels& kernels();

// How many partial sums per sample and quantity the kernels write, and the sum over them.
int64_t row_segments(const Shape&);
int64_t pixel_segments(const Shape&);
void final_reduction(const FinalReduction&);

}  // namespace fgbg::cpu
