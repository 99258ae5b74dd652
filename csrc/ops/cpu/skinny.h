#pragma once

// Y += X Wᵀ for few rows of X, which a general matrix product handles badly: it packs W first,
// though each element of W is used but a few times. Here a block of W's rows is read once for all
// rows of X.

#include <cstdint>
#include <type_traits>

#include "ops/cpu/tiles.h"

namespace gauge_ext {
namespace {

// Tiles of 4 x 3 and of 3 x 4 fill the registers alike, so that X's rows can be cut into fours and
// threes, and W's rows into twelves. Where W is converted on the way, 16 registers are too few for
// the first: then threes and twos.
constexpr int64_t kSkinnyBlock = 12;
template <typename scalar_t, typename acc_t>
constexpr int kSkinnyRows = std::is_same_v<scalar_t, acc_t> || kVectorRegisters == 32 ? 4 : 3;

template <int ROWS, int WIDE, typename scalar_t, typename acc_t>
void skinny_rows(ConstView<acc_t> x,
                 int64_t width,
                 ConstView<scalar_t> weight,
                 int64_t count,
                 acc_t* y,
                 int64_t y_stride) {
  int64_t j = 0;
  for (; j + WIDE <= count; j += WIDE) {
    dot_tile<ROWS, WIDE>(x, weight.from(j, 0), width, true, y + j, y_stride);
  }
  for (; j < count; ++j) {
    dot_tile<ROWS, 1>(x, weight.from(j, 0), width, true, y + j, y_stride);
  }
}

// Y (rows, count) += X (rows, width) Wᵀ for W (count, width)
template <typename scalar_t, typename acc_t>
void skinny_product(const acc_t* x,
                    int64_t rows,
                    int64_t width,
                    const scalar_t* weight,
                    int64_t weight_stride,
                    int64_t count,
                    acc_t* y,
                    int64_t y_stride) {
  constexpr int kMost = kSkinnyRows<scalar_t, acc_t>;
  constexpr int kWide = kSkinnyBlock / kMost;
  const ConstView<acc_t> all{x, width};
  const int64_t lesser = (kMost - rows % kMost) % kMost;
  for (int64_t j = 0; j < count; j += kSkinnyBlock) {
    const int64_t part = std::min(kSkinnyBlock, count - j);
    const ConstView<scalar_t> w{weight + j * weight_stride, weight_stride};
    int64_t i = 0;
    for (int64_t n = 0; n < lesser && i + kMost - 1 <= rows; ++n, i += kMost - 1) {
      skinny_rows<kMost - 1, 4>(all.from(i, 0), width, w, part, y + i * y_stride + j, y_stride);
    }
    for (; i + kMost <= rows; i += kMost) {
      skinny_rows<kMost, kWide>(all.from(i, 0), width, w, part, y + i * y_stride + j, y_stride);
    }
    if (rows - i == 2) {
      skinny_rows<2, 4>(all.from(i, 0), width, w, part, y + i * y_stride + j, y_stride);
    } else if (rows - i == 1) {
      skinny_rows<1, 6>(all.from(i, 0), width, w, part, y + i * y_stride + j, y_stride);
    }
  }
}

}  // namespace
}  // namespace gauge_ext
