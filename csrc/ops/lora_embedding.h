#pragma once

// lora_embedding: y_n = W[t_n] + s·B A[:, t_n] for the token t_n = ids[n]. lora_embedding.cpp holds
// the schema and the checks, lora_embedding_formula.cpp the autograd formula and the same in plain
// ATen; the CPU provides the op and its backward under the dispatcher.

#include <cstdint>
#include <optional>

#include <ATen/core/Tensor.h>

namespace gauge_ext {

struct LoraEmbeddingSizes {
  int64_t rows;   // N, the number of ids
  int64_t vocab;  // rows of the table
  int64_t dim;
  int64_t rank;
};

// Checks the factors and the ids, of whatever table, and returns the sizes.
LoraEmbeddingSizes check_embedding_factors(const at::Tensor& ids,
                                           const at::Tensor& lora_A,
                                           const at::Tensor& lora_B,
                                           std::optional<int64_t> padding_idx);

// Checks every argument of lora_embedding and returns the sizes.
LoraEmbeddingSizes check_lora_embedding(const at::Tensor& ids,
                                        const at::Tensor& weight,
                                        const at::Tensor& lora_A,
                                        const at::Tensor& lora_B,
                                        std::optional<int64_t> padding_idx);

}  // namespace gauge_ext
