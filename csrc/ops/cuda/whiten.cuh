#pragma once

// The metric of each pair: Gram matrices in slices, their Cholesky factors and those's inverses.

#include <algorithm>

#include "ops/cuda/block_algebra.cuh"
#include "ops/cuda/factor_step.h"

namespace gauge_ext::cuda {
namespace {

constexpr int kGramTile = 16;     // a block makes so many rows and columns of a Gram matrix
constexpr int kGramVectors = 32;  // and reads so many vectors at a time
#ifndef GAUGE_EXT_CUDA_GRAM_BLOCKS
#define GAUGE_EXT_CUDA_GRAM_BLOCKS 1056
#endif

GAUGE_EXT_HOST_DEVICE int64_t padded_rank(int64_t rank) {
  return (rank + 3) / 4 * 4;
}

// Sides: 0 is A, whose vectors are its columns; 1 is the effective B, whose vectors are its rows.
enum class Grams { kBoth, kAnchor, kOther };

// Where things of a call lie
struct Metric {
  const FactorPair* pairs;
  int64_t max_rank;
  int64_t slices;
  FactorWork work;

  __device__ __forceinline__ double* gram(int64_t pair, int64_t side, int64_t slice) const {
    return work.grams + ((pair * 2 + side) * slices + slice) * max_rank * max_rank;
  }
  __device__ __forceinline__ double* inverse(int64_t pair, int64_t side) const {
    return work.inverses + (pair * 2 + side) * max_rank * max_rank;
  }
  // The square root of the damping's partner, a diagonal, and room for a matrix
  __device__ __forceinline__ double* delta(int64_t pair) const {
    return work.deltas + pair * (1 + max_rank + max_rank * max_rank);
  }
  __device__ __forceinline__ double* diagonal(int64_t pair) const { return delta(pair) + 1; }
  __device__ __forceinline__ double* room(int64_t pair) const { return delta(pair) + 1 + max_rank; }

