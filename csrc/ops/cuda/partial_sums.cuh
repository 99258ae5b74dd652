#pragma once

// How a matrix is cut among blocks, and the sum of what they made of its parts.

#include <algorithm>

#include "ops/cuda/stage.cuh"

namespace gauge_ext::cuda {
namespace {

// Enough blocks to fill the multiprocessors of a large GPU twice. A constant and not a property of
// the device: how a sum is cut, and so its last bits, is the same on every card.
#ifndef GAUGE_EXT_CUDA_BLOCKS
#define GAUGE_EXT_CUDA_BLOCKS 264
#endif
constexpr int64_t kBlocks = GAUGE_EXT_CUDA_BLOCKS;

enum class Mode { kProject, kReduce, kBoth };

// The columns, in tiles, over which a block keeps S in registers: 64 bytes a thread for each of 16
// ranks and a tile.
template <typename scalar_t, int RANK>
constexpr int kSumTiles = sizeof(scalar_t) == 8 ? 1 : 64 / RANK;

// How a matrix is cut: block (x, y, z) takes the x-th group of tile rows, the y-th group of tile
// columns and the z-th group of ranks.
struct Cut {
  int64_t row_groups, column_groups, rank_groups;
  int64_t rows_per_group, columns_per_group;  // in tiles

  dim3 grid() const {
    return dim3(static_cast<unsigned>(row_groups), static_cast<unsigned>(column_groups),
                static_cast<unsigned>(rank_groups));
  }
};

template <typename scalar_t>
constexpr int chosen_rank(int64_t rank) {
  return rank <= 16 ? 16 : kMaxRank<scalar_t>;
}

template <typename scalar_t>
Cut cut(Mode mode, int64_t rows, int64_t columns, int64_t rank) {
  const int ranks = chosen_rank<scalar_t>(rank);
  const int64_t row_tiles = ceil_div(rows, kTileRows<scalar_t>);
  const int64_t column_tiles = std::max<int64_t>(ceil_div(columns, kTileColumns), 1);
  Cut cut;
  cut.rank_groups = std::max<int64_t>(ceil_div(rank, ranks), 1);
  if (mode == Mode::kProject) {
    // A block's rows are one tile; where rows are few their columns are shared out.
    cut.rows_per_group = 1;
    const int64_t wanted = kBlocks / (row_tiles * cut.rank_groups);
    cut.columns_per_group = ceil_div(column_tiles, std::max<int64_t>(wanted, 1));
  } else {
    const int64_t held = sizeof(scalar_t) == 8 ? 1 : 64 / ranks;
    cut.columns_per_group = std::min<int64_t>(held, column_tiles);
    const int64_t groups = ceil_div(column_tiles, cut.columns_per_group) * cut.rank_groups;
    cut.rows_per_group = ceil_div(row_tiles, std::max<int64_t>(kBlocks / groups, 1));
  }
  cut.row_groups = ceil_div(row_tiles, cut.rows_per_group);
  cut.column_groups = ceil_div(column_tiles, cut.columns_per_group);
  return cut;
}

// to[i, c] = scale · Σ_p partial[p][i, c], (rows, columns) each, in the order of p.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads) sum_kernel(const acc_t* partial,
                                                       int64_t parts,
                                                       int64_t rows,
                                                       int64_t columns,
                                                       acc_t scale,
                                                       Factor<void> to) {
  const int64_t size = rows * columns;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < size) {
    acc_t total = 0;
    for (int64_t part = 0; part < parts; ++part) {
      total += partial[part * size + i];
    }
    store_factor(to, i / columns * to.row_stride + i % columns * to.column_stride, total * scale);
  }
}

template <typename acc_t>
void launch_sum(const acc_t* partial,
                int64_t parts,
                int64_t rows,
                int64_t columns,
                acc_t scale,
                Factor<void> to,
                Stream stream) {
  if (rows * columns > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(rows * columns, kThreads)));
    const auto kernel = &sum_kernel<acc_t>;
    GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, partial, parts, rows, columns, scale, to);
  }
}

// H, (rows, rank), as a matrix to write
template <typename acc_t>
Factor<void> dense(acc_t* data, int64_t columns) {
  return {data, std::is_same_v<acc_t, double> ? Type::kDouble : Type::kFloat, columns, 1};
}

}  // namespace
}  // namespace gauge_ext::cuda
