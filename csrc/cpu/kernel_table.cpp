// The table of one instruction set; compiled once for each.
#include "kernel_table.h"

namespace fgbg::cpu {

#define FGBG_STRINGIFY_(x) #x
#define FGBG_STRINGIFY(x) FGBG_STRINGIFY_(x)
#define FGBG_TABLE_(isa) kernel_table_##isa
#define FGBG_TABLE(isa) FGBG_TABLE_(isa)

const Kernels& FGBG_TABLE(FGBG_ISA)() {
  static const Kernels table = [] {
    Kernels t{};
    t.name = FGBG_STRINGIFY(FGBG_ISA);
    add_latents(t);
    add_categorical(t);
    add_reconstruction(t);
    add_slots(t);
    add_scaling(t);
    add_broadcast(t);
    return t;
  }();
  return table;
}

}  // namespace fgbg::cpu
