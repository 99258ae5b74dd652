#pragma once

// Tiles of a row-major matrix in shared memory, and the two skinny products of a tile, by the eight
// warps of a block. g = lane / 4 and t = lane % 4 throughout, as in the fragments of `mma`.
//
// The order in which a product runs over its inner index does not matter, nor which of a fragment's
// columns stands for which column of the matrix. Both are chosen such that a lane's numbers are
// neighbours in memory, and in dropout's order.

#include "math/dropout.h"
#include "ops/cuda/device.cuh"
#include "ops/cuda/low_rank.h"

namespace gauge_ext::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kTileColumns = kDropoutBlock;  // 128

// 16 more than needed: rows then start in different banks.
constexpr int kTileStride = kTileColumns + 16;

// A tile takes 16 KB whatever the storage type: 64 rows of half precision, 32 of float32.
template <typename scalar_t>
constexpr int kTileRows = 128 / static_cast<int>(sizeof(scalar_t));

// The ranks that a block works on; more are given to other blocks.
template <typename scalar_t>
constexpr int kMaxRank = sizeof(scalar_t) == 8 ? 16 : 32;

// A rank's stride in a tile of L, again for the banks.
template <int RANK>
constexpr int kLeftStride = RANK + 8;

template <typename scalar_t>
using Tile = scalar_t[kTileRows<scalar_t>][kTileStride];

__device__ __forceinline__ Dropout read_seed(const DropoutSource& source) {
  Dropout dropout = source.dropout;
  if (source.seed != nullptr) {
    dropout.seed = static_cast<uint64_t>(*source.seed);
  }
  return dropout;
}

template <typename acc_t>
acc_t dropout_scale(const DropoutSource& source) {
  return source.dropout.threshold > 0 ? static_cast<acc_t>(source.dropout.scale) : acc_t(1);
}

// Whether packs of `count` elements that start at multiples of it in each row are aligned.
template <typename scalar_t>
__device__ __forceinline__ bool packs_aligned(const scalar_t* data, int64_t columns, int count) {
  return columns % count == 0 &&
         reinterpret_cast<uintptr_t>(data) % (count * sizeof(scalar_t)) == 0;
}

// tile = X ∘ (M > 0) for the rows and columns that start at `row0` and `column0`, a multiple of
// 128; zeros beyond the edges. The scale of what dropout keeps is left to whoever uses the tile, so
// that the numbers stay what they are.
//
// Each thread moves 8 bytes at a time, PACK elements, at eight places of a row that are 16 columns
// apart: just those places that one counter of the generator serves.
template <typename scalar_t>
__device__ __forceinline__ void stage(Tile<scalar_t>& tile,
                                      const Matrix<const scalar_t>& x,
                                      int64_t row0,
                                      int64_t column0,
                                      const Dropout& dropout) {
  constexpr int PACK = pack_size<scalar_t>(8);
  constexpr int kPerRow = kDropoutLanes / PACK;
  static_assert(kPerRow * kTileRows<scalar_t> == kThreads);
  using Packed = Pack<scalar_t, PACK>;
  const int first = static_cast<int>(threadIdx.x) % kPerRow * PACK;
  const int tile_row = static_cast<int>(threadIdx.x) / kPerRow;
  const int64_t row = row0 + tile_row;
  const bool aligned = packs_aligned(x.data, x.columns, PACK);

  Packed values[kDropoutDraws];
  GAUGE_EXT_UNROLL
  for (int d = 0; d < kDropoutDraws; ++d) {
    const int64_t column = column0 + d * kDropoutLanes + first;
    const scalar_t* from = x.data + row * x.columns + column;
    values[d] = Packed{};
    if (row < x.rows) {
      if (aligned) {
        if (column < x.columns) {
          values[d] = *reinterpret_cast<const Packed*>(from);
        }
      } else {
        GAUGE_EXT_UNROLL
        for (int v = 0; v < PACK; ++v) {
          if (column + v < x.columns) {
            values[d].values[v] = from[v];
          }
        }
      }
    }
  }
  if (dropout.threshold > 0) {
    const auto block = static_cast<uint32_t>(column0 / kDropoutBlock * kDropoutLanes);
    GAUGE_EXT_UNROLL
    for (int v = 0; v < PACK; ++v) {
      uint32_t words[4];
      dropout_words(dropout, row, block + static_cast<uint32_t>(first + v), words);
      GAUGE_EXT_UNROLL
      for (int d = 0; d < kDropoutDraws; ++d) {
        const uint32_t draw = d % 2 ? words[d / 2] >> 16 : words[d / 2] & 0xFFFFu;
        if (draw < dropout.threshold) {
          values[d].values[v] = scalar_t{};
        }
      }
    }
  }
  GAUGE_EXT_UNROLL
  for (int d = 0; d < kDropoutDraws; ++d) {
    *reinterpret_cast<Packed*>(&tile[tile_row][d * kDropoutLanes + first]) = values[d];
  }
}

