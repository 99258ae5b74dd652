#include "blocks/bindings.h"

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>

#include "blocks/requantize.h"

namespace gauge_ext {
namespace {

namespace py = pybind11;

template <typename... T>
[[noreturn]] void refuse(const T&... parts) {
  std::string message;
  (message.append(parts), ...);
  throw py::value_error(message);
}

// The memory of whatever has the buffer protocol, in C order, for as long as this lives.
class Memory {
 public:
  Memory(const py::object& owner, const char* name, bool writable = false) : name_(name) {
    const int flags = PyBUF_ND | PyBUF_FORMAT | (writable ? PyBUF_WRITABLE : 0);
    if (PyObject_GetBuffer(owner.ptr(), &view_, flags) != 0) {
      throw py::error_already_set();
    }
  }
  ~Memory() { PyBuffer_Release(&view_); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;

  uint8_t* bytes() const { return static_cast<uint8_t*>(view_.buf); }
  int64_t size(int axis) const { return view_.shape[axis]; }

  // Fails unless it has so many axes of numbers of this type.
  template <typename T>
  const T* numbers(int axes, const std::string& format) const {
    if (view_.ndim != axes || format != view_.format) {
      refuse(name_, " must have ", std::to_string(axes), " axes of '", format, "', got ",
             std::to_string(view_.ndim), " of '", view_.format, "'");
    }
    return static_cast<const T*>(view_.buf);
  }

  uint8_t* expect_bytes(int64_t count) const {
    if (view_.len != count) {
      refuse(name_, " must have ", std::to_string(count), " bytes, got ",
             std::to_string(view_.len));
    }
    return bytes();
  }

 private:
  Py_buffer view_;
  const char* name_;
};

ScaleFormat scale_format(const std::string& name) {
  if (name == "float32") {
    return ScaleFormat::kFloat32;
  }
  if (name == "float16") {
    return ScaleFormat::kFloat16;
  }
  if (name == "bfloat16") {
    return ScaleFormat::kBFloat16;
  }
  refuse("scale_format must be float32, float16 or bfloat16, got ", name);
}

py::tuple requantize_rows(const py::object& codes,
                          const py::object& scales,
                          const py::object& zero_points,
                          const py::object& left,
                          const py::object& right,
                          const py::object& magnitude,
                          int bits,
                          int64_t block_size,
                          const std::string& format,
                          bool packed_zero_points) {
  if (bits != 4 && bits != 8) {
    refuse("bits must be 4 or 8, got ", std::to_string(bits));
  }
  if (block_size < 16 || (block_size & (block_size - 1)) != 0) {
    refuse("block_size must be a power of two, at least 16, got ", std::to_string(block_size));
  }
  const Memory rows_left(left, "left"), rows_right(right, "right");
  BlockRows weight{};
  weight.bits = bits;
  weight.block_size = block_size;
  weight.format = scale_format(format);
  weight.left = rows_left.numbers<float>(2, "f");
  weight.right = rows_right.numbers<float>(2, "f");
  weight.rows = rows_left.size(0);
  weight.rank = rows_left.size(1);
  weight.columns = rows_right.size(1);
  if (weight.rank < 1 || weight.columns < 1 || weight.rank != rows_right.size(0)) {
    refuse("left and right must be (rows, r) and (r, columns), r and columns at least 1, got (",
           std::to_string(weight.rows), ", ", std::to_string(weight.rank), ") and (",
           std::to_string(rows_right.size(0)), ", ", std::to_string(weight.columns), ")");
  }
  if (!zero_points.is_none()) {
    weight.zeros = packed_zero_points ? ZeroPoints::kCodes : ZeroPoints::kNumbers;
  }
  const int64_t blocks = weight.rows * weight.blocks();
  const Memory held_codes(codes, "codes", true), held_scales(scales, "scales", true);
  weight.codes = held_codes.expect_bytes(blocks * weight.block_bytes());
  weight.scales = held_scales.expect_bytes(blocks * weight.scale_bytes());
  std::unique_ptr<Memory> held_zeros, held_magnitude;
  if (!zero_points.is_none()) {
    held_zeros = std::make_unique<Memory>(zero_points, "zero_points", true);
    weight.zero_points = held_zeros->expect_bytes(weight.rows * weight.zero_row_bytes());
  }
  if (!magnitude.is_none()) {
    held_magnitude = std::make_unique<Memory>(magnitude, "magnitude");
    weight.magnitude = held_magnitude->numbers<double>(1, "d");
    if (held_magnitude->size(0) != weight.rows) {
      refuse("magnitude must have ", std::to_string(weight.rows), " entries, got ",
             std::to_string(held_magnitude->size(0)));
    }
  }
  BlockSums sums;
  {
    const py::gil_scoped_release release;
    const RequantizeKernels& kernels = requantize_kernels();
    constexpr std::align_val_t kLine{64};
    const auto free_lines = [](unsigned char* memory) { ::operator delete[](memory, kLine); };
    const std::unique_ptr<unsigned char[], decltype(free_lines)> scratch(
        static_cast<unsigned char*>(::operator new[](kernels.scratch_bytes(weight), kLine)));
    sums = kernels.requantize(weight, scratch.get());
  }
  return py::make_tuple(sums.error, sums.moved, sums.total, sums.finite);
}

}  // namespace

void bind_blocks(py::module_& m) {
  m.def("requantize_rows", &requantize_rows, py::kw_only(), py::arg("codes"), py::arg("scales"),
        py::arg("zero_points"), py::arg("left"), py::arg("right"), py::arg("magnitude"),
        py::arg("bits"), py::arg("block_size"), py::arg("scale_format"),
        py::arg("packed_zero_points"),
        "Changes rows of a block-quantized weight in place, see csrc/blocks/requantize.h.");
}

}  // namespace gauge_ext
