#include "ops/cpu/gemm.h"

#include <algorithm>
#include <limits>

#include <dlfcn.h>

#include <ATen/core/Tensor.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>

namespace gauge_ext {
namespace {

template <typename T>
using BlasGemm = void(const char*,
                      const char*,
                      const int*,
                      const int*,
                      const int*,
                      const T*,
                      const T*,
                      const int*,
                      const T*,
                      const int*,
                      const T*,
                      T*,
                      const int*);

// The function that torch's own products end in, or null where it is not to be had by name: it is
// looked for in libtorch_cpu and what that is linked to, and nowhere else.
template <typename T>
BlasGemm<T>* blas_gemm() {
  static BlasGemm<T>* const found = []() -> BlasGemm<T>* {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    if (torch == nullptr) {
      return nullptr;
    }
    const char* name = std::is_same_v<T, float> ? "sgemm_" : "dgemm_";
    return reinterpret_cast<BlasGemm<T>*>(dlsym(torch, name));
  }();
  return found;
}

template <typename T>
void aten_gemm(int64_t rows,
               int64_t columns,
               int64_t inner,
               const T* a,
               int64_t a_stride,
               Strided<T> b,
               bool add,
               T* c,
               int64_t c_stride) {
  const auto options = at::TensorOptions().dtype(c10::CppTypeToScalarType<T>());
  const auto left = at::from_blob(const_cast<T*>(a), {rows, inner}, {a_stride, 1}, options);
  const auto right = at::from_blob(const_cast<T*>(b.data), {inner, columns},
                                   {b.row_stride, b.column_stride}, options);
  auto out = at::from_blob(c, {rows, columns}, {c_stride, 1}, options);
  if (add) {
    out.addmm_(left, right);
  } else {
    at::mm_out(out, left, right);
  }
}

}  // namespace

template <typename T>
void gemm(int64_t rows,
          int64_t columns,
          int64_t inner,
          const T* a,
          int64_t a_stride,
          Strided<T> b,
          bool add,
          T* c,
          int64_t c_stride) {
  if (rows == 0 || columns == 0) {
    return;
  }
  const int64_t b_stride = std::max(b.row_stride, b.column_stride);
  const int64_t largest = std::max({rows, columns, inner, a_stride, b_stride, c_stride});
  BlasGemm<T>* const blas = blas_gemm<T>();
  if (inner == 0 || blas == nullptr || largest > std::numeric_limits<int>::max()) {
    aten_gemm(rows, columns, inner, a, a_stride, b, add, c, c_stride);
    return;
  }
  // BLAS counts by columns: what it is told is Cᵀ = Bᵀ Aᵀ.
  const bool by_columns = b.column_stride != 1 || (columns == 1 && b.row_stride == 1);
  const char left = by_columns ? 'T' : 'N';
  const char right = 'N';
  const int m = static_cast<int>(columns), n = static_cast<int>(rows), k = static_cast<int>(inner);
  const auto leading = [](int64_t stride, int64_t least) {
    return static_cast<int>(std::max({stride, least, int64_t(1)}));
  };
  const int lda = by_columns ? leading(b.column_stride, inner) : leading(b.row_stride, columns);
  const int ldb = leading(a_stride, inner), ldc = leading(c_stride, columns);
  const T one = 1, beta = add ? 1 : 0;
  blas(&left, &right, &m, &n, &k, &one, b.data, &lda, a, &ldb, &beta, c, &ldc);
}

template void gemm<float>(int64_t,
                          int64_t,
                          int64_t,
                          const float*,
                          int64_t,
                          Strided<float>,
                          bool,
                          float*,
                          int64_t);
template void gemm<double>(int64_t,
                           int64_t,
                           int64_t,
                           const double*,
                           int64_t,
                           Strided<double>,
                           bool,
                           double*,
                           int64_t);

}  // namespace gauge_ext
