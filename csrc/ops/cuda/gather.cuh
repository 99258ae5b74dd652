#pragma once

// The kernels of gather.h. A block's rows are neighbours in the plan's order, all of one adapter,
// and anywhere in X; sums over rows are taken by one block from first to last.

#include <algorithm>

#include "ops/cuda/expand.cuh"
#include "ops/cuda/gather.h"
#include "ops/cuda/gather_plan.cuh"
#include "ops/cuda/skinny.cuh"

namespace gauge_ext::cuda {
namespace {

// A as (rank, in), or B's transpose as (rank, out)
__device__ __forceinline__ Factor<const void> right_of(const GatherAdapter& adapter,
                                                       Type type,
                                                       Side side,
                                                       int64_t columns) {
  return side == Side::kA ? Factor<const void>{adapter.A, type, columns, 1}
                          : Factor<const void>{adapter.B, type, 1, adapter.rank};
}

template <typename scalar_t>
struct GatherArguments {
  using acc_t = typename AccOf<scalar_t>::type;
  Matrix<const scalar_t> x;
  GatherRows plan;
  const GatherAdapter* adapters;
  Type type;
  Side side;
  int64_t rank_groups, columns_per_group;  // the latter in tiles
  int64_t max_rank;
  acc_t* hidden;  // written by project, by column group; read by reduce
};

template <int RANK, typename scalar_t>
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 8 ? 1 : 2)
    gather_project_kernel(const GatherArguments<scalar_t> p) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int ROWS = kTileRows<scalar_t>;
  alignas(16) __shared__ Tile<scalar_t> tile;
  alignas(16) __shared__ acc_t right[RANK][kTileStride];
  const int64_t index = blockIdx.z / p.rank_groups;
  const GatherAdapter adapter = p.adapters[index];
  const Segment segment(p.plan, index);
  const int64_t rank0 = blockIdx.z % p.rank_groups * RANK;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * ROWS;
  if (row0 >= segment.count || rank0 >= adapter.rank) {
    return;
  }
  const int64_t first_column = blockIdx.y * p.columns_per_group * kTileColumns;
  const int64_t row = segment.row_or_none(row0 + staged_row<scalar_t>());
  acc_t hidden[RANK / 8][4] = {};
  for (int64_t j = 0; j < p.columns_per_group; ++j) {
    const int64_t column0 = first_column + j * kTileColumns;
    if (column0 >= p.x.columns) {
      break;
    }
    __syncthreads();  // the tile before is done with
    stage_row<scalar_t>(tile, p.x, column0, Dropout(), row);
    stage_right(right, right_of(adapter, p.type, p.side, p.x.columns), rank0, adapter.rank, column0,
                p.x.columns);
    __syncthreads();
    project_tile<RANK, scalar_t>(hidden, tile, right, adapter.rank - rank0);
  }
  acc_t* to = p.hidden + (blockIdx.y * p.plan.rows + segment.first) * p.max_rank;
  write_hidden<RANK, scalar_t>(hidden, reinterpret_cast<acc_t(*)[RANK]>(&tile), row0, segment.count,
                               rank0, adapter.rank, p.max_rank, static_cast<acc_t>(adapter.scaling),
                               to);
}

template <int RANK, typename scalar_t>
__global__ void __launch_bounds__(kThreads, sizeof(scalar_t) == 8 ? 1 : 2)
    gather_reduce_kernel(const GatherArguments<scalar_t> p) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int ROWS = kTileRows<scalar_t>;
  alignas(16) __shared__ Tile<scalar_t> tile;
  alignas(16) __shared__ acc_t left[ROWS][kLeftStride<RANK>];
  const int64_t index = blockIdx.z / p.rank_groups;
  const GatherAdapter adapter = p.adapters[index];
  const Segment segment(p.plan, index);
  const int64_t rank0 = blockIdx.z % p.rank_groups * RANK;
  if (rank0 >= adapter.rank) {
    return;
  }
  const int64_t column0 = static_cast<int64_t>(blockIdx.x) * kTileColumns;
  acc_t sum[RANK / 16][2][4] = {};
  for (int64_t row0 = 0; row0 < segment.count; row0 += ROWS) {
    __syncthreads();
    stage_left<ROWS, RANK>(left, p.hidden + segment.first * p.max_rank, row0, segment.count, rank0,
                           adapter.rank, p.max_rank);
    stage_row<scalar_t>(tile, p.x, column0, Dropout(),
                        segment.row_or_none(row0 + staged_row<scalar_t>()));
    __syncthreads();
    reduce_tile<RANK, scalar_t>(sum, tile, left);
  }
  const bool of_A = p.side == Side::kA;
  const Factor<void> to = {of_A ? adapter.grad_A : adapter.grad_B, p.type, of_A ? p.x.columns : 1,
                           of_A ? 1 : adapter.rank};
  write_sum<RANK>(sum, rank0, adapter.rank, column0, p.x.columns,
                  [&](int64_t j, int64_t column, acc_t value) {
                    store_factor(to, j * to.row_stride + column * to.column_stride, value);
                  });
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    gather_expand_kernel(const ExpandArguments<scalar_t> call,
                         const GatherRows plan,
                         const GatherAdapter* adapters,
                         Type type,
                         Side side,
                         int64_t max_rank) {
  const int64_t index = static_cast<int64_t>(blockIdx.z) - 1;
  const Segment segment(plan, index);
  if (static_cast<int64_t>(blockIdx.x) * kExpandRows >= segment.count) {
    return;
  }
  ExpandArguments<scalar_t> p = call;
  p.left += segment.first * max_rank;
  p.rank = 0;
  if (index >= 0) {
    const GatherAdapter adapter = adapters[index];
    p.rank = adapter.rank;
    p.right = right_of(adapter, type, side, p.y.columns);
  }
  expand_block(p, segment.count, max_rank, [&](int64_t i) { return segment.row(i); });
}