  __device__ __forceinline__ void refuse(int64_t pair) const {
    *work.refused = static_cast<int>(pair + 1);
    if (work.report != nullptr) {
      *work.report = static_cast<int>(pair + 1);
    }
  }
};

// One slice of a 16 x 16 part of a Gram matrix; with REFINE that of the vectors times E, where the
// damping's rows, √δ times the anchor's Eᵀ, go with the other side.
template <bool REFINE, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) gram_kernel(const Metric m, Grams which) {
  __shared__ double rows[kGramVectors][kGramTile + 1], columns[kGramVectors][kGramTile + 1];
  const int64_t pair = blockIdx.y / 2, side = blockIdx.y % 2;
  const FactorPair p = m.pairs[pair];
  const int64_t r = p.rank, tiles = ceil_div(r, kGramTile);
  const bool is_anchor = side == p.anchor_B;
  int64_t tile_i = 0, tile_j = blockIdx.z;
  while (tile_j >= tiles - tile_i && tile_i < tiles) {
    tile_j -= tiles - tile_i++;
  }
  tile_j += tile_i;
  if (tile_i >= tiles || (which == Grams::kAnchor && !is_anchor) ||
      (which == Grams::kOther && is_anchor)) {
    return;
  }
  const int64_t length = side == 0 ? p.columns : p.rows;
  const int64_t total = length + (REFINE && !is_anchor ? r : 0);
  const int64_t each = ceil_div(total, m.slices);
  const int64_t begin = blockIdx.x * each, end = begin + each < total ? begin + each : total;
  const double* e = m.inverse(pair, side);
  const double* anchor = m.inverse(pair, p.anchor_B);
  const auto entry = [&](int64_t v, int64_t k) -> double {
    if (v >= length) {
      return sqrt(*m.delta(pair)) * anchor[k * r + v - length];
    }
    if (side == 0) {
      return widen(static_cast<const scalar_t*>(p.lora_A)[k * length + v]);
    }
    return p.scaling * widen(static_cast<const scalar_t*>(p.lora_B)[v * r + k]);
  };
  const auto value = [&](int64_t v, int64_t i) {
    if (v >= end || i >= r) {
      return 0.0;
    }
    if constexpr (REFINE) {
      double sum = 0;
      for (int64_t k = 0; k <= i; ++k) {
        sum += entry(v, k) * e[k * r + i];
      }
      return sum;
    } else {
      return entry(v, i);
    }
  };
  const int i = static_cast<int>(threadIdx.x) / kGramTile;
  const int j = static_cast<int>(threadIdx.x) % kGramTile;
  double sum = 0;
  for (int64_t v0 = begin; v0 < end; v0 += kGramVectors) {
    __syncthreads();
    for (int at = static_cast<int>(threadIdx.x); at < kGramVectors * kGramTile; at += kThreads) {
      // Neighbouring threads along what is neighbouring in memory
      const int v = side == 0 ? at % kGramVectors : at / kGramTile;
      const int k = side == 0 ? at / kGramVectors : at % kGramTile;
      rows[v][k] = value(v0 + v, tile_i * kGramTile + k);
      columns[v][k] = value(v0 + v, tile_j * kGramTile + k);
    }
    __syncthreads();
    for (int v = 0; v < kGramVectors; ++v) {
      sum += rows[v][i] * columns[v][j];
    }
  }
  const int64_t row = tile_i * kGramTile + i, column = tile_j * kGramTile + j;
  if (row < r && column < r) {
    m.gram(pair, side, blockIdx.x)[row * r + column] = sum;
  }
}

// The slices of a Gram matrix, added up in the first
__device__ __forceinline__ double* whole_gram(const Metric& m, int64_t pair, int64_t side) {
  const int64_t r = m.pairs[pair].rank;
  double* first = m.gram(pair, side, 0);
  for_upper(r, [&](int64_t i, int64_t j) {
    for (int64_t slice = 1; slice < m.slices; ++slice) {
      first[i * r + j] += m.gram(pair, side, slice)[i * r + j];
    }
  });
  __syncthreads();
  return first;
}

// δ, and E of the anchor
__global__ void __launch_bounds__(kThreads) anchor_kernel(const Metric m, double damping) {
  const int64_t pair = blockIdx.x;
  const FactorPair p = m.pairs[pair];
  const int64_t r = p.rank;
  double* anchor = whole_gram(m, pair, p.anchor_B);
  const double* other = whole_gram(m, pair, 1 - p.anchor_B);
  double square[1] = {0};  // ‖X‖²
  for_upper(r, [&](int64_t i, int64_t j) {
    square[0] += (i == j ? 1.0 : 2.0) * anchor[i * r + j] * other[i * r + j];
  });
  sum_of_block(square);
  const bool full = cholesky(anchor, r, m.diagonal(pair));
  invert(anchor, r, m.inverse(pair, p.anchor_B));
  if (threadIdx.x == 0) {
    const double least = kPivotTolerance * square[0];
    const double delta = damping > least ? damping : least;
    // At X = 0 the other factor's gradient is zero as well.
    *m.delta(pair) = delta == 0 ? 1.0 : delta;
    if (!full || square[0] != square[0]) {
      m.refuse(pair);
    }
  }
}

// E of the other factor, with the damping
__global__ void __launch_bounds__(kThreads) other_kernel(const Metric m) {
  const int64_t pair = blockIdx.x;
  const FactorPair p = m.pairs[pair];
  const int64_t r = p.rank, side = 1 - p.anchor_B;
  const double* e = m.inverse(pair, p.anchor_B);
  const double delta = *m.delta(pair);
  double* gram = m.gram(pair, side, 0);
  for_upper(r, [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t k = j; k < r; ++k) {
      sum += e[i * r + k] * e[j * r + k];
    }
    gram[i * r + j] += delta * sum;
  });
  cholesky(gram, r, m.diagonal(pair));
  invert(gram, r, m.inverse(pair, side));
}

