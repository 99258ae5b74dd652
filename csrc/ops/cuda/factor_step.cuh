#pragma once

// The passes over the factors. A thread has one vector, a column of A or a row of B, in shared
// memory; triangular products are taken in place, as each number needs only those before it.

#include "ops/cuda/whiten.cuh"

namespace gauge_ext::cuda {
namespace {

constexpr int kVectorBytes = 32 * 1024;

template <typename acc_t>
constexpr int kVectorNumbers = kVectorBytes / static_cast<int>(sizeof(acc_t));

// So many vectors that they fit, one number of each apart, which spreads them over the banks
template <typename acc_t>
int vectors_of_block(int64_t max_rank) {
  const int64_t fitting = kVectorNumbers<acc_t> / max_rank - 1;
  return static_cast<int>(fitting >= kThreads ? kThreads
                          : fitting >= kWarp  ? fitting / kWarp * kWarp
                                              : fitting);
}
static_assert(kVectorNumbers<double> / kLargestFactorRank > 1);

// Numbers j to j + 3 of Tᵀ v for a triangular T, whose column j has entries in rows [first, end)
template <typename acc_t>
__device__ __forceinline__ void
times_four(acc_t* v, int apart, const acc_t* t, int64_t r, int64_t j, int64_t first, int64_t end) {
  const int64_t stride = padded_rank(r);
  acc_t sum[4] = {};
  for (int64_t k = first; k < end; ++k) {
    const auto four = *reinterpret_cast<const Pack<acc_t, 4>*>(t + k * stride + j);
    const acc_t x = v[k * apart];
    GAUGE_EXT_UNROLL
    for (int i = 0; i < 4; ++i) {
      sum[i] += x * four.values[i];
    }
  }
  GAUGE_EXT_UNROLL
  for (int i = 0; i < 4; ++i) {
    if (j + i < r) {
      v[(j + i) * apart] = sum[i];
    }
  }
}

// v ← Eᵀ v for an upper triangular E, from the last four numbers to the first
template <typename acc_t>
__device__ __forceinline__ void times_upper(acc_t* v, int apart, const acc_t* e, int64_t r) {
  for (int64_t j = padded_rank(r) - 4; j >= 0; j -= 4) {
    times_four(v, apart, e, r, j, 0, j + 4 < r ? j + 4 : r);
  }
}

// v ← Lᵀ v for a lower triangular L, from the first four numbers to the last
template <typename acc_t>
__device__ __forceinline__ void times_lower(acc_t* v, int apart, const acc_t* l, int64_t r) {
  for (int64_t j = 0; j < r; j += 4) {
    times_four(v, apart, l, r, j, j, r);
  }
}

template <typename acc_t>
__device__ __forceinline__ acc_t squared_norm(const acc_t* v, int apart, int64_t r) {
  acc_t norm = 0;
  for (int64_t k = 0; k < r; ++k) {
    norm += v[k * apart] * v[k * apart];
  }
  return norm;
}

// The vectors of a block: which they are, and where their numbers lie
struct Vectors {
  int64_t rank, first, live;
  int64_t length;  // of all there are
  bool of_B;

  __device__ __forceinline__ Vectors(const FactorPair& p) : rank(p.rank), of_B(blockIdx.z == 1) {
    length = of_B ? p.rows : p.columns;
    first = static_cast<int64_t>(blockIdx.x) * blockDim.x;
    live = length - first < blockDim.x ? length - first : static_cast<int64_t>(blockDim.x);
  }

