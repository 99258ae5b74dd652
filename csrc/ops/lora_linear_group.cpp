#include "ops/lora_linear_group.h"

#include <torch/library.h>

#include "check.h"
#include "ops/rows.h"

namespace gauge_ext {

void check_group_lengths(at::TensorList weights,
                         size_t biases,
                         at::TensorList lora_As,
                         at::TensorList lora_Bs,
                         at::ArrayRef<double> scalings,
                         double dropout_p,
                         at::TensorList seeds) {
  const size_t n = weights.size();
  TORCH_CHECK(n > 0, "weights must have at least one member, got none");
  const auto check_length = [n](const char* name, size_t length) {
    TORCH_CHECK(length == n, name, " must have an entry for each of the ", n, " weights, got ",
                length);
  };
  check_length("biases", biases);
  check_length("lora_As", lora_As.size());
  check_length("lora_Bs", lora_Bs.size());
  check_length("scalings", scalings.size());
  TORCH_CHECK(seeds.size() == n || seeds.size() <= 1,
              "seeds must be none, one for all or one for each of the ", n, " weights, got ",
              seeds.size());
  TORCH_CHECK(dropout_p == 0.0 || !seeds.empty(),
              "seeds must hold a 0-dim int64 tensor where dropout_p > 0, got none");
}

std::vector<LoraLinearSizes> check_lora_linear_group(const at::Tensor& x,
                                                     at::TensorList weights,
                                                     const OptionalTensors* biases,
                                                     at::TensorList lora_As,
                                                     at::TensorList lora_Bs,
                                                     at::ArrayRef<double> scalings,
                                                     double dropout_p,
                                                     at::TensorList seeds) {
  check_group_lengths(weights, biases != nullptr ? biases->size() : weights.size(), lora_As,
                      lora_Bs, scalings, dropout_p, seeds);
  std::vector<LoraLinearSizes> sizes;
  for (size_t i = 0; i < weights.size(); ++i) {
    const auto bias = biases != nullptr ? biases->get(i) : std::nullopt;
    sizes.push_back(check_lora_linear(x, weights[i], bias, lora_As[i], lora_Bs[i], dropout_p,
                                      seed_of(seeds, i)));
  }
  return sizes;
}

void check_lora_linear_group_grads(at::TensorList grads,
                                   at::TensorList hiddens,
                                   const at::Tensor& x,
                                   const std::vector<LoraLinearSizes>& sizes) {
  TORCH_CHECK(grads.size() == sizes.size() && hiddens.size() == sizes.size(),
              "grads and hiddens must have an entry for each of the ", sizes.size(),
              " weights, got ", grads.size(), " and ", hiddens.size());
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto& n = sizes[i];
    check_grad(grads[i], "each of grads", x, n.rows, n.out_features);
    check_matrix(hiddens[i], "each of hiddens", "[N, r]", n.rows, n.rank);
  }
}

std::optional<at::Tensor> seed_of(at::TensorList seeds, size_t member) {
  if (seeds.empty()) {
    return std::nullopt;
  }
  return seeds.size() == 1 ? seeds[0] : seeds[member];
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_linear_group(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, "
      "Tensor[] lora_Bs, float[] scalings, float dropout_p, Tensor[] seeds) -> Tensor[]",
      tags);
  // (ys, hiddens), as of lora_linear_forward
  m.def(
      "lora_linear_group_forward(Tensor x, Tensor[] weights, Tensor?[] biases, Tensor[] lora_As, "
      "Tensor[] lora_Bs, float[] scalings, float dropout_p, Tensor[] seeds) -> "
      "(Tensor[], Tensor[])",
      tags);
  // (grad_x, grad_As, grad_Bs); those that are not wanted come back with no elements.
  m.def(
      "lora_linear_group_backward(Tensor[] grads, Tensor x, Tensor[] weights, Tensor[] lora_As, "
      "Tensor[] lora_Bs, Tensor[] hiddens, float[] scalings, float dropout_p, Tensor[] seeds, "
      "bool needs_x, bool needs_factors) -> (Tensor, Tensor[], Tensor[])",
      tags);
}

}  // namespace gauge_ext
