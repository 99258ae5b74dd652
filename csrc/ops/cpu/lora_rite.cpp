#include "ops/cpu/lora_rite.h"

#include <atomic>
#include <vector>

#include <ATen/core/Tensor.h>

#include "ops/cpu/capability.h"
#include "ops/cpu/factor_call.h"

namespace gauge_ext {

// One table per capability, defined by lora_rite_kernel.cpp, which is compiled once for each.
#define GAUGE_EXT_DECLARE_TABLES(CAPABILITY)            \
  namespace CAPABILITY {                                \
  extern const RiteKernels<float> rite_float;           \
  extern const RiteKernels<double> rite_double;         \
  extern const RiteKernels<BFloat16Bits> rite_bfloat16; \
  }
GAUGE_EXT_EACH_CAPABILITY(GAUGE_EXT_DECLARE_TABLES)
#undef GAUGE_EXT_DECLARE_TABLES

template <>
const RiteKernels<float>& rite_kernels<float>() {
  GAUGE_EXT_CHOOSE(rite_float)
}

template <>
const RiteKernels<double>& rite_kernels<double>() {
  GAUGE_EXT_CHOOSE(rite_double)
}

template <>
const RiteKernels<BFloat16Bits>& rite_kernels<BFloat16Bits>() {
  GAUGE_EXT_CHOOSE(rite_bfloat16)
}

namespace {

// What the first pass finds of a layer: of lora_A's gradients (0) and lora_B's (1) the second
// moments and their inverse roots
struct Found {
  RiteTurns turns;
  double* squares;
  int64_t size;

  double* moment(int factor) const { return squares + 2 * factor * size; }
  double* root(int factor) const { return squares + (2 * factor + 1) * size; }
};

template <typename scalar_t>
std::vector<RiteLayer<scalar_t>> with_state(const std::vector<FactorLayer<scalar_t>>& layers,
                                            const FactorCall& call) {
  using acc_t = typename AccOf<scalar_t>::type;
  std::vector<RiteLayer<scalar_t>> found;
  for (size_t i = 0; i < layers.size(); ++i) {
    found.push_back(
        {layers[i], mutable_data_of<acc_t>(call.frame_A[i]),
         mutable_data_of<acc_t>(call.frame_B[i]), mutable_data_of<double>(call.moment_A[i]),
         mutable_data_of<double>(call.moment_B[i]), mutable_data_of<double>(call.rest[i])});
  }
  return found;
}

}  // namespace

void lora_rite_step(const FactorCall& call, const std::vector<FactorStep>& steps) {
  dispatch_factors(call, [&](auto tag) {
    using scalar_t = decltype(tag);
    const auto factors = collect<scalar_t>(call, /*writes=*/true);
    const auto layers = with_state(factors, call);
    const auto& kernels = rite_kernels<scalar_t>();
    const Whitening whitening(factors, call.damping);
    std::vector<int64_t> starts;
    int64_t total = 0;
    for (const auto& layer : factors) {
      starts.push_back(total);
      total += 3 * rite_square(layer.rank) + 4 * layer.rank * layer.rank;
    }
    const Buffer<double> memory(total);
    const auto found = [&](int64_t i) {
      const int64_t rank = factors[i].rank, size = rite_square(rank);
      double* first = memory.data() + starts[i];
      return Found{{first, first + size, first + 2 * size}, first + 3 * size, rank * rank};
    };
    std::atomic<int64_t> refused = -1;
    whitening.for_each([&](int64_t i, const FactorMetric& metric) {
      const Found f = found(i);
      const int64_t rank = factors[i].rank;
      if (!kernels.measure(layers[i], metric, steps[i], f.turns, f.moment(0), f.moment(1)) ||
          !kernels.inverse_roots(f.moment(0), rank, steps[i], f.root(0)) ||
          !kernels.inverse_roots(f.moment(1), rank, steps[i], f.root(1))) {
        refused = i;
      }
    });
    // Before anything is written
    TORCH_CHECK(refused < 0, "pair ", refused.load(),
                ": grad_A or grad_B holds NaN or infinity, of which there are no second moments. "
                "Leave such a step out, as torch.amp.GradScaler does");
    whitening.for_each([&](int64_t i, const FactorMetric& metric) {
      const Found f = found(i);
      kernels.descend(layers[i], metric, steps[i], f.turns, {f.moment(0), f.root(0)},
                      {f.moment(1), f.root(1)});
    });
  });
}

}  // namespace gauge_ext
