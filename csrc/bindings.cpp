// The Python module: the eager calls, the CPU cache, and what was compiled.
#include <torch/csrc/utils/pybind.h>

#include "cpu/caching_allocator.h"
#include "cpu/kernels.h"
#include "eager.h"
#include "math/philox.h"
#ifdef FGBG_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
  info["torch"] = FGBG_TORCH_VERSION;
  info["cpu_capability"] = fgbg::cpu::kernels().name;
#ifdef FGBG_WITH_CUDA
  info["cuda"] = std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10);
  info["cuda_architectures"] = FGBG_CUDA_ARCHITECTURES;
#else
  info["cuda"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  fgbg::bind_eager(m);
  m.def("use_cpu_cache", fgbg::cpu::use_cache);
  m.def("cpu_cache_bytes", fgbg::cpu::cached_bytes);
  m.def("empty_cpu_cache", fgbg::cpu::empty_cache);
  m.def("build_info", build_info);
  m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const auto x =
        fgbg::math::philox4x32_10<uint32_t>({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return std::array<uint32_t, 4>{x.x0, x.x1, x.x2, x.x3};
  });
}
