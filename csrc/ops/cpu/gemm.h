#pragma once

// Matrix products on bare memory, row-major, by the BLAS that torch itself uses. ATen's operators
// do the same behind half a dozen tensors and views, which is most of the time of a small layer.

#include <cstdint>

namespace gauge_ext {

// A matrix (rows, columns) whose element (i, j) lies at data[i * row_stride + j * column_stride];
// one of the strides is 1.
template <typename T>
struct Strided {
  const T* data;
  int64_t row_stride;
  int64_t column_stride;

  Strided transposed() const { return {data, column_stride, row_stride}; }
};

// C = A B, or, where `add`, C += A B: C (rows, columns) and A (rows, inner), whose rows lie
// c_stride and a_stride apart, B (inner, columns).
template <typename T>
void gemm(int64_t rows,
          int64_t columns,
          int64_t inner,
          const T* a,
          int64_t a_stride,
          Strided<T> b,
          bool add,
          T* c,
          int64_t c_stride);

}  // namespace gauge_ext
