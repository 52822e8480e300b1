// The launchers of the losses of slots; see slots.cuh.
#include "../math/likelihood.h"
#include "kernels.h"
#include "launch.cuh"
#include "slots.h"

namespace fgbg::cuda {

template <class L>
void slot_mixture_of(const SlotArgs&, bool gradients, bool f64, Stream);
template <class L>
void slot_blend_of(const SlotArgs&, bool gradients, bool f64, Stream);

namespace {

using Launch = void (*)(const SlotArgs&, bool, bool, Stream);
constexpr Launch kMixture[] = {
#define FGBG_ENTRY(L, name) slot_mixture_of<math::L>,
    FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)
#undef FGBG_ENTRY
};
constexpr Launch kBlend[] = {
#define FGBG_ENTRY(L, name) slot_blend_of<math::L>,
    FGBG_FOR_EACH_LIKELIHOOD(FGBG_ENTRY)
#undef FGBG_ENTRY
};

void run(const SlotArgs& args, bool gradients, bool f64, Stream stream) {
  const auto& table = args.composition == Composition::blended ? kBlend : kMixture;
  table[static_cast<int>(args.likelihood)](args, gradients, f64, stream);
}

}  // namespace

void slots_forward(const SlotArgs& args, bool f64, Stream stream) { run(args, false, f64, stream); }
void slots_backward(const SlotArgs& args, bool f64, Stream stream) { run(args, true, f64, stream); }

int64_t slot_scratch(const SlotArgs& args) {
  return args.slots * kThreads * kScratch > kMaxScratch ? args.slots * args.shape.size[0] * args.shape.plane
                                                        : 0;
}

}  // namespace fgbg::cuda
