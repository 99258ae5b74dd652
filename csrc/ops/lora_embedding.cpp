#include "ops/lora_embedding.h"

#include <vector>

#include <torch/library.h>

#include "check.h"

namespace gauge_ext {

LoraEmbeddingSizes check_embedding_factors(const at::Tensor& ids,
                                           const at::Tensor& lora_A,
                                           const at::Tensor& lora_B,
                                           std::optional<int64_t> padding_idx) {
  TORCH_CHECK(ids.scalar_type() == at::kLong || ids.scalar_type() == at::kInt,
              "ids must be int64 or int32, got ", ids.scalar_type());
  TORCH_CHECK(lora_A.dim() == 2, "lora_A must have shape [r, vocab], got ", lora_A.sizes());
  const int64_t rank = lora_A.size(0), vocab = lora_A.size(1);
  TORCH_CHECK(lora_B.dim() == 2 && lora_B.size(1) == rank, "lora_B must have shape [dim, r] = [*, ",
              rank, "] to fit lora_A ", lora_A.sizes(), ", got ", lora_B.sizes());
  TORCH_CHECK(lora_B.scalar_type() == lora_A.scalar_type(), "lora_B must have lora_A's dtype, ",
              lora_A.scalar_type(), ", got ", lora_B.scalar_type());
  TORCH_CHECK(lora_B.device() == lora_A.device() && ids.device() == lora_A.device(),
              "ids and lora_B must be on lora_A's device, ", lora_A.device(), ", got ",
              ids.device(), " and ", lora_B.device());
  TORCH_CHECK(!padding_idx.has_value() || (*padding_idx >= 0 && *padding_idx < vocab),
              "padding_idx must be in [0, ", vocab, ") or None, got ", padding_idx.value_or(-1));
  return {ids.numel(), vocab, lora_B.size(0), rank};
}

LoraEmbeddingSizes check_lora_embedding(const at::Tensor& ids,
                                        const at::Tensor& weight,
                                        const at::Tensor& lora_A,
                                        const at::Tensor& lora_B,
                                        std::optional<int64_t> padding_idx) {
  TORCH_CHECK(weight.dim() == 2, "weight must have shape [vocab, dim], got ", weight.sizes());
  TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == weight.size(0),
              "lora_A must have shape [r, vocab] = [*, ", weight.size(0), "] to fit weight ",
              weight.sizes(), ", got ", lora_A.sizes());
  check_matrix(lora_B, "lora_B", "[dim, r]", weight.size(1), lora_A.size(0));
  TORCH_CHECK(lora_A.scalar_type() == weight.scalar_type() || lora_A.scalar_type() == at::kFloat,
              "lora_A must have weight's dtype, ", weight.scalar_type(), ", or float32, got ",
              lora_A.scalar_type());
  TORCH_CHECK(lora_A.device() == weight.device(), "lora_A must be on weight's device, ",
              weight.device(), ", got ", lora_A.device());
  return check_embedding_factors(ids, lora_A, lora_B, padding_idx);
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "lora_embedding(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, float scaling, "
      "int? padding_idx=None) -> Tensor",
      tags);
  // (grad_A, grad_B); one that is not wanted comes back with no elements.
  m.def(
      "lora_embedding_backward(Tensor grad, Tensor ids, Tensor lora_A, Tensor lora_B, "
      "float scaling, int? padding_idx, bool needs_A, bool needs_B) -> (Tensor, Tensor)",
      tags);
}

}  // namespace gauge_ext
