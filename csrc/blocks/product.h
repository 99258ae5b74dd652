#pragma once

// The product L R of a tile of rows, a group of blocks at a time.

#include <cstdint>

#include "blocks/lanes.h"
#include "blocks/layout.h"

namespace gauge_ext {
namespace {

// L R of ROWS rows and a group, each row's `stride` floats after the one before.
template <int ROWS>
void product(const float* left,
             int64_t rank,
             const float* right,
             int64_t cells,
             float* to,
             int64_t stride) {
  for (int64_t at = 0; at < cells; at += 2 * kLanes) {
    Floats sum[ROWS][2];
    set_zero(sum);
    for (int64_t k = 0; k < rank; ++k, right += 2 * kLanes) {
      const Floats first = load<float>(right), second = load<float>(right + kLanes);
      repeat<ROWS>([&](int row) GAUGE_EXT_INLINE {
        const Floats factor = broadcast(left[row * rank + k]);
        sum[row][0] = fused(factor, first, sum[row][0]);
        sum[row][1] = fused(factor, second, sum[row][1]);
      });
    }
    repeat<ROWS>([&](int row) GAUGE_EXT_INLINE {
      store<float>(to + row * stride + at, sum[row][0]);
      store<float>(to + row * stride + at + kLanes, sum[row][1]);
    });
  }
}
constexpr decltype(&product<1>) kProducts[] = {&product<1>, &product<2>, &product<3>, &product<4>,
                                               &product<5>, &product<6>, &product<7>, &product<8>};

// L R of a tile's rows and a group, where `values` has room for it.
inline void multiply(const Layout& layout,
                     const Scratch& scratch,
                     int64_t first,
                     int64_t rows,
                     int64_t group,
                     float* values) {
  const int64_t rank = layout.weight.rank;
  kProducts[rows - 1](layout.weight.left + first * rank, rank,
                      scratch.right + group * layout.cells * rank, layout.cells, values,
                      layout.row_cells());
}

}  // namespace
}  // namespace gauge_ext