  // body(vector of the block, number in it, place in the factor), neighbours in memory by
  // neighbouring threads
  template <typename F>
  __device__ __forceinline__ void for_each(const F& body) const {
    for (int64_t at = threadIdx.x; at < rank * live; at += blockDim.x) {
      const int64_t t = of_B ? at / rank : at % live, k = of_B ? at % rank : at / live;
      body(t, k, of_B ? (first + t) * rank + k : k * length + first + t);
    }
  }
};

// E of the other side, which whitens this one's gradient, and its transpose
template <typename acc_t>
__device__ __forceinline__ const acc_t* published(const FactorWork& work,
                                                  int64_t max_rank,
                                                  bool of_B,
                                                  int transposed) {
  const int64_t room = padded_rank(max_rank) * padded_rank(max_rank);
  const int64_t side = of_B ? 0 : 1;
  return static_cast<const acc_t*>(work.factors) +
         ((static_cast<int64_t>(blockIdx.y) * 2 + side) * 2 + transposed) * room;
}

template <StepRule RULE, typename scalar_t>
__global__ void __launch_bounds__(kThreads, 2) step_kernel(const FactorPair* pairs,
                                                           int64_t max_rank,
                                                           const FactorStep call,
                                                           const FactorWork work) {
  using acc_t = typename AccOf<scalar_t>::type;
  alignas(16) __shared__ acc_t values[kVectorNumbers<acc_t>];
  __shared__ acc_t rates[kThreads];
  const FactorPair p = pairs[blockIdx.y];
  const Vectors vectors(p);
  if (*work.refused != 0 || vectors.live <= 0) {
    return;
  }
  FactorStep step = call;
  step.correction1 = p.correction1;
  step.correction2 = p.correction2;
  const double back = vectors.of_B ? 1.0 / p.scaling : 1.0;
  const StepCoefficients<acc_t> c(step, RULE, p.rank, back, back);
  const acc_t* plain = published<acc_t>(work, max_rank, vectors.of_B, 0);
  const acc_t* transposed = published<acc_t>(work, max_rank, vectors.of_B, 1);
  auto* factor = static_cast<scalar_t*>(vectors.of_B ? p.lora_B : p.lora_A);
  const auto* grad = static_cast<const scalar_t*>(vectors.of_B ? p.grad_B : p.grad_A);
  auto* average = static_cast<acc_t*>(vectors.of_B ? p.avg_B : p.avg_A);
  auto* moments = static_cast<acc_t*>(vectors.of_B ? p.sq_B : p.sq_A);
  const int apart = static_cast<int>(blockDim.x) + 1;
  const bool mine = threadIdx.x < vectors.live;
  acc_t* own = values + threadIdx.x;

  rates[threadIdx.x] = c.lr;
  if constexpr (RULE == StepRule::kGaugeAdam) {
    vectors.for_each([&](int64_t t, int64_t k, int64_t at) {
      values[k * apart + t] = c.scale * widen(grad[at]);
    });
    __syncthreads();
    if (mine) {
      times_upper(own, apart, plain, p.rank);
      rates[threadIdx.x] =
          c.rate(squared_norm(own, apart, p.rank), moments + vectors.first + threadIdx.x);
    }
    __syncthreads();
  }
  vectors.for_each([&](int64_t t, int64_t k, int64_t at) {
    const acc_t g = widen(grad[at]);
    acc_t source = c.scale * g;
    if (average != nullptr) {
      const acc_t q = c.average * average[at] + c.gradient * g;
      average[at] = q;
      source = c.look_ahead != acc_t(0) ? c.look_ahead * g + c.average * q : q;
    }
    values[k * apart + t] = source;
  });
  __syncthreads();
  if (mine) {
    times_upper(own, apart, plain, p.rank);
    times_lower(own, apart, transposed, p.rank);
  }
  __syncthreads();
  vectors.for_each([&](int64_t t, int64_t k, int64_t at) {
    factor[at] = narrow<scalar_t>(c.keep * widen(factor[at]) - rates[t] * values[k * apart + t]);
  });
}

// The squared norm of each block's whitened gradients
template <typename scalar_t>
__global__ void __launch_bounds__(kThreads)
    norm_kernel(const FactorPair* pairs, int64_t max_rank, const FactorWork work) {
  alignas(16) __shared__ double values[kVectorNumbers<double>];
  __shared__ double norms[kThreads];
  const FactorPair p = pairs[blockIdx.y];
  const Vectors vectors(p);
  const auto* grad = static_cast<const scalar_t*>(vectors.of_B ? p.grad_B : p.grad_A);
  const double scale = vectors.of_B ? 1.0 / p.scaling : 1.0;
  const int apart = static_cast<int>(blockDim.x) + 1;
  vectors.for_each(
      [&](int64_t t, int64_t k, int64_t at) { values[k * apart + t] = scale * widen(grad[at]); });
  __syncthreads();
  norms[threadIdx.x] = 0;
  if (static_cast<int64_t>(threadIdx.x) < vectors.live) {
    double* own = values + threadIdx.x;
    times_upper(own, apart, published<double>(work, max_rank, vectors.of_B, 0), p.rank);
    norms[threadIdx.x] = squared_norm(own, apart, p.rank);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0;
    for (unsigned i = 0; i < blockDim.x; ++i) {
      sum += norms[i];
    }
    work.norms[(static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * gridDim.x +
               blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    total_norm_kernel(const double* norms, int64_t count, const int* refused, double* total) {
  double sum[1] = {0};
  for (int64_t i = threadIdx.x; i < count; i += kThreads) {
    sum[0] += norms[i];
  }
  sum_of_block(sum);
  if (threadIdx.x == 0) {
    *total = *refused != 0 ? bits_float(0x7FC00000u) : sum[0];
  }
}

template <typename acc_t>
dim3 vector_grid(const FactorSizes& n) {
  return dim3(static_cast<unsigned>(ceil_div(n.max_length, vectors_of_block<acc_t>(n.max_rank))),
              static_cast<unsigned>(n.pairs), 2);
}

template <typename scalar_t>
void launch_step(const FactorPair* pairs,
                 const FactorSizes& n,
                 StepRule rule,
                 const FactorStep& step,
                 const FactorWork& work,
                 Stream stream) {
  using acc_t = typename AccOf<scalar_t>::type;
  const auto kernel = rule == StepRule::kGaugeAdam ? &step_kernel<StepRule::kGaugeAdam, scalar_t>
                                                   : &step_kernel<StepRule::kScaledGd, scalar_t>;
  const int threads = vectors_of_block<acc_t>(n.max_rank);
  GAUGE_EXT_LAUNCH(kernel, vector_grid<acc_t>(n), threads, stream, pairs, n.max_rank, step, work);
}

template <typename scalar_t>
void launch_norm(const FactorPair* pairs,
                 const FactorSizes& n,
                 const FactorWork& work,
                 double* norm,
                 Stream stream) {
  const dim3 grid = vector_grid<double>(n);
  const auto kernel = &norm_kernel<scalar_t>;
  const auto total = &total_norm_kernel;
  const int threads = vectors_of_block<double>(n.max_rank);
  GAUGE_EXT_LAUNCH(kernel, grid, threads, stream, pairs, n.max_rank, work);
  GAUGE_EXT_LAUNCH(total, dim3(1), kThreads, stream, work.norms,
                   static_cast<int64_t>(grid.x) * grid.y * grid.z, work.refused, norm);
}

inline FactorWorkSizes work_sizes(const FactorSizes& n) {
  const int64_t r = n.max_rank, room = padded_rank(r), grid = vector_grid<double>(n).x;
  return {2 * n.pairs * gram_slices(n) * r * r, 2 * n.pairs * r * r, n.pairs * (1 + r + r * r),
          4 * n.pairs * room * room, 2 * n.pairs * grid};
}

}  // namespace

template <typename scalar_t>
const FactorStepKernels<scalar_t>& factor_step_kernels() {
  static const FactorStepKernels<scalar_t> table = {&launch_whiten<scalar_t>,
                                                    &launch_step<scalar_t>, &launch_norm<scalar_t>};
  return table;
}

}  // namespace gauge_ext::cuda
