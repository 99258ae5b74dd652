#pragma once

// One pass over X for H = X Rᵀ, S = Lᵀ X or both.

#include "ops/cuda/partial_sums.cuh"
#include "ops/cuda/tiles.cuh"

namespace gauge_ext::cuda {
namespace {

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
      stage_left<ROWS, RANK>(left, p.left, row0, p.x.rows, rank0, p.rank, p.rank);
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
                                   rank0, p.rank, p.rank, p.scale,
                                   p.hidden + blockIdx.y * p.x.rows * p.rank);
    }
  }
  if constexpr (kReduces) {
    acc_t* to = p.sum + blockIdx.x * p.rank * p.x.columns;
    GAUGE_EXT_UNROLL
    for (int j = 0; j < kSums; ++j) {
      write_sum<RANK>(
          sum[j], rank0, p.rank, first_column + j * kTileColumns, p.x.columns,
          [&](int64_t r, int64_t column, acc_t value) { to[r * p.x.columns + column] = value; });
    }
  }
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
