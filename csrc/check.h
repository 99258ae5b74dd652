#pragma once

// Argument checks that say what was expected and what came.

#include <c10/util/Exception.h>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

// Fails unless `tensor` is 2-D with shape [rows, columns]; `shape` is how the reader writes it.
inline void check_matrix(const at::Tensor& tensor,
                         const char* name,
                         const char* shape,
                         const c10::SymInt& rows,
                         const c10::SymInt& columns) {
  TORCH_CHECK(tensor.dim() == 2, name, " must have shape ", shape, ", got ", tensor.sym_sizes());
  TORCH_CHECK(tensor.sym_size(0) == rows && tensor.sym_size(1) == columns, name,
              " must have shape ", shape, " = [", rows, ", ", columns, "], got ",
              tensor.sym_sizes());
}

inline void check_same_device(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  TORCH_CHECK(tensor.device() == x.device(), name, " must be on x's device, ", x.device(), ", got ",
              tensor.device());
}

inline void check_same_dtype(const at::Tensor& tensor, const char* name, const at::Tensor& x) {
  TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), name, " must have x's dtype, ",
              x.scalar_type(), ", got ", tensor.scalar_type());
}

}  // namespace gauge_ext