// Orthogonalizes a second time (CholeskyQR2), from the Gram matrix of the vectors times E.
__global__ void __launch_bounds__(kThreads) refine_kernel(const Metric m, Grams which) {
  const int64_t pair = blockIdx.x;
  const FactorPair p = m.pairs[pair];
  const int64_t r = p.rank, side = which == Grams::kAnchor ? p.anchor_B : 1 - p.anchor_B;
  double* gram = whole_gram(m, pair, side);
  const bool full = cholesky(gram, r, m.diagonal(pair));
  double *e = m.inverse(pair, side), *second = m.room(pair);
  invert(gram, r, second);
  for_upper(r, [&](int64_t i, int64_t j) {
    double sum = 0;
    for (int64_t k = i; k <= j; ++k) {
      sum += e[i * r + k] * second[k * r + j];
    }
    gram[i * r + j] = sum;
  });
  __syncthreads();
  for_upper(r, [&](int64_t i, int64_t j) { e[i * r + j] = gram[i * r + j]; });
  if (threadIdx.x == 0 && which == Grams::kAnchor && !full) {
    m.refuse(pair);
  }
}

// E and its transpose in acc_t, padded with zeros; refuses what is not finite.
template <typename acc_t>
__global__ void __launch_bounds__(kThreads, 2) publish_kernel(const Metric m) {
  const int64_t pair = blockIdx.x, side = blockIdx.y;
  const int64_t r = m.pairs[pair].rank, stride = padded_rank(r), room = padded_rank(m.max_rank);
  const double* e = m.inverse(pair, side);
  acc_t* plain = static_cast<acc_t*>(m.work.factors) + (pair * 2 + side) * 2 * room * room;
  acc_t* transposed = plain + room * room;
  for (int64_t at = threadIdx.x; at < r * stride; at += kThreads) {
    const int64_t i = at / stride, j = at % stride;
    const double value = j < r ? e[i * r + j] : 0.0;
    plain[at] = static_cast<acc_t>(value);
    transposed[at] = static_cast<acc_t>(j < r ? e[j * r + i] : 0.0);
    if (!(value - value == 0)) {
      m.refuse(pair);
    }
  }
}

inline int64_t gram_tiles(int64_t rank) {
  const int64_t tiles = ceil_div(rank, kGramTile);
  return tiles * (tiles + 1) / 2;
}

// By sizes alone, so that sums are the same on every card
inline int64_t gram_slices(const FactorSizes& n) {
  const int64_t blocks = 2 * n.pairs * gram_tiles(n.max_rank);
  const int64_t useful = ceil_div(n.max_length, 8 * kGramVectors);
  return std::max<int64_t>(std::min<int64_t>(GAUGE_EXT_CUDA_GRAM_BLOCKS / blocks, useful), 1);
}

template <typename scalar_t>
void launch_whiten(const FactorPair* pairs,
                   const FactorSizes& n,
                   double damping,
                   bool wide,
                   const FactorWork& work,
                   Stream stream) {
  const Metric m = {pairs, n.max_rank, gram_slices(n), work};
  const dim3 each(static_cast<unsigned>(n.pairs));
  const dim3 grams(static_cast<unsigned>(m.slices), static_cast<unsigned>(2 * n.pairs),
                   static_cast<unsigned>(gram_tiles(n.max_rank)));
  const auto gram = &gram_kernel<false, scalar_t>;
  const auto anchor = &anchor_kernel;
  const auto other = &other_kernel;
  // Factors in float64 are orthogonalized twice, as their Gram matrix has the square of their
  // condition; those of fewer bits are themselves rounded more coarsely than that.
  const auto refine = [&](Grams which) {
    if constexpr (sizeof(scalar_t) == 8) {
      const auto again = &gram_kernel<true, scalar_t>;
      const auto second = &refine_kernel;
      GAUGE_EXT_LAUNCH(again, grams, kThreads, stream, m, which);
      GAUGE_EXT_LAUNCH(second, each, kThreads, stream, m, which);
    }
  };
  GAUGE_EXT_LAUNCH(gram, grams, kThreads, stream, m, Grams::kBoth);
  GAUGE_EXT_LAUNCH(anchor, each, kThreads, stream, m, damping);
  refine(Grams::kAnchor);
  // The other's Gram matrix lies whole in its first slice, until its refinement overwrites it.
  GAUGE_EXT_LAUNCH(other, each, kThreads, stream, m);
  refine(Grams::kOther);
  const bool doubles = wide || sizeof(scalar_t) == 8;
  const auto publish = doubles ? &publish_kernel<double> : &publish_kernel<float>;
  GAUGE_EXT_LAUNCH(publish, dim3(each.x, 2), kThreads, stream, m);
}

}  // namespace
}  // namespace gauge_ext::cuda
