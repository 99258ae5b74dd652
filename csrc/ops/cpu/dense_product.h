#pragma once

// Products of panels with dense r x r matrices, and of two panels with each other, in the register
// tiles of triangle.h. A panel is (rank, width): one vector of a factor in each column.

#include <cstdint>

#include "ops/cpu/triangle.h"

namespace gauge_ext {
namespace {

// Hands out(j, c, vector) each vector of Y = Eᵀ X from (j, c) on: X is (inner, width), E is
// (inner, stride) and Y (outer, width); width is a multiple of two vectors
template <typename acc_t, typename F>
void dense_left_product(const acc_t* x,
                        int64_t width,
                        const acc_t* e,
                        int64_t inner,
                        int64_t outer,
                        int64_t stride,
                        const F& out) {
  int64_t j = 0;
  for (; j + kTriangleRows <= outer; j += kTriangleRows) {
    left_strip<kTriangleRows>(x, width, e + j, stride, 0, inner, j, out);
  }
  if (j + 4 <= outer) {
    left_strip<4>(x, width, e + j, stride, 0, inner, j, out);
    j += 4;
  }
  for (; j + 2 <= outer; j += 2) {
    left_strip<2>(x, width, e + j, stride, 0, inner, j, out);
  }
  for (; j < outer; ++j) {
    left_strip<1>(x, width, e + j, stride, 0, inner, j, out);
  }
}

// S[i, j] += the products of four rows i of X with two rows j of Y
template <typename acc_t>
void cross_tile(const acc_t* x,
                const acc_t* y,
                int64_t width,
                int64_t i,
                int64_t j,
                int64_t rank,
                double* sum,
                int64_t stride) {
  Vec<acc_t> total[2][4];
  set_zero(total);
  for (int64_t c = 0; c < width; c += kWidth<acc_t>) {
    Vec<acc_t> right[2];
    repeat<2>([&](int b) GAUGE_EXT_INLINE { right[b] = load<acc_t>(y + (j + b) * width + c); });
    repeat<4>([&](int a) GAUGE_EXT_INLINE {
      const Vec<acc_t> left = load<acc_t>(x + (i + a) * width + c);
      repeat<2>([&](int b) GAUGE_EXT_INLINE { total[b][a] += left * right[b]; });
    });
  }
  repeat<2>([&](int b) GAUGE_EXT_INLINE {
    acc_t products[4];
    horizontal_sums<4, acc_t>(total[b], products);
    for (int a = 0; a < 4 && i + a < rank && j + b < rank; ++a) {
      sum[(i + a) * stride + j + b] += static_cast<double>(products[a]);
    }
  });
}

// S += X Yᵀ for panels with zeros in rows up to a multiple of four; S is (rank, stride) in float64
template <typename acc_t>
void add_cross_products(const acc_t* x,
                        const acc_t* y,
                        int64_t width,
                        int64_t rank,
                        double* sum,
                        int64_t stride) {
  for (int64_t i = 0; i < rank; i += 4) {
    for (int64_t j = 0; j < rank; j += 2) {
      cross_tile(x, y, width, i, j, rank, sum, stride);
    }
  }
}

}  // namespace
}  // namespace gauge_ext
