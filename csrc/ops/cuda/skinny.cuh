#pragma once

// One pass over X for H = X Rᵀ, S = Lᵀ X or both: the kernel, and how the matrix is cut among
// blocks.

#include <algorithm>

#include "ops/cuda/tiles.cuh"

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

template <typename scalar_t>
struct SkinnyArguments {
  using acc_t = typename AccOf<scalar_t>::type;
  Matrix<const scalar_t> x;
  DropoutSource dropout;
  int64_t rank;
  int64_t rows_per_group, columns_per_group;  // in tiles
  // To project: R, and the partial sums of H, (column groups, rows, rank)
  Factor<const void> right;
  acc_t scale;
  acc_t* hidden;
  // To reduce: L, and the partial sums of S, (row groups, rank, columns)
  const acc_t* left;
  acc_t* sum;
};

// One pass over the block's part of X for H, S or both.
template <Mode MODE, int RANK, typename scalar_t>
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 8 ? 1 : 2)
    skinny_kernel(const SkinnyArguments<scalar_t> p) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr bool kProjects = MODE != Mode::kReduce, kReduces = MODE != Mode::kProject;
  constexpr int kSums = kReduces ? kSumTiles<scalar_t, RANK> : 1;
  constexpr int ROWS = kTileRows<scalar_t>;
  alignas(16) __shared__ Tile<scalar_t> tile;
  alignas(16) __shared__ acc_t right[kProjects ? RANK : 1][kTileStride];
  alignas(16) __shared__ acc_t left[kReduces ? ROWS : 1][kLeftStride<RANK>];
  static_assert(sizeof(acc_t[kWarps * 16][RANK]) <= sizeof(tile), "H's parts lie over the tile");

  const Dropout dropout = read_seed(p.dropout);
  const int64_t rank0 = static_cast<int64_t>(blockIdx.z) * RANK;
  const int64_t first_row = blockIdx.x * p.rows_per_group * ROWS;
  const int64_t first_column = blockIdx.y * p.columns_per_group * kTileColumns;
  acc_t sum[kSums][RANK / 16][2][4] = {};

  for (int64_t i = 0; i < p.rows_per_group; ++i) {
    const int64_t row0 = first_row + i * ROWS;
    if (row0 >= p.x.rows) {
      break;
    }
    acc_t hidden[RANK / 8][4] = {};
    if constexpr (kReduces) {
      __syncthreads();
      stage_left<ROWS, RANK>(left, p.left, row0, p.x.rows, rank0, p.rank);
    }
    for (int64_t j = 0; j < p.columns_per_group; ++j) {
      const int64_t column0 = first_column + j * kTileColumns;
      if (column0 >= p.x.columns) {
        break;
      }
      __syncthreads();  // the tile before is done with
      stage<scalar_t>(tile, p.x, row0, column0, dropout);
      if constexpr (kProjects) {
        stage_right(right, p.right, rank0, p.rank, column0, p.x.columns);
      }
      __syncthreads();
      if constexpr (kProjects) {
        project_tile<RANK, scalar_t>(hidden, tile, right, p.rank - rank0);
      }
      if constexpr (kReduces) {
        // Registers have no index at run time.
        GAUGE_EXT_UNROLL
        for (int k = 0; k < kSums; ++k) {
          if (k == j) {
            reduce_tile<RANK, scalar_t>(sum[k], tile, left);
          }
        }
      }
    }
    if constexpr (kProjects) {
      write_hidden<RANK, scalar_t>(hidden, reinterpret_cast<acc_t(*)[RANK]>(&tile), row0, p.x.rows,
                                   rank0, p.rank, p.scale,
                                   p.hidden + blockIdx.y * p.x.rows * p.rank);
    }
  }
  if constexpr (kReduces) {
    acc_t* to = p.sum + blockIdx.x * p.rank * p.x.columns;
    GAUGE_EXT_UNROLL
    for (int j = 0; j < kSums; ++j) {
      write_sum<RANK>(sum[j], rank0, p.rank, first_column + j * kTileColumns, p.x.columns, to);
    }
  }
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

template <Mode MODE, typename scalar_t>
void launch_skinny(const SkinnyArguments<scalar_t>& p, const Cut& cut, Stream stream) {
  auto kernel = &skinny_kernel<MODE, 16, scalar_t>;
  if constexpr (kMaxRank<scalar_t> > 16) {
    if (p.rank > 16) {
      kernel = &skinny_kernel<MODE, kMaxRank<scalar_t>, scalar_t>;
    }
  }
  GAUGE_EXT_LAUNCH(kernel, cut.grid(), kThreads, stream, p);
}

