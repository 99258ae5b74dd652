#include "ops/merge.h"

#include <string>

#include <torch/library.h>

#include "check.h"

namespace gauge_ext {
namespace {

// Rows of a panel may lie apart, entries of a row may not.
void check_rows(const at::Tensor& tensor, const std::string& name) {
  TORCH_CHECK(tensor.dim() == 2, name, " must have shape [out, in], got ", tensor.sizes(),
              "; of a convolution's weight, pass weight.flatten(1)");
  TORCH_CHECK(tensor.numel() == 0 || tensor.size(1) == 1 || tensor.stride(1) == 1, name,
              " must have its last dimension contiguous, got strides ", tensor.strides(),
              "; of a transposed weight, pass weight.t() with transposed=True");
}

// Checks the i-th arguments and returns the sizes.
MergeSizes check_weight(size_t i,
                        const at::Tensor& out,
                        const at::Tensor& weight,
                        const at::Tensor& lora_A,
                        const at::Tensor& lora_B,
                        bool transposed,
                        bool stochastic) {
  const auto named = [&](const char* name) { return name + ("[" + std::to_string(i) + "]"); };
  check_rows(weight, named("weight"));
  check_rows(out, named("out"));
  TORCH_CHECK(out.sizes() == weight.sizes() && out.scalar_type() == weight.scalar_type(),
              named("out"), " must have the weight's shape and dtype, ", weight.sizes(), " and ",
              weight.scalar_type(), ", got ", out.sizes(), " and ", out.scalar_type());
  TORCH_CHECK(!out.is_alias_of(weight) || out.data_ptr() == weight.data_ptr(), named("out"),
              " must be the weight itself or share no memory with it");
  const int64_t out_features = weight.size(transposed ? 1 : 0);
  const int64_t in_features = weight.size(transposed ? 0 : 1);
  TORCH_CHECK(lora_A.dim() == 2 && lora_A.size(1) == in_features, named("lora_A"),
              " must have shape [r, in] = [*, ", in_features, "], got ", lora_A.sizes());
  const int64_t rank = lora_A.size(0);
  check_matrix(lora_B, named("lora_B").c_str(), "[out, r]", out_features, rank);
  for (const auto* factor : {&lora_A, &lora_B}) {
    TORCH_CHECK(at::isFloatingType(factor->scalar_type()),
                "the factors must be floating-point, got ", factor->scalar_type());
    check_same_device(*factor, named(factor == &lora_A ? "lora_A" : "lora_B").c_str(), weight);
  }
  TORCH_CHECK(
      !stochastic || weight.scalar_type() == at::kBFloat16 || weight.scalar_type() == at::kHalf,
      "seed asks for stochastic rounding, which is for bfloat16 and float16 weights; got ",
      weight.scalar_type(), " in ", named("weight"));
  return {weight.size(0), weight.size(1), rank};
}

}  // namespace

std::vector<MergeSizes> check_merge(at::TensorList out,
                                    at::TensorList weight,
                                    at::TensorList lora_A,
                                    at::TensorList lora_B,
                                    at::ArrayRef<double> scaling,
                                    const c10::List<bool>& transposed,
                                    const std::optional<at::Tensor>& seed,
                                    int64_t first_row) {
  const auto check_length = [&](const char* name, size_t length) {
    TORCH_CHECK(length == weight.size(), name, " must have one entry for each of the ",
                weight.size(), " weights, got ", length);
  };
  check_length("out", out.size());
  check_length("lora_A", lora_A.size());
  check_length("lora_B", lora_B.size());
  check_length("scaling", scaling.size());
  check_length("transposed", transposed.size());
  if (seed.has_value()) {
    TORCH_CHECK(seed->dim() == 0 && seed->scalar_type() == at::kLong,
                "seed must be a 0-dim int64 tensor, got ", seed->scalar_type(), " of shape ",
                seed->sizes());
  }
  TORCH_CHECK(first_row >= 0, "first_row must not be negative, got ", first_row);
  std::vector<MergeSizes> sizes;
  for (size_t i = 0; i < weight.size(); ++i) {
    sizes.push_back(
        check_weight(i, out[i], weight[i], lora_A[i], lora_B[i], transposed[i], seed.has_value()));
  }
  return sizes;
}

MergeFactors::MergeFactors(const at::Tensor& lora_A,
                           const at::Tensor& lora_B,
                           double scaling,
                           bool transposed,
                           at::ScalarType dtype)
    : left((transposed ? lora_A.t() : lora_B).to(dtype).mul(scaling).contiguous()),
      right((transposed ? lora_B.t() : lora_A).to(dtype).contiguous()) {}

void mark_written(const at::Tensor& out) {
  if (!out.is_inference()) {
    out.unsafeGetTensorImpl()->bump_version();
  }
}

TORCH_LIBRARY_FRAGMENT(gauge_ext, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def(
      "merge_(Tensor(a!)[] weight, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, "
      "bool[] transposed, Tensor? seed=None, int first_row=0, bool fidelity=False) -> Tensor",
      tags);
  m.def(
      "merge_out(Tensor[] weight, Tensor[] lora_A, Tensor[] lora_B, float[] scaling, "
      "bool[] transposed, Tensor? seed=None, int first_row=0, bool fidelity=False, *, "
      "Tensor(a!)[] out) -> Tensor",
      tags);
}

}  // namespace gauge_ext
