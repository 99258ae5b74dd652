#pragma once

// The two skinny products of a tile, by the eight warps of a block. g = lane / 4 and t = lane % 4
// throughout, as in the fragments of `mma`.
//
// The order in which a product runs over its inner index does not matter, nor which of a fragment's
// columns stands for which column of the matrix. Both are chosen such that a lane's numbers are
// neighbours in memory, and in dropout's order.

#include "ops/cuda/stage.cuh"

namespace gauge_ext::cuda {
namespace {

// Of X Rᵀ a warp takes 16 rows, and of the columns as many as leave work for all eight warps.
template <typename scalar_t>
struct Projecting {
  static constexpr int kRowTiles = kTileRows<scalar_t> / 16;
  static constexpr int kSlices = kWarps / kRowTiles;
  static constexpr int kColumns = kTileColumns / kSlices;
};

// hidden[n] += the warp's part of tile Rᵀ, eight ranks for each n.
template <int RANK, typename scalar_t, typename acc_t>
__device__ __forceinline__ void project_tile(acc_t (&hidden)[RANK / 8][4],
                                             const Tile<scalar_t>& tile,
                                             const acc_t (&right)[RANK][kTileStride],
                                             int64_t ranks_left) {
  using Plan = Projecting<scalar_t>;
  using Four = Pack<scalar_t, 4>;
  using FourAcc = Pack<acc_t, 4>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int row = warp % Plan::kRowTiles * 16 + g;
  const int slice = warp / Plan::kRowTiles * Plan::kColumns;
  GAUGE_EXT_UNROLL_TWICE
  for (int step = 0; step < Plan::kColumns; step += 16) {
    const int column = slice + step + 4 * t;
    const Four upper = *reinterpret_cast<const Four*>(&tile[row][column]);
    const Four lower = *reinterpret_cast<const Four*>(&tile[row + 8][column]);
    GAUGE_EXT_UNROLL
    for (int n = 0; n < RANK / 8; ++n) {
      if (8 * n < ranks_left) {
        const FourAcc r = *reinterpret_cast<const FourAcc*>(&right[8 * n + g][column]);
        GAUGE_EXT_UNROLL
        for (int pair = 0; pair < 4; pair += 2) {
          const acc_t a[4] = {widen(upper.values[pair]), widen(lower.values[pair]),
                              widen(upper.values[pair + 1]), widen(lower.values[pair + 1])};
          const acc_t b[2] = {r.values[pair], r.values[pair + 1]};
          multiply<kExact<scalar_t>, false>(hidden[n], a, b);
        }
      }
    }
  }
}

// Adds up the parts of the warps that share rows, by way of `parts`, which may lie over the tile,
// and writes the rows' part of H.
template <int RANK, typename scalar_t, typename acc_t>
__device__ __forceinline__ void write_hidden(const acc_t (&hidden)[RANK / 8][4],
                                             acc_t (*parts)[RANK],
                                             int64_t row0,
                                             int64_t rows,
                                             int64_t rank0,
                                             int64_t rank,
                                             int64_t stride,
                                             acc_t scale,
                                             acc_t* to) {
  using Plan = Projecting<scalar_t>;
  constexpr int ROWS = kTileRows<scalar_t>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int first = warp / Plan::kRowTiles * ROWS + warp % Plan::kRowTiles * 16 + g;
  __syncthreads();
  GAUGE_EXT_UNROLL
  for (int n = 0; n < RANK / 8; ++n) {
    GAUGE_EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      parts[first + i / 2 * 8][8 * n + 2 * t + i % 2] = hidden[n][i];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * RANK; i += kThreads) {
    const int row = i / RANK, j = i % RANK;
    if (row0 + row < rows && rank0 + j < rank) {
      acc_t total = 0;
      GAUGE_EXT_UNROLL
      for (int slice = 0; slice < Plan::kSlices; ++slice) {
        total += parts[slice * ROWS + row][j];
      }
      to[(row0 + row) * stride + rank0 + j] = total * scale;
    }
  }
}

// sum[m][q] += Lᵀ tile: sixteen ranks for each m, and of the columns the warp's sixteen, of which
// column 2n + q is the n-th of fragment q.
template <int RANK, typename scalar_t, typename acc_t>
__device__ __forceinline__ void reduce_tile(
    acc_t (&sum)[RANK / 16][2][4],
    const Tile<scalar_t>& tile,
    const acc_t (&left)[kTileRows<scalar_t>][kLeftStride<RANK>]) {
  using Two = Pack<scalar_t, 2>;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int column = 16 * warp + 2 * g;
  GAUGE_EXT_UNROLL_TWICE
  for (int row = t; row < kTileRows<scalar_t>; row += 8) {
    const Two upper = *reinterpret_cast<const Two*>(&tile[row][column]);
    const Two lower = *reinterpret_cast<const Two*>(&tile[row + 4][column]);
    GAUGE_EXT_UNROLL
    for (int m = 0; m < RANK / 16; ++m) {
      const int j = 16 * m + g;
      const acc_t a[4] = {left[row][j], left[row][j + 8], left[row + 4][j], left[row + 4][j + 8]};
      GAUGE_EXT_UNROLL
      for (int q = 0; q < 2; ++q) {
        const acc_t b[2] = {widen(upper.values[q]), widen(lower.values[q])};
        multiply<false, kExact<scalar_t>>(sum[m][q], a, b);
      }
    }
  }
}

// Calls store(rank, column, value) for the warp's sixteen columns of S, (rank, columns), which
// start at column0.
template <int RANK, typename acc_t, typename F>
__device__ __forceinline__ void write_sum(const acc_t (&sum)[RANK / 16][2][4],
                                          int64_t rank0,
                                          int64_t rank,
                                          int64_t column0,
                                          int64_t columns,
                                          const F& store) {
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  GAUGE_EXT_UNROLL
  for (int m = 0; m < RANK / 16; ++m) {
    GAUGE_EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      GAUGE_EXT_UNROLL
      for (int q = 0; q < 2; ++q) {
        const int64_t j = rank0 + 16 * m + g + i / 2 * 8;
        const int64_t column = column0 + 16 * warp + 2 * (2 * t + i % 2) + q;
        if (j < rank && column < columns) {
          store(j, column, sum[m][q][i]);
        }
      }
    }
  }
}

}  // namespace
}  // namespace gauge_ext::cuda
