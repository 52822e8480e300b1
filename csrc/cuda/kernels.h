// The CUDA launchers. `f64` chooses float64 arithmetic; nothing synchronises.
#pragma once

#include "../kernels.h"

struct CUstream_st;  // cudaStream_t, without the toolkit's headers

namespace fgbg::cuda {

using Stream = CUstream_st*;

void normal(const NormalArgs&, bool f64, Stream);
void gaussian_forward(const GaussianArgs&, bool f64, Stream);
void gaussian_backward(const GaussianArgs&, bool f64, Stream);
void log_prob_forward(const LogProbArgs&, bool f64, Stream);
void log_prob_backward(const LogProbArgs&, bool f64, Stream);
void categorical_forward(const CategoricalArgs&, bool f64, Stream);
void categorical_backward(const CategoricalArgs&, bool f64, Stream);
void bernoulli_forward(const BernoulliArgs&, bool f64, Stream);
void bernoulli_backward(const BernoulliArgs&, bool f64, Stream);
void reconstruction_forward(const ReconstructionArgs&, bool f64, Stream);
void reconstruction_backward(const ReconstructionArgs&, bool f64, Stream);
void slots_forward(const SlotArgs&, bool f64, Stream);
void slots_backward(const SlotArgs&, bool f64, Stream);
void scale(const ScalingArgs&, bool f64, Stream);

// How many partial sums per sample and quantity the kernels write.
int64_t row_segments(const Shape&);
int64_t pixel_segments(const Shape&);

// How many numbers of the type of the computation a loss of slots needs as scratch memory, SlotArgs::scratch.
int64_t slot_scratch(const SlotArgs&);

}  // namespace fgbg::cuda
