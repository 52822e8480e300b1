// Which instruction set runs is decided here, once per process.
#include <cstdlib>
#include <cstring>

#include "kernels.h"
#include "views.h"

namespace fgbg::cpu {

const Kernels& kernel_table_portable();
#ifdef FGBG_X86
const Kernels& kernel_table_avx2();
const Kernels& kernel_table_avx512();
#endif

namespace {

const Kernels& choose() {
#ifdef FGBG_X86
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  int level = avx512 ? 2 : (avx2 ? 1 : 0);
  if (const char* wanted = std::getenv("FGBG_CPU_CAPABILITY")) {
    if (std::strcmp(wanted, "portable") == 0) level = 0;
    if (std::strcmp(wanted, "avx2") == 0 && level > 1) level = 1;
  }
  if (level == 2) return kernel_table_avx512();
  if (level == 1) return kernel_table_avx2();
#endif
  return kernel_table_portable();
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

int64_t row_segments(const Shape& shape) { return segments_of(shape.row, kSegment); }
int64_t pixel_segments(const Shape& shape) { return segments_of(shape.plane, kSegment); }

}  // namespace fgbg::cpu
