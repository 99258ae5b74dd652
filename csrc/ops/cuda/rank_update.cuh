#pragma once

// A block updates kRows x 128 entries of a weight; a thread eight packs of one row, 16 columns
// apart: the places that one counter of the random generator serves.

#include "ops/cuda/block_sum.cuh"
#include "ops/cuda/rank_update.h"

namespace gauge_ext::cuda {
namespace {

constexpr int kUpdateRanks = 16;  // staged at a time
constexpr int kUpdateSums = 4;    // entries that are not finite, D², K², (D - K)²

__device__ __forceinline__ float fused(float a, float b, float c) {
  return fmaf(a, b, c);
}
__device__ __forceinline__ double fused(double a, double b, double c) {
  return fma(a, b, c);
}

template <bool STOCHASTIC, bool FIDELITY, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) rank_update_kernel(const RankUpdate<scalar_t> p) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int PACK = pack_size<scalar_t>(8);
  constexpr int kPerRow = kDropoutLanes / PACK;
  constexpr int ROWS = kTileRows<scalar_t>;
  using Packed = Pack<scalar_t, PACK>;
  using PackedAcc = Pack<acc_t, PACK>;
  alignas(16) __shared__ acc_t right[kUpdateRanks][kTileStride];
  __shared__ acc_t left[ROWS][kUpdateRanks + 1];

  const int first = static_cast<int>(threadIdx.x) % kPerRow * PACK;
  const int tile_row = static_cast<int>(threadIdx.x) / kPerRow;
  const int64_t row0 = static_cast<int64_t>(blockIdx.x) * ROWS, row = row0 + tile_row;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kTileColumns;

  acc_t delta[kDropoutDraws][PACK] = {};
  for (int64_t rank0 = 0; rank0 < p.rank; rank0 += kUpdateRanks) {
    const int64_t ranks = p.rank - rank0 < kUpdateRanks ? p.rank - rank0 : kUpdateRanks;
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kUpdateRanks * kTileColumns; i += kThreads) {
      const int64_t j = i / kTileColumns, c = column0 + i % kTileColumns;
      right[j][i % kTileColumns] =
          j < ranks && c < p.columns ? p.right[(rank0 + j) * p.columns + c] : acc_t(0);
    }
    for (int i = static_cast<int>(threadIdx.x); i < ROWS * kUpdateRanks; i += kThreads) {
      const int64_t r = row0 + i / kUpdateRanks, j = i % kUpdateRanks;
      left[i / kUpdateRanks][j] =
          r < p.rows && j < ranks ? p.left[r * p.rank + rank0 + j] : acc_t(0);
    }
    __syncthreads();
    GAUGE_EXT_NO_UNROLL
    for (int j = 0; j < static_cast<int>(ranks); ++j) {
      const acc_t l = left[tile_row][j];
      GAUGE_EXT_UNROLL
      for (int d = 0; d < kDropoutDraws; ++d) {
        const auto r = *reinterpret_cast<const PackedAcc*>(&right[j][d * kDropoutLanes + first]);
        GAUGE_EXT_UNROLL
        for (int v = 0; v < PACK; ++v) {
          delta[d][v] = fused(l, r.values[v], delta[d][v]);
        }
      }
    }
  }

  double sums[kUpdateSums] = {};
  if (row < p.rows) {
    const scalar_t* from = p.weight + row * p.weight_stride + column0 + first;
    scalar_t* to = p.out + row * p.out_stride + column0 + first;
    const int64_t left_over = p.columns - column0 - first;
    const auto aligned = [](const void* data, int64_t stride) {
      return reinterpret_cast<uintptr_t>(data) % sizeof(Packed) == 0 && stride % PACK == 0;
    };
    // One question for all eight packs: a predicate for each would not fit into registers.
    const bool packed = aligned(p.weight, p.weight_stride) && aligned(p.out, p.out_stride) &&
                        left_over >= (kDropoutDraws - 1) * kDropoutLanes + PACK;
    Rounding rounding = p.rounding;
    if (STOCHASTIC && p.seed != nullptr) {
      rounding.seed = static_cast<uint64_t>(*p.seed);
    }
    uint32_t words[PACK][4];
    if constexpr (STOCHASTIC) {
      const auto block = static_cast<uint32_t>(column0 / kDropoutBlock * kDropoutLanes);
      GAUGE_EXT_UNROLL
      for (int v = 0; v < PACK; ++v) {
        rounding_words(rounding, row, block + static_cast<uint32_t>(first + v), words[v]);
      }
    }
    const auto stored = [&](scalar_t before, int d, int v) {
      const acc_t weight = widen(before), exact = weight + delta[d][v];
      scalar_t rounded;
      if constexpr (STOCHASTIC) {
        const uint32_t word = words[v][d / 2];
        const uint32_t draw = d % 2 ? word >> 16 : word & 0xFFFFu;
        rounded = narrow<scalar_t>(round_stochastic<scalar_t>(exact, draw));
      } else {
        rounded = narrow<scalar_t>(exact);
      }
      const acc_t value = widen(rounded);
      sums[0] += value - value == acc_t(0) ? 0.0 : 1.0;
      if constexpr (FIDELITY) {
        const acc_t kept = value - weight, lost = delta[d][v] - kept;
        sums[1] += static_cast<double>(delta[d][v] * delta[d][v]);
        sums[2] += static_cast<double>(kept * kept);
        sums[3] += static_cast<double>(lost * lost);
      }
      return rounded;
    };
    if (packed) {
      GAUGE_EXT_UNROLL
      for (int d = 0; d < kDropoutDraws; ++d) {
        auto values = *reinterpret_cast<const Packed*>(from + d * kDropoutLanes);
        GAUGE_EXT_UNROLL
        for (int v = 0; v < PACK; ++v) {
          values.values[v] = stored(values.values[v], d, v);
        }
        *reinterpret_cast<Packed*>(to + d * kDropoutLanes) = values;
      }
    } else {
      GAUGE_EXT_UNROLL
      for (int d = 0; d < kDropoutDraws; ++d) {
        GAUGE_EXT_UNROLL
        for (int v = 0; v < PACK; ++v) {
          const int at = d * kDropoutLanes + v;
          if (at < left_over) {
            to[at] = stored(from[at], d, v);
          }
        }
      }
    }
  }
  sum_of_block(sums);
  if (threadIdx.x == 0) {
    double* at =
        p.partial + (static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x) * kUpdateSums;
    for (int i = 0; i < kUpdateSums; ++i) {
      at[i] = sums[i];
    }
  }
}

