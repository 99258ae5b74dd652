#pragma once

// What every op on CUDA tensors does before it launches: the device, the stream, types and memory.
// Nothing here waits for the device, so that every call can be captured into a graph.

#include <optional>
#include <type_traits>

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "ops/cuda/low_rank.h"

namespace gauge_ext::cuda {

// Makes x's device the current one, if the kernels can run there.
inline c10::cuda::CUDAGuard guard_of(const at::Tensor& x) {
  int major = 0, minor = 0;
  const int device = x.device().index();
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
  TORCH_CHECK(
      major >= 8,
      "gauge_ext's CUDA kernels need a GPU of compute capability 8.0 or newer, whose tensor "
      "cores know tf32; ",
      x.device(), " has ", major, ".", minor,
      ". Move the model to the CPU, or build gauge_ext with GAUGE_EXT_CUDA=0, which runs "
      "plain torch on the GPU");
  return c10::cuda::CUDAGuard(x.device());
}

inline Stream current_stream() {
  return c10::cuda::getCurrentCUDAStream();
}

template <typename T>
struct Tag {
  using type = T;
};

// Calls body with the tensor's storage type, as a Tag.
template <typename F>
auto dispatch(const at::Tensor& tensor, const char* name, const F& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(Tag<float>());
    case at::kDouble:
      return body(Tag<double>());
    case at::kBFloat16:
      return body(Tag<BFloat16Bits>());
    case at::kHalf:
      return body(Tag<Float16Bits>());
    default:
      TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16 on CUDA, got ",
                  tensor.scalar_type());
  }
}

inline Type type_of(const at::Tensor& factor) {
  return dispatch(factor, "a factor", [](auto tag) {
    using T = typename decltype(tag)::type;
    return std::is_same_v<T, float>          ? Type::kFloat
           : std::is_same_v<T, double>       ? Type::kDouble
           : std::is_same_v<T, BFloat16Bits> ? Type::kBFloat16
                                             : Type::kFloat16;
  });
}

template <typename acc_t>
constexpr at::ScalarType acc_dtype() {
  return std::is_same_v<acc_t, double> ? at::kDouble : at::kFloat;
}

template <typename T>
const T* data_of(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data_of(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

template <typename scalar_t>
Matrix<const scalar_t> matrix(const at::Tensor& rows) {
  return {data_of<scalar_t>(rows), rows.size(0), rows.size(1)};
}

// A factor, or the gradient of one, as (r, columns)
inline Factor<const void> factor(const at::Tensor& tensor) {
  return {tensor.const_data_ptr(), type_of(tensor), tensor.stride(0), tensor.stride(1)};
}
inline Factor<void> mutable_factor(const at::Tensor& tensor) {
  return {tensor.mutable_data_ptr(), type_of(tensor), tensor.stride(0), tensor.stride(1)};
}

// A seed on the host goes along with the launch; one on the device is read there.
struct SeedSource {
  uint64_t value = 0;
  const int64_t* device = nullptr;
};
inline SeedSource seed_source(const at::Tensor& x, const std::optional<at::Tensor>& seed) {
  if (!seed.has_value()) {
    return {};
  }
  TORCH_CHECK(seed->is_cpu() || seed->device() == x.device(),
              "seed must be on the CPU or on x's device, ", x.device(), ", got ", seed->device());
  if (seed->is_cpu()) {
    return {static_cast<uint64_t>(seed->item<int64_t>()), nullptr};
  }
  return {0, seed->const_data_ptr<int64_t>()};
}

inline DropoutSource make_dropout(const at::Tensor& x,
                                  double dropout_p,
                                  const std::optional<at::Tensor>& seed) {
  DropoutSource source;
  if (dropout_p > 0.0) {
    const SeedSource from = seed_source(x, seed);
    source.dropout = Dropout::make(dropout_p, from.value);
    source.seed = from.device;
  }
  return source;
}

}  // namespace gauge_ext::cuda
