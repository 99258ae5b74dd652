#pragma once

// Y = bias + scale · (L R) ∘ M, or Y += the same: a block writes 128 x 128 of Y, a warp sixteen
// rows of them.

#include "ops/cuda/stage.cuh"

namespace gauge_ext::cuda {
namespace {

constexpr int kExpandRows = 16 * kWarps;
constexpr int kExpandStride = kTileColumns + 8;

template <typename scalar_t>
struct ExpandArguments {
  using acc_t = typename AccOf<scalar_t>::type;
  Matrix<scalar_t> y;
  bool add;
  const scalar_t* bias;
  const acc_t* left;
  Factor<const void> right;
  int64_t rank;
  DropoutSource dropout;
  acc_t scale;  // that of dropout included
};

// The multiplier of four neighbouring columns comes from four counters, each of which serves eight
// places of the row: drawn once, they last for the whole width of the tile.
struct RowMask {
  uint32_t words[4][4];

  __device__ __forceinline__ void draw(const Dropout& dropout, int64_t row, uint32_t counter) {
    GAUGE_EXT_UNROLL
    for (int v = 0; v < 4; ++v) {
      dropout_words(PhiloxKey{dropout.seed}, row, counter + static_cast<uint32_t>(v), words[v]);
    }
  }
  // Whether dropout keeps column 16 d + v of those
  __device__ __forceinline__ bool keeps(const Dropout& dropout, int d, int v) const {
    const uint32_t word = words[v][d / 2];
    return (d % 2 ? word >> 16 : word & 0xFFFFu) >= dropout.threshold;
  }
};

template <typename scalar_t, typename acc_t>
__device__ __forceinline__ void write_four(const acc_t (&value)[4],
                                           bool add,
                                           const scalar_t* bias,
                                           scalar_t* y,
                                           int64_t columns_left,
                                           bool aligned) {
  using Four = Pack<scalar_t, 4>;
  const auto plus = [&](acc_t sum, int v, scalar_t before) {
    if (add) {
      sum += widen(before);
    } else if (bias != nullptr) {
      sum += widen(bias[v]);
    }
    return narrow<scalar_t>(sum);
  };
  if (aligned && columns_left >= 4) {
    Four four = add ? *reinterpret_cast<const Four*>(y) : Four{};
    GAUGE_EXT_UNROLL
    for (int v = 0; v < 4; ++v) {
      four.values[v] = plus(value[v], v, four.values[v]);
    }
    *reinterpret_cast<Four*>(y) = four;
  } else {
    GAUGE_EXT_UNROLL
    for (int v = 0; v < 4; ++v) {
      if (v < columns_left) {
        y[v] = plus(value[v], v, add ? y[v] : scalar_t{});
      }
    }
  }
}

// The block's part of Y for `rows` rows, of which the i-th is row_of(i) of Y; L has so many numbers
// from one row to the next.
template <typename scalar_t, typename F>
__device__ __forceinline__ void expand_block(const ExpandArguments<scalar_t>& p,
                                             int64_t rows,
                                             int64_t left_stride,
                                             const F& row_of) {
  using acc_t = typename AccOf<scalar_t>::type;
  constexpr int RANK = kMaxRank<scalar_t>;
  alignas(16) __shared__ acc_t right[RANK][kExpandStride];
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int lane = static_cast<int>(threadIdx.x) % kWarp, g = lane / 4, t = lane % 4;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kExpandRows + 16 * warp + g;
  const int64_t column0 = static_cast<int64_t>(blockIdx.y) * kTileColumns;

  // Column 2n + h of the d-th sixteen is the n-th of fragment [d][h], so that a lane ends with the
  // four neighbours that start at 16 d + 4 t.
  acc_t value[kDropoutDraws][2][4] = {};
  const auto left = [&](int64_t i, int64_t j) {
    return i < rows && j < p.rank ? p.left[i * left_stride + j] : acc_t(0);
  };
  for (int64_t rank0 = 0; rank0 < p.rank; rank0 += RANK) {
    __syncthreads();
    stage_right(right, p.right, rank0, p.rank, column0, p.y.columns);
    __syncthreads();
    GAUGE_EXT_NO_UNROLL
    for (int k = 0; k < RANK; k += 8) {
      if (rank0 + k < p.rank) {
        const int64_t j = rank0 + k + t;
        const acc_t a[4] = {left(row, j), left(row + 8, j), left(row, j + 4), left(row + 8, j + 4)};
        GAUGE_EXT_UNROLL
        for (int d = 0; d < kDropoutDraws; ++d) {
          using Two = Pack<acc_t, 2>;
          const int c = 16 * d + 2 * g;
          const Two upper = *reinterpret_cast<const Two*>(&right[k + t][c]);
          const Two lower = *reinterpret_cast<const Two*>(&right[k + t + 4][c]);
          GAUGE_EXT_UNROLL
          for (int h = 0; h < 2; ++h) {
            const acc_t b[2] = {upper.values[h], lower.values[h]};
            multiply<false, false>(value[d][h], a, b);
          }
        }
      }
    }
  }

  const Dropout dropout = read_seed(p.dropout);
  const bool aligned = packs_aligned(p.y.data, p.y.columns, 4);
  GAUGE_EXT_UNROLL
  for (int lower = 0; lower < 2; ++lower) {
    if (row + 8 * lower < rows) {
      const int64_t i = row_of(row + 8 * lower);
      RowMask mask;
      if (dropout.threshold > 0) {
        mask.draw(dropout, i,
                  static_cast<uint32_t>(column0 / kDropoutBlock * kDropoutLanes + 4 * t));
      }
      GAUGE_EXT_UNROLL
      for (int d = 0; d < kDropoutDraws; ++d) {
        const int64_t column = column0 + 16 * d + 4 * t;
        acc_t four[4];
        GAUGE_EXT_UNROLL
        for (int v = 0; v < 4; ++v) {
          const bool kept = dropout.threshold == 0 || mask.keeps(dropout, d, v);
          four[v] = kept ? value[d][v % 2][2 * lower + v / 2] * p.scale : acc_t(0);
        }
        write_four(four, p.add, p.bias == nullptr ? nullptr : p.bias + column,
                   p.y.data + i * p.y.columns + column, p.y.columns - column, aligned);
      }
    }
  }
}

template <typename scalar_t>
__global__ void __launch_bounds__(kThreads) expand_kernel(const ExpandArguments<scalar_t> p) {
  expand_block(p, p.y.rows, p.rank, [](int64_t i) { return i; });
}

template <typename scalar_t, typename acc_t>
void expand(Matrix<scalar_t> y,
            bool add,
            const scalar_t* bias,
            const acc_t* left,
            Factor<const void> right,
            int64_t rank,
            DropoutSource dropout,
            acc_t scale,
            Stream stream) {
  if (y.rows == 0 || y.columns == 0) {
    return;
  }
  const ExpandArguments<scalar_t> p = {y,     add,  bias,    left,
                                       right, rank, dropout, scale * dropout_scale<acc_t>(dropout)};
  const dim3 grid(static_cast<unsigned>(ceil_div(y.rows, kExpandRows)),
                  static_cast<unsigned>(ceil_div(y.columns, kTileColumns)));
  const auto kernel = &expand_kernel<scalar_t>;
  GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, p);
}

// One counter a thread: eight multipliers, sixteen columns apart.
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    mask_kernel(const Matrix<scalar_t> y, const DropoutSource source) {
  using acc_t = typename AccOf<scalar_t>::type;
  const int64_t counters = ceil_div(y.columns, kDropoutBlock) * kDropoutLanes;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t row = i / counters, counter = i % counters;
  if (row >= y.rows) {
    return;
  }
  const Dropout dropout = read_seed(source);
  uint32_t words[4];
  dropout_words(PhiloxKey{dropout.seed}, row, static_cast<uint32_t>(counter), words);
  GAUGE_EXT_UNROLL
  for (int d = 0; d < kDropoutDraws; ++d) {
    const int64_t column =
        counter / kDropoutLanes * kDropoutBlock + d * kDropoutLanes + counter % kDropoutLanes;
    const uint32_t draw = d % 2 ? words[d / 2] >> 16 : words[d / 2] & 0xFFFFu;
    if (column < y.columns) {
      y.data[row * y.columns + column] = narrow<scalar_t>(
          draw >= dropout.threshold ? static_cast<acc_t>(dropout.scale) : acc_t(0));
    }
  }
}

template <typename scalar_t>
void launch_mask(Matrix<scalar_t> y, DropoutSource dropout, Stream stream) {
  const int64_t counters = ceil_div(y.columns, kDropoutBlock) * kDropoutLanes;
  if (y.rows * counters > 0) {
    const dim3 grid(static_cast<unsigned>(ceil_div(y.rows * counters, kThreads)));
    const auto kernel = &mask_kernel<scalar_t>;
    GAUGE_EXT_LAUNCH(kernel, grid, kThreads, stream, y, dropout);
  }
}

}  // namespace
}  // namespace gauge_ext::cuda
