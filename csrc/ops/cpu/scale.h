#pragma once

// Rows scaled entry by entry, and the gradients of that in one pass, free of torch. Computed in
// acc_t whatever the storage type is.

#include <cstdint>

#include "math/storage.h"

namespace gauge_ext {

template <typename scalar_t>
struct ScaleKernels {
  using acc_t = typename AccOf<scalar_t>::type;

  // Z = Y ∘ gain + bias, (rows, columns)
  void (*scale)(const scalar_t* y,
                int64_t rows,
                int64_t columns,
                const acc_t* gain,
                const acc_t* bias,
                scalar_t* z);

  // grad_Y = G ∘ gain, and sum += the sum over the rows of G ∘ Y; grad_y or sum may be null: not
  // wanted
  void (*scale_backward)(const scalar_t* grad,
                         const scalar_t* y,
                         int64_t rows,
                         int64_t columns,
                         const acc_t* gain,
                         scalar_t* grad_y,
                         acc_t* sum);
};

// The kernels for the instruction set that torch runs with, see low_rank.h
template <typename scalar_t>
const ScaleKernels<scalar_t>& scale_kernels();

}  // namespace gauge_ext
