#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fgbg {

namespace py = pybind11;

void bind_ordinary(py::module_& m);

}  // namespace fgbg
