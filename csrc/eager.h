#pragma once

#include <torch/csrc/utils/pybind.h>

namespace fgbg {

// The functions that functional.py calls eagerly.
void bind_eager(pybind11::module_& module);

}  // namespace fgbg
