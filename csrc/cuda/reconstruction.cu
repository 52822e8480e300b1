// The launchers of the reconstruction losses; see reconstruction.cuh.
#include "../math/likelihood.h"
#include "kernels.h"
#include "launch.cuh"

namespace fgbg::cuda {

template <class L>
void forward_of(const ReconstructionArgs&, bool f64, Stream);
template <class L>
void backward_of(const ReconstructionArgs&, bool f64, Stream);

namespace {

using Launch = void (*)(const ReconstructionArgs&, bool, Stream);
constexpr Launch kForward[] = {
#define FGBG_ENTRY(L, name) forward_of<math::L>,
    FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)
#undef FGBG_ENTRY
};
constexpr Launch kBackward[] = {
#define FGBG_ENTRY(L, name) backward_of<math::L>,
    FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)
#undef FGBG_ENTRY
};

}  // namespace

void reconstruction_forward(const ReconstructionArgs& args, bool f64, Stream stream) {
  kForward[static_cast<int>(args.likelihood)](args, f64, stream);
}

void reconstruction_backward(const ReconstructionArgs& args, bool f64, Stream stream) {
  kBackward[static_cast<int>(args.likelihood)](args, f64, stream);
}

int64_t pixel_segments(const Shape& shape) {
  return segments_of(shape.plane, cut_of(shape, shape.plane).segment);
}

}  // namespace fgbg::cuda