template <typename acc_t>
__device__ __forceinline__ acc_t load_factor(const Factor<const void>& factor, int64_t at) {
  switch (factor.type) {
    case Type::kFloat:
      return static_cast<const float*>(factor.data)[at];
    case Type::kDouble:
      return static_cast<acc_t>(static_cast<const double*>(factor.data)[at]);
    case Type::kBFloat16:
      return widen(static_cast<const BFloat16Bits*>(factor.data)[at]);
    default:
      return widen(static_cast<const Float16Bits*>(factor.data)[at]);
  }
}

template <typename acc_t>
__device__ __forceinline__ void store_factor(const Factor<void>& factor, int64_t at, acc_t value) {
  switch (factor.type) {
    case Type::kFloat:
      static_cast<float*>(factor.data)[at] = static_cast<float>(value);
      break;
    case Type::kDouble:
      static_cast<double*>(factor.data)[at] = value;
      break;
    case Type::kBFloat16:
      static_cast<BFloat16Bits*>(factor.data)[at] = narrow<BFloat16Bits>(static_cast<float>(value));
      break;
    default:
      static_cast<Float16Bits*>(factor.data)[at] = narrow<Float16Bits>(static_cast<float>(value));
  }
}

// right[j][c] = R[rank0 + j][column0 + c], zeros beyond the edges; along the stride that is one.
template <int RANK, int STRIDE, typename acc_t>
__device__ __forceinline__ void stage_right(acc_t (&right)[RANK][STRIDE],
                                            const Factor<const void>& factor,
                                            int64_t rank0,
                                            int64_t rank,
                                            int64_t column0,
                                            int64_t columns) {
  const bool along_columns = factor.column_stride == 1;
  for (int i = static_cast<int>(threadIdx.x); i < RANK * kTileColumns; i += kThreads) {
    const int j = along_columns ? i / kTileColumns : i % RANK;
    const int c = along_columns ? i % kTileColumns : i / RANK;
    acc_t value = 0;
    if (rank0 + j < rank && column0 + c < columns) {
      value = load_factor<acc_t>(
          factor, (rank0 + j) * factor.row_stride + (column0 + c) * factor.column_stride);
    }
    right[j][c] = value;
  }
}

// left[i][j] = L[row0 + i][rank0 + j], zeros beyond the edges.
template <int ROWS, int RANK, typename acc_t>
__device__ __forceinline__ void stage_left(acc_t (&left)[ROWS][kLeftStride<RANK>],
                                           const acc_t* from,
                                           int64_t row0,
                                           int64_t rows,
                                           int64_t rank0,
                                           int64_t rank) {
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * RANK; i += kThreads) {
    const int64_t row = row0 + i / RANK, j = rank0 + i % RANK;
    left[i / RANK][i % RANK] = row < rows && j < rank ? from[row * rank + j] : acc_t(0);
  }
}

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
      to[(row0 + row) * rank + rank0 + j] = total * scale;
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

// Writes the warp's sixteen columns of S, (rank, columns), which start at column0.
template <int RANK, typename acc_t>
__device__ __forceinline__ void write_sum(const acc_t (&sum)[RANK / 16][2][4],
                                          int64_t rank0,
                                          int64_t rank,
                                          int64_t column0,
                                          int64_t columns,
                                          acc_t* to) {
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
          to[j * columns + column] = sum[m][q][i];
        }
      }
    }
  }
}

}  // namespace
}  // namespace gauge_ext::cuda
