#include "ops/cpu/lora_rite.h"

#include <atomic>
#include <map>
#include <tuple>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linalg_eigh.h>

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

using at::Tensor;

// The second moments of all layers, two each, those of one rank together for their eigenvectors.
class Moments {
 public:
  template <typename scalar_t>
  explicit Moments(const std::vector<FactorLayer<scalar_t>>& layers) {
    for (const auto& layer : layers) {
      Batch& batch = batches_[layer.rank];
      places_.push_back({&batch, batch.count});
      batch.count += 2;
    }
    for (auto& [rank, batch] : batches_) {
      batch.rank = rank;
      batch.values = at::empty({batch.count, rank, rank}, at::kDouble);
      batch.data = batch.values.template mutable_data_ptr<double>();
    }
  }

  // Those of lora_A's gradients (0) or lora_B's (1)
  double* of(int64_t layer, int64_t factor) const {
    const auto [batch, first] = places_[layer];
    return batch->data + (first + factor) * batch->rank * batch->rank;
  }

  void diagonalize() {
    for (auto& [rank, batch] : batches_) {
      auto [eigenvalues, eigenvectors] = at::linalg_eigh(batch.values);
      batch.eigenvalues = eigenvalues.contiguous();
      batch.eigenvectors = eigenvectors.mT().contiguous();
    }
  }

  RiteMoment moment(int64_t layer, int64_t factor) const {
    const auto [batch, first] = places_[layer];
    const int64_t at = first + factor, rank = batch->rank;
    return {of(layer, factor), batch->eigenvalues.const_data_ptr<double>() + at * rank,
            batch->eigenvectors.const_data_ptr<double>() + at * rank * rank};
  }

 private:
  struct Batch {
    int64_t rank = 0, count = 0;
    Tensor values, eigenvalues, eigenvectors;
    double* data = nullptr;
  };
  std::map<int64_t, Batch> batches_;  // whose elements stay where they are
  std::vector<std::pair<const Batch*, int64_t>> places_;
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
    Moments moments(factors);
    std::vector<int64_t> starts;
    int64_t total = 0;
    for (const auto& layer : factors) {
      starts.push_back(total);
      total += 3 * rite_square(layer.rank);
    }
    const Buffer<double> memory(total);
    const auto turns = [&](int64_t i) {
      const int64_t size = rite_square(factors[i].rank);
      double* first = memory.data() + starts[i];
      return RiteTurns{first, first + size, first + 2 * size};
    };
    std::atomic<int64_t> refused = -1;
    whitening.for_each([&](int64_t i, const FactorMetric& metric) {
      if (!kernels.measure(layers[i], metric, steps[i], turns(i), moments.of(i, 0),
                           moments.of(i, 1))) {
        refused = i;
      }
    });
    // Before anything is written
    TORCH_CHECK(refused < 0, "pair ", refused.load(),
                ": grad_A or grad_B holds NaN or infinity, of which there are no second moments. "
                "Leave such a step out, as torch.amp.GradScaler does");
    moments.diagonalize();
    whitening.for_each([&](int64_t i, const FactorMetric& metric) {
      kernels.descend(layers[i], metric, steps[i], turns(i), moments.moment(i, 0),
                      moments.moment(i, 1));
    });
  });
}

}  // namespace gauge_ext
