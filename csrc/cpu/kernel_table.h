// Each source of kernels fills its part of the table of its instruction set.
#pragma once

#include "kernels.h"

namespace fgbg::cpu {
inline namespace FGBG_ISA {

void add_latents(Kernels&);
void add_categorical(Kernels&);
void add_reconstruction(Kernels&);
void add_slots(Kernels&);
void add_scaling(Kernels&);
void add_broadcast(Kernels&);

}  // namespace FGBG_ISA
}  // namespace fgbg::cpu
