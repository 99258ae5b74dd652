#pragma once

// dora_scale: z = y ∘ g + b along the outputs, which a DoRA layer is beside its low-rank update.
// dora_scale.cpp holds the schema and the checks, dora_scale_formula.cpp the autograd formula and
// the same in plain ATen; the CPU provides the op and its backward under the dispatcher.

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

struct DoraScaleSizes {
  int64_t rows;          // N
  int64_t out_features;  // entries of the gain
};

// Checks every argument of dora_scale and returns the sizes.
DoraScaleSizes check_dora_scale(const at::Tensor& y,
                                const at::Tensor& gain,
                                const std::optional<at::Tensor>& bias);

}  // namespace gauge_ext
