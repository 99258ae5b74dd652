#pragma once

// Rows of x, y and their gradients in acc_t: a tensor's own memory, or copies of a chunk of it.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include <ATen/core/Tensor.h>

#include "ops/cpu/low_rank.h"
#include "ops/cpu/pieces.h"

namespace gauge_ext {

// Rows in half precision are converted so many at a time.
constexpr int64_t kChunkRows = 512;

// Rows first, first + 1, ... in acc_t: the tensor's own memory, or a copy in `copy`.
template <typename scalar_t, typename acc_t>
const acc_t* wide_rows(const at::Tensor& tensor,
                       int64_t first,
                       int64_t rows,
                       int64_t columns,
                       Buffer<acc_t>& copy) {
  const scalar_t* from = data_of<scalar_t>(tensor) + first * columns;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    return from;
  } else {
    if (copy.data() == nullptr) {
      copy = Buffer<acc_t>(std::max<int64_t>(std::min(kChunkRows, rows) * columns, 1));
    }
    Pieces(rows, columns).run([&](int64_t, int64_t row, int64_t count) {
      low_rank_kernels<scalar_t>().widen(from + row * columns, count * columns,
                                         copy.data() + row * columns);
    });
    return copy.data();
  }
}

// Lets body(acc_t*) write rows in acc_t and puts them into the tensor.
template <typename scalar_t, typename acc_t, typename F>
void write_rows(const at::Tensor& tensor,
                int64_t first,
                int64_t rows,
                int64_t columns,
                Buffer<acc_t>& copy,
                const F& body) {
  scalar_t* to = mutable_data_of<scalar_t>(tensor) + first * columns;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    body(to);
  } else {
    if (copy.data() == nullptr) {
      copy = Buffer<acc_t>(std::max<int64_t>(std::min(kChunkRows, rows) * columns, 1));
    }
    body(copy.data());
    Pieces(rows, columns).run([&](int64_t, int64_t row, int64_t count) {
      low_rank_kernels<scalar_t>().narrow(copy.data() + row * columns, count * columns,
                                          to + row * columns);
    });
  }
}

// body(first row, rows): all at once, or, in half precision, chunk by chunk.
template <typename scalar_t, typename F>
void for_chunks(int64_t rows, const F& body) {
  constexpr bool kHalf = !std::is_same_v<scalar_t, typename AccOf<scalar_t>::type>;
  const int64_t step = kHalf ? kChunkRows : std::max<int64_t>(rows, 1);
  for (int64_t first = 0; first < rows; first += step) {
    body(first, std::min(step, rows - first));
  }
}

}  // namespace gauge_ext
