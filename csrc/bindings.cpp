// The Python module: typed calls of the dispatcher ops (the eager path), and what was compiled.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "cpu/kernels.h"
#include "math/philox.h"
#include "ops/autograd.h"
#include "ordinary.h"
#ifdef FGBG_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace py = pybind11;

namespace {

// A plain function pointer with the op's own signature, which pybind11 can read.
template <class Result, class... Args>
auto bind(const c10::TypedOperatorHandle<Result(Args...)>& (*op)()) {
  return [op](Args... args) -> Result { return op().call(std::forward<Args>(args)...); };
}

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
  // Before pybind11's own translator, which would make every c10::Error a RuntimeError.
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (python_error& e) {
      e.restore();  // from a hook in Python, as activation checkpointing has
    } catch (const c10::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what_without_backtrace());
    } catch (const c10::TypeError& e) {
      PyErr_SetString(PyExc_TypeError, e.what_without_backtrace());
    } catch (const c10::Error& e) {
      PyErr_SetString(PyExc_RuntimeError, e.what_without_backtrace());
    }
  });

  using release = py::call_guard<py::gil_scoped_release>;
  using namespace fgbg::ops;
  m.def("philox_normal", bind(philox_normal_op), release());
  m.def("reparameterize", reparameterize_eager, release());
  m.def("gaussian_kl", gaussian_kl_eager, release());
  m.def("sample_gaussian", sample_gaussian_eager, release());
  m.def("bernoulli_kl", bernoulli_kl_eager, release());
  m.def("reconstruction_loss", reconstruction_loss_eager, release());
  fgbg::bind_ordinary(m);
  m.def("build_info", build_info);
  m.def("philox4x32_10", [](std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key) {
    const auto x =
        fgbg::math::philox4x32_10<uint32_t>({counter[0], counter[1], counter[2], counter[3]}, key[0], key[1]);
    return std::array<uint32_t, 4>{x.x0, x.x1, x.x2, x.x3};
  });
}