template <typename scalar_t>
int64_t projected_size(int64_t rows, int64_t columns, int64_t rank) {
  return rows == 0 ? 0
                   : cut<scalar_t>(Mode::kProject, rows, columns, rank).column_groups * rows * rank;
}

template <typename scalar_t>
int64_t reduced_size(int64_t rows, int64_t columns, int64_t rank) {
  return rows == 0 ? 0
                   : cut<scalar_t>(Mode::kReduce, rows, columns, rank).row_groups * rank * columns;
}

template <typename scalar_t>
int64_t project_reduced_size(int64_t rows, int64_t columns, int64_t rank) {
  if (rows == 0) {
    return 0;
  }
  const Cut both = cut<scalar_t>(Mode::kBoth, rows, columns, rank);
  return both.column_groups * rows * rank + both.row_groups * rank * columns;
}

template <typename scalar_t, typename acc_t>
void project(Matrix<const scalar_t> x,
             Factor<const void> right,
             int64_t rank,
             DropoutSource dropout,
             acc_t scale,
             acc_t* hidden,
             acc_t* partial,
             Stream stream) {
  if (x.rows == 0 || rank == 0) {
    return;
  }
  const Cut parts = cut<scalar_t>(Mode::kProject, x.rows, x.columns, rank);
  SkinnyArguments<scalar_t> p = {};
  p.x = x;
  p.dropout = dropout;
  p.rank = rank;
  p.rows_per_group = parts.rows_per_group;
  p.columns_per_group = parts.columns_per_group;
  p.right = right;
  p.scale = parts.column_groups == 1 ? scale * dropout_scale<acc_t>(dropout) : acc_t(1);
  p.hidden = parts.column_groups == 1 ? hidden : partial;
  launch_skinny<Mode::kProject>(p, parts, stream);
  if (parts.column_groups > 1) {
    launch_sum<acc_t>(partial, parts.column_groups, x.rows, rank,
                      scale * dropout_scale<acc_t>(dropout), dense(hidden, rank), stream);
  }
}

template <typename scalar_t, typename acc_t>
void reduce(Matrix<const scalar_t> x,
            const acc_t* left,
            int64_t rank,
            DropoutSource dropout,
            acc_t scale,
            Factor<void> sum,
            acc_t* partial,
            Stream stream) {
  if (rank == 0 || x.columns == 0) {
    return;
  }
  int64_t parts_count = 0;
  if (x.rows > 0) {
    const Cut parts = cut<scalar_t>(Mode::kReduce, x.rows, x.columns, rank);
    SkinnyArguments<scalar_t> p = {};
    p.x = x;
    p.dropout = dropout;
    p.rank = rank;
    p.rows_per_group = parts.rows_per_group;
    p.columns_per_group = parts.columns_per_group;
    p.left = left;
    p.sum = partial;
    launch_skinny<Mode::kReduce>(p, parts, stream);
    parts_count = parts.row_groups;
  }
  launch_sum<acc_t>(partial, parts_count, rank, x.columns, scale * dropout_scale<acc_t>(dropout),
                    sum, stream);
}

template <typename scalar_t, typename acc_t>
void project_reduce(Matrix<const scalar_t> x,
                    Factor<const void> right,
                    const acc_t* left,
                    int64_t rank,
                    acc_t scale,
                    acc_t* hidden,
                    Factor<void> sum,
                    acc_t* partial,
                    Stream stream) {
  if (rank == 0) {
    return;
  }
  int64_t parts_count = 0;
  acc_t* sums = partial;
  if (x.rows > 0) {
    const Cut parts = cut<scalar_t>(Mode::kBoth, x.rows, x.columns, rank);
    sums += parts.column_groups * x.rows * rank;
    SkinnyArguments<scalar_t> p = {};
    p.x = x;
    p.rank = rank;
    p.rows_per_group = parts.rows_per_group;
    p.columns_per_group = parts.columns_per_group;
    p.right = right;
    p.scale = acc_t(1);
    p.hidden = partial;
    p.left = left;
    p.sum = sums;
    launch_skinny<Mode::kBoth>(p, parts, stream);
    launch_sum<acc_t>(partial, parts.column_groups, x.rows, rank, scale, dense(hidden, rank),
                      stream);
    parts_count = parts.row_groups;
  }
  launch_sum<acc_t>(sums, parts_count, rank, x.columns, scale, sum, stream);
}

}  // namespace
}  // namespace gauge_ext::cuda
