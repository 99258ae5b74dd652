#pragma once

// Some columns of a wide matrix (r, vocab), as rows (N, r) one after the other, and their sums
// back. One row of the matrix is gone through after the other, each by many columns: its pages stay
// in the TLB, where r of them a column would not.

#include <cstdint>

#include "math/storage.h"

namespace gauge_ext {

// A matrix as it lies in memory, (rows, columns), with any strides
template <typename T>
struct Strided {
  T* data;
  int64_t rows;
  int64_t row_stride;
  int64_t column_stride;
};

// H[n, j] = M[j, columns[n]] for n < count
template <typename factor_t, typename acc_t>
void gather_columns(const Strided<const factor_t>& matrix,
                    const int64_t* columns,
                    int64_t count,
                    acc_t* hidden) {
  for (int64_t j = 0; j < matrix.rows; ++j) {
    const factor_t* row = matrix.data + j * matrix.row_stride;
    for (int64_t n = 0; n < count; ++n) {
      hidden[n * matrix.rows + j] =
          static_cast<acc_t>(widen(row[columns[n] * matrix.column_stride]));
    }
  }
}

// M[j, columns[n]] += scale · H[n, j] for all n < count in order, but those of the column
// `without`, and for the rows first_row <= j < last_row
template <typename acc_t>
void scatter_columns(const acc_t* hidden,
                     const int64_t* columns,
                     int64_t count,
                     acc_t scale,
                     int64_t without,
                     int64_t first_row,
                     int64_t last_row,
                     const Strided<acc_t>& matrix) {
  for (int64_t j = first_row; j < last_row; ++j) {
    acc_t* row = matrix.data + j * matrix.row_stride;
    for (int64_t n = 0; n < count; ++n) {
      if (columns[n] != without) {
        row[columns[n] * matrix.column_stride] += scale * hidden[n * matrix.rows + j];
      }
    }
  }
}

}  // namespace gauge_ext
