#pragma once

// CUDA's language on the CPU, as much of it as the kernels use: each thread of a block is a fiber
// with a stack of its own, blocks run one after another, and a barrier or a shuffle gives way to
// the next fiber. The threads of a block run in ascending or in descending order; a kernel that
// lacks a barrier comes out different in one of the two.
//
// It proves the indexing of the tile loops: tails, strides, fragments, barriers. It says nothing
// about speed, and nothing that depends on threads running at the same time.

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static
#define __launch_bounds__(...)
#define GAUGE_EXT_UNROLL
#define GAUGE_EXT_UNROLL_TWICE
#define GAUGE_EXT_NO_UNROLL

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct CUstream_st;
using cudaStream_t = CUstream_st*;

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace gauge_ext::emulation {

enum class Order { kAscending, kDescending };
inline Order order = Order::kAscending;

constexpr int kLanes = 32;
// Small, as the address sanitizer clears a whole stack at every switch.
constexpr size_t kStackBytes = 32 * 1024;

// Threads that arrived at a barrier, counted up for ever: thread n times here has passed it n
// times.
struct Barrier {
  int expected = 0;
  int waiting = 0;
  uint64_t round = 0;
};

// What the lanes of a warp show each other. There are two tables in turn, so that a fast lane does
// not overwrite what a slow one has still to read.
struct Warp {
  Barrier barrier;
  std::array<std::array<std::array<char, 64>, kLanes>, 2> shown;
};

struct Block {
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<std::unique_ptr<char[]>> stacks;
  std::vector<bool> finished;
  std::vector<Warp> warps;
  Barrier barrier;
  std::function<void()> body;
  unsigned current = 0;
  uint64_t progress = 0;
};
inline Block block;

inline void give_way() {
  const unsigned self = block.current;
  swapcontext(&block.threads[self], &block.scheduler);
  threadIdx.x = self;
}

inline void wait(Barrier& barrier) {
  const uint64_t round = barrier.round;
  ++block.progress;
  if (++barrier.waiting == barrier.expected) {
    barrier.waiting = 0;
    ++barrier.round;
    return;
  }
  while (barrier.round == round) {
    give_way();
  }
}

inline void run_thread() {
  block.body();
  block.finished[block.current] = true;
  ++block.progress;
  swapcontext(&block.threads[block.current], &block.scheduler);
}

inline void run_block(unsigned count) {
  block.finished.assign(count, false);
  block.threads.resize(count);
  while (block.stacks.size() < count) {
    block.stacks.push_back(std::make_unique<char[]>(kStackBytes));
  }
  block.warps.assign((count + kLanes - 1) / kLanes, Warp{});
  block.barrier = {static_cast<int>(count), 0, 0};
  for (unsigned warp = 0; warp < block.warps.size(); ++warp) {
    block.warps[warp].barrier.expected = std::min<int>(kLanes, count - warp * kLanes);
  }
  for (unsigned thread = 0; thread < count; ++thread) {
    getcontext(&block.threads[thread]);
    block.threads[thread].uc_stack.ss_sp = block.stacks[thread].get();
    block.threads[thread].uc_stack.ss_size = kStackBytes;
    block.threads[thread].uc_link = nullptr;
    makecontext(&block.threads[thread], run_thread, 0);
  }
  const auto lanes_of = [&](unsigned warp) {
    // Resumes the lanes of a warp once each; says whether any has got on.
    const uint64_t before = block.progress;
    const unsigned first = warp * kLanes, last = std::min(first + kLanes, count);
    for (unsigned i = first; i < last; ++i) {
      const unsigned thread = order == Order::kAscending ? i : last - 1 - (i - first);
      if (!block.finished[thread]) {
        block.current = thread;
        threadIdx.x = thread;
        swapcontext(&block.scheduler, &block.threads[thread]);
      }
    }
    return block.progress != before;
  };
  const auto warps = static_cast<unsigned>(block.warps.size());
  while (std::count(block.finished.begin(), block.finished.end(), false) > 0) {
    bool got_on = false;
    for (unsigned i = 0; i < warps; ++i) {
      // As far ahead of the others as barriers let it
      while (lanes_of(order == Order::kAscending ? i : warps - 1 - i)) {
        got_on = true;
      }
    }
    if (!got_on) {
      throw std::runtime_error("a barrier or a shuffle that not every thread reaches");
    }
  }
}

inline void launch(dim3 grid, unsigned threads, std::function<void()> body) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      threads == 0 || threads > 1024) {
    throw std::runtime_error("a launch that CUDA refuses");
  }
  block.body = std::move(body);
  gridDim = grid;
  blockDim = dim3(threads);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        run_block(threads);
      }
    }
  }
}

// Shows `value` to the warp and returns what each lane shows.
template <typename T>
std::array<T, kLanes> exchange(const T& value) {
  static_assert(sizeof(T) <= 64);
  Warp& warp = block.warps[block.current / kLanes];
  auto& table = warp.shown[warp.barrier.round % 2];
  std::memcpy(table[block.current % kLanes].data(), &value, sizeof(T));
  wait(warp.barrier);
  std::array<T, kLanes> all{};
  for (int lane = 0; lane < kLanes; ++lane) {
    std::memcpy(&all[lane], table[lane].data(), sizeof(T));
  }
  return all;
}

}  // namespace gauge_ext::emulation

#define GAUGE_EXT_LAUNCH(kernel, grid, threads, stream, ...) \
  ((void)(stream), gauge_ext::emulation::launch(grid, threads, [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() {
  gauge_ext::emulation::wait(gauge_ext::emulation::block.barrier);
}

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return gauge_ext::emulation::exchange(value)[lane % gauge_ext::emulation::kLanes];
}

namespace gauge_ext {

// mma.m16n8k8 from the layout that PTX documents, the operands put together as whole matrices.
template <typename acc_t>
void emulated_mma(acc_t (&d)[4], const acc_t (&a)[4], const acc_t (&b)[2]) {
  struct Fragments {
    acc_t a[4], b[2];
  };
  Fragments mine;
  std::copy(a, a + 4, mine.a);
  std::copy(b, b + 2, mine.b);
  const auto all = emulation::exchange(mine);
  const auto A = [&](int row, int k) { return all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]; };
  const auto B = [&](int k, int column) { return all[column * 4 + k % 4].b[k / 4]; };
  const int lane = threadIdx.x % emulation::kLanes;
  for (int i = 0; i < 4; ++i) {
    const int row = lane / 4 + 8 * (i / 2), column = lane % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      d[i] += A(row, k) * B(k, column);
    }
  }
}

// The tensor cores ignore the lower 13 bits of a tf32.
inline void emulated_mma_tf32(float (&d)[4], const float (&a)[4], const float (&b)[2]) {
  const auto truncate = [](float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    bits &= ~0x1FFFu;
    std::memcpy(&value, &bits, sizeof(bits));
    return value;
  };
  float a_short[4], b_short[2];
  std::transform(a, a + 4, a_short, truncate);
  std::transform(b, b + 2, b_short, truncate);
  emulated_mma(d, a_short, b_short);
}

}  // namespace gauge_ext