template <typename scalar_t>
Cut gather_cut(int64_t rows, int64_t columns, int64_t adapters, int64_t max_rank) {
  // Each adapter has a tile that it does not fill, but no more than there are rows.
  const int64_t tiles = ceil_div(rows, kTileRows<scalar_t>) + std::min(rows, adapters);
  return cut<scalar_t>(Mode::kProject, tiles * kTileRows<scalar_t>, columns, max_rank);
}

template <typename scalar_t>
int64_t gather_projected_size(int64_t rows, int64_t columns, int64_t adapters, int64_t max_rank) {
  return rows * max_rank * gather_cut<scalar_t>(rows, columns, adapters, max_rank).column_groups;
}

template <typename scalar_t, typename acc_t>
void gather_project(Matrix<const scalar_t> x,
                    const GatherRows& plan,
                    const GatherAdapter* adapters,
                    Type type,
                    Side side,
                    int64_t max_rank,
                    acc_t* hidden,
                    acc_t* partial,
                    Stream stream) {
  if (x.rows == 0 || max_rank == 0) {
    return;
  }
  const Cut parts = gather_cut<scalar_t>(x.rows, x.columns, plan.adapters, max_rank);
  const GatherArguments<scalar_t> p = {x,
                                       plan,
                                       adapters,
                                       type,
                                       side,
                                       parts.rank_groups,
                                       parts.columns_per_group,
                                       max_rank,
                                       parts.column_groups == 1 ? hidden : partial};
  const dim3 grid(static_cast<unsigned>(ceil_div(x.rows, kTileRows<scalar_t>)),
                  static_cast<unsigned>(parts.column_groups),
                  static_cast<unsigned>(plan.adapters * parts.rank_groups));
  auto kernel = &gather_project_kernel<16, scalar_t>;
  if (chosen_rank<scalar_t>(max_rank) > 16) {
    kernel = &gather_project_kernel<kMaxRank<scalar_t>, scalar_t>;
  }
  GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, p);
  if (parts.column_groups > 1) {
    launch_sum<acc_t>(partial, parts.column_groups, x.rows, max_rank, acc_t(1),
                      dense(hidden, max_rank), stream);
  }
}

template <typename scalar_t, typename acc_t>
void gather_expand(Matrix<scalar_t> y,
                   const scalar_t* bias,
                   const acc_t* hidden,
                   const GatherRows& plan,
                   const GatherAdapter* adapters,
                   Type type,
                   Side side,
                   int64_t max_rank,
                   Stream stream) {
  if (y.rows == 0 || y.columns == 0) {
    return;
  }
  const ExpandArguments<scalar_t> p = {y, false, bias, hidden, {}, 0, {}, acc_t(1)};
  const dim3 grid(static_cast<unsigned>(ceil_div(y.rows, kExpandRows)),
                  static_cast<unsigned>(ceil_div(y.columns, kTileColumns)),
                  static_cast<unsigned>(plan.adapters + 1));
  const auto kernel = &gather_expand_kernel<scalar_t>;
  GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, p, plan, adapters, type, side, max_rank);
}

template <typename scalar_t, typename acc_t>
void gather_reduce(Matrix<const scalar_t> x,
                   const acc_t* hidden,
                   const GatherRows& plan,
                   const GatherAdapter* adapters,
                   Type type,
                   Side side,
                   int64_t max_rank,
                   Stream stream) {
  if (x.columns == 0 || max_rank == 0) {
    return;
  }
  const int64_t groups = ceil_div(max_rank, chosen_rank<scalar_t>(max_rank));
  const GatherArguments<scalar_t> p = {
      x, plan, adapters, type, side, groups, 0, max_rank, const_cast<acc_t*>(hidden)};
  const dim3 grid(static_cast<unsigned>(ceil_div(x.columns, kTileColumns)), 1,
                  static_cast<unsigned>(plan.adapters * groups));
  auto kernel = &gather_reduce_kernel<16, scalar_t>;
  if (chosen_rank<scalar_t>(max_rank) > 16) {
    kernel = &gather_reduce_kernel<kMaxRank<scalar_t>, scalar_t>;
  }
  GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, p);
}

}  // namespace

template <typename scalar_t>
const GatherKernels<scalar_t>& gather_kernels() {
  using acc_t = typename AccOf<scalar_t>::type;
  static const GatherKernels<scalar_t> table = {
      &gather_project<scalar_t, acc_t>, &gather_projected_size<scalar_t>,
      &gather_expand<scalar_t, acc_t>, &gather_reduce<scalar_t, acc_t>};
  return table;
}

}  // namespace gauge_ext::cuda
