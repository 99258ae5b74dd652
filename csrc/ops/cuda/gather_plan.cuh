#pragma once

// The order of the rows by adapter: the kernel that makes it, and how blocks find their rows in it.

#include <cassert>

#include "ops/cuda/gather.h"
#include "ops/cuda/stage.cuh"

namespace gauge_ext::cuda {
namespace {

// The rows of one adapter: `count` of them from `first` on in the plan's order
struct Segment {
  int64_t first, count, rows_each;
  const int64_t* order;

  __device__ __forceinline__ Segment(const GatherRows& plan, int64_t adapter)  // -1: none
      : first(plan.starts[adapter + 1] * plan.rows_each),
        count(plan.starts[adapter + 2] * plan.rows_each - first),
        rows_each(plan.rows_each),
        order(plan.order) {}

  // Where the i-th row of the segment lies in X
  __device__ __forceinline__ int64_t row(int64_t i) const {
    const int64_t at = first + i;
    return order[at / rows_each] * rows_each + at % rows_each;
  }
  __device__ __forceinline__ int64_t row_or_none(int64_t i) const {
    return i < count ? row(i) : int64_t(-1);
  }
};

// A block for each adapter and one for none counts the entries before its own and finds its own, of
// which each thread has a run of neighbours.
__global__ void __launch_bounds__(kThreads) plan_kernel(const int64_t* index,
                                                        int64_t entries,
                                                        int64_t adapters,
                                                        int64_t* starts,
                                                        int64_t* order) {
  __shared__ int64_t before[kThreads], own[kThreads];
  const int64_t wanted = static_cast<int64_t>(blockIdx.x) - 1;
  const int64_t each = ceil_div(entries, kThreads);
  const int64_t begin = threadIdx.x * each;
  const int64_t end = begin + each < entries ? begin + each : entries;
  int64_t less = 0, equal = 0;
  bool known = true;
  GAUGE_EXT_NO_UNROLL
  for (int64_t i = begin; i < end; ++i) {
    const int64_t value = index[i];
    known = known && value >= -1 && value < adapters;
    less += value < wanted ? 1 : 0;
    equal += value == wanted ? 1 : 0;
  }
  assert(known && "index must be in [-1, number of adapters)");
  before[threadIdx.x] = less;
  own[threadIdx.x] = equal;
  __syncthreads();
  if (threadIdx.x == 0) {
    int64_t start = 0;
    for (int i = 0; i < kThreads; ++i) {
      start += before[i];
    }
    starts[blockIdx.x] = start;
    for (int i = 0; i < kThreads; ++i) {
      before[i] = start;
      start += own[i];
    }
    if (wanted == adapters - 1) {
      starts[adapters + 1] = start;
    }
  }
  __syncthreads();
  int64_t at = before[threadIdx.x];
  GAUGE_EXT_NO_UNROLL
  for (int64_t i = begin; i < end; ++i) {
    if (index[i] == wanted) {
      order[at++] = i;
    }
  }
}

inline void launch_plan(const int64_t* index,
                        int64_t entries,
                        int64_t adapters,
                        int64_t* starts,
                        int64_t* order,
                        Stream stream) {
  const auto kernel = &plan_kernel;
  GAUGE_EXT_LAUNCH(kernel, dim3(static_cast<unsigned>(adapters + 1)), kThreads, stream, index,
                   entries, adapters, starts, order);
}

}  // namespace
}  // namespace gauge_ext::cuda
