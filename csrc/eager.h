#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fgbg {

// The functions that the package functional calls eagerly.
void bind_eager(pybind11::module_& module);

}  // namespace fgbg
