#pragma once

// What the CPU implementations share: how rows are cut among threads, scratch memory, dtypes.

#include <algorithm>
#include <cstdint>
#include <optional>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <c10/core/CPUAllocator.h>

#include "math/dropout.h"
#include "ops/cpu/low_rank.h"

namespace gauge_ext {

// Rows are cut into at most one piece a thread; the pieces depend on sizes and thread count alone,
// so that sums over pieces, taken in order, come out the same each time.
struct Pieces {
  int64_t rows;
  int64_t size;
  int64_t count;

  Pieces(int64_t rows, int64_t work_per_row) : rows(rows) {
    // Below about this many multiply-adds a second thread costs more than it brings.
    constexpr int64_t kGrain = 1 << 16;
    const int64_t worthwhile = std::max<int64_t>(rows * work_per_row / kGrain, 1);
    const int64_t wanted = std::min<int64_t>({at::get_num_threads(), worthwhile, rows});
    size = wanted > 0 ? (rows + wanted - 1) / wanted : 0;
    count = size > 0 ? (rows + size - 1) / size : 0;
  }

  // body(piece, first row, rows of the piece)
  template <typename F>
  void run(const F& body) const {
    if (count == 1) {
      body(int64_t(0), int64_t(0), rows);
      return;
    }
    at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t first = piece * size;
        body(piece, first, std::min(size, rows - first));
      }
    });
  }
};

// Memory for the length of a call, straight from torch's allocator.
template <typename T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t count)
      : memory_(c10::GetCPUAllocator()->allocate(static_cast<size_t>(count) * sizeof(T))) {}

  T* data() const { return static_cast<T*>(memory_.get()); }

 private:
  c10::DataPtr memory_;
};

// Calls body with a value of the storage type that stands for the tensor's dtype. `name` is what
// the reader calls the tensor, `advice` what an error ends with.
template <typename F>
auto dispatch_dtype(const at::Tensor& tensor, const char* name, const char* advice, const F& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(float());
    case at::kDouble:
      return body(double());
    case at::kBFloat16:
      return body(BFloat16Bits());
    default:
      TORCH_CHECK(false, name, " must be float32, float64 or bfloat16 on the CPU, got ",
                  tensor.scalar_type(), advice);
  }
}

template <typename F>
auto dispatch_dtype(const at::Tensor& x, const F& body) {
  return dispatch_dtype(x, "x", "; convert the model, for example with model.float()", body);
}

// The same for a tensor that is stored as float16 too.
template <typename F>
auto dispatch_storage(const at::Tensor& tensor, const char* name, const F& body) {
  switch (tensor.scalar_type()) {
    case at::kFloat:
      return body(float());
    case at::kDouble:
      return body(double());
    case at::kBFloat16:
      return body(BFloat16Bits());
    case at::kHalf:
      return body(Float16Bits());
    default:
      TORCH_CHECK(false, name, " must be float32, float64, bfloat16 or float16, got ",
                  tensor.scalar_type());
  }
}

template <typename scalar_t>
constexpr at::ScalarType acc_dtype() {
  return std::is_same_v<scalar_t, double> ? at::kDouble : at::kFloat;
}

template <typename scalar_t>
const scalar_t* data_of(const at::Tensor& tensor) {
  return static_cast<const scalar_t*>(tensor.const_data_ptr());
}

template <typename scalar_t>
scalar_t* mutable_data_of(const at::Tensor& tensor) {
  return static_cast<scalar_t*>(tensor.mutable_data_ptr());
}

inline Dropout make_dropout(double dropout_p, const std::optional<at::Tensor>& seed) {
  return dropout_p > 0.0 ? Dropout::make(dropout_p, static_cast<uint64_t>(seed->item<int64_t>()))
                         : Dropout();
}

}  // namespace gauge_ext
