#pragma once

#include <pybind11/pybind11.h>

namespace gauge_ext {

// Adds what works on blocks of quantized weights to the module.
void bind_blocks(pybind11::module_& m);

}  // namespace gauge_ext
