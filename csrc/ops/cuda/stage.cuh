#pragma once

// Tiles of a row-major matrix, and of the factors that it is multiplied with, from global into
// shared memory by the eight warps of a block.

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

// The row of a tile that this thread brings a part of
template <typename scalar_t>
__device__ __forceinline__ int staged_row() {
  return static_cast<int>(threadIdx.x) / (kDropoutLanes / pack_size<scalar_t>(8));
}

// Its part of tile = X ∘ (M > 0): of X the row `row`, where -1 stands for zeros, and the columns
// that start at `column0`, a multiple of 128; zeros beyond the edge. The scale of what
// dropout keeps is left to whoever uses the tile, so that the numbers stay what they are.
//
// Each thread moves 8 bytes at a time, PACK elements, at eight places of a row that are 16 columns
// apart: just those places that one counter of the generator serves.
template <typename scalar_t>
__device__ __forceinline__ void stage_row(Tile<scalar_t>& tile,
                                          const Matrix<const scalar_t>& x,
                                          int64_t column0,
                                          const Dropout& dropout,
                                          int64_t row) {
  constexpr int PACK = pack_size<scalar_t>(8);
  constexpr int kPerRow = kDropoutLanes / PACK;
  static_assert(kPerRow * kTileRows<scalar_t> == kThreads);
  using Packed = Pack<scalar_t, PACK>;
  const int first = static_cast<int>(threadIdx.x) % kPerRow * PACK;
  const int tile_row = staged_row<scalar_t>();
  const bool aligned = packs_aligned(x.data, x.columns, PACK);

  Packed values[kDropoutDraws];
  GAUGE_EXT_UNROLL
  for (int d = 0; d < kDropoutDraws; ++d) {
    const int64_t column = column0 + d * kDropoutLanes + first;
    const scalar_t* from = x.data + row * x.columns + column;
    values[d] = Packed{};
    if (row >= 0) {
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
      dropout_words(PhiloxKey{dropout.seed}, row, block + static_cast<uint32_t>(first + v), words);
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

// The tile whose rows start at `row0`
template <typename scalar_t>
__device__ __forceinline__ void stage(Tile<scalar_t>& tile,
                                      const Matrix<const scalar_t>& x,
                                      int64_t row0,
                                      int64_t column0,
                                      const Dropout& dropout) {
  const int64_t row = row0 + staged_row<scalar_t>();
  stage_row<scalar_t>(tile, x, column0, dropout, row < x.rows ? row : -1);
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

// left[i][j] = L[row0 + i][rank0 + j], zeros beyond the edges; `stride` from one row to the next.
template <int ROWS, int RANK, typename acc_t>
__device__ __forceinline__ void stage_left(acc_t (&left)[ROWS][kLeftStride<RANK>],
                                           const acc_t* from,
                                           int64_t row0,
                                           int64_t rows,
                                           int64_t rank0,
                                           int64_t rank,
                                           int64_t stride) {
  for (int i = static_cast<int>(threadIdx.x); i < ROWS * RANK; i += kThreads) {
    const int64_t row = row0 + i / RANK, j = rank0 + i % RANK;
    left[i / RANK][i % RANK] = row < rows && j < rank ? from[row * stride + j] : acc_t(0);
  }
}

}  // namespace
}  // namespace gauge_ext::cuda
