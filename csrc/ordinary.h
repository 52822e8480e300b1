#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fgbg {

namespace py = pybind11;

// `alike`, and the submodule `ordinary`.
void bind_ordinary(py::module_& module);

}  // namespace fgbg