// One block
__global__ void __launch_bounds__(kThreads)
    update_sums_kernel(const double* partial, int64_t parts, double* result) {
  double sums[kUpdateSums] = {};
  for (int64_t part = threadIdx.x; part < parts; part += kThreads) {
    for (int i = 0; i < kUpdateSums; ++i) {
      sums[i] += partial[part * kUpdateSums + i];
    }
  }
  sum_of_block(sums);
  if (threadIdx.x == 0) {
    result[0] = sums[0] == 0 ? 1.0 : 0.0;
    for (int i = 1; i < kUpdateSums; ++i) {
      result[i] = sums[i];
    }
  }
}

template <typename scalar_t>
dim3 update_grid(int64_t rows, int64_t columns) {
  return dim3(static_cast<unsigned>(ceil_div(rows, kTileRows<scalar_t>)),
              static_cast<unsigned>(ceil_div(columns, kTileColumns)));
}

template <typename scalar_t>
void launch_rank_update(const RankUpdate<scalar_t>& update, Stream stream) {
  const dim3 grid = update_grid<scalar_t>(update.rows, update.columns);
  const int64_t parts = static_cast<int64_t>(grid.x) * grid.y;
  if (parts == 0) {
    return;
  }
  auto kernel = update.fidelity ? &rank_update_kernel<false, true, scalar_t>
                                : &rank_update_kernel<false, false, scalar_t>;
  if constexpr (sizeof(scalar_t) == 2) {
    if (update.stochastic) {
      kernel = update.fidelity ? &rank_update_kernel<true, true, scalar_t>
                               : &rank_update_kernel<true, false, scalar_t>;
    }
  }
  GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, update);
  const auto sum = &update_sums_kernel;
  GAUGE_EXT_LAUNCH(sum, dim3(1), kThreads, stream, update.partial, parts, update.result);
}

}  // namespace

template <typename scalar_t>
int64_t rank_update_size(int64_t rows, int64_t columns) {
  const dim3 grid = update_grid<scalar_t>(rows, columns);
  return static_cast<int64_t>(grid.x) * grid.y * kUpdateSums;
}

template <typename scalar_t>
void rank_update(const RankUpdate<scalar_t>& update, Stream stream) {
  launch_rank_update(update, stream);
}

}  // namespace gauge_ext::cuda
