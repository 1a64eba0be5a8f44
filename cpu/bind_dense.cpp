// Python's view of the product with a dense matrix.
#include "bind.h"
#include "dense.h"

namespace nb = nanobind;

namespace compress {
namespace {

void dense_few(uintptr_t weight, int32_t weight_type, int64_t rows, int64_t columns, uintptr_t x, int32_t x_type,
               int64_t x_stride, int64_t tokens, uintptr_t y, int32_t y_type, int64_t y_stride, int threads) {
  require(is_float(weight_type) && is_float(x_type) && is_float(y_type),
          "types must be 1 (f32), 2 (bf16) or 3 (f16), got " + std::to_string(weight_type) + ", " +
              std::to_string(x_type) + ", " + std::to_string(y_type));
  require_positive(rows, "rows");
  require_positive(columns, "columns");
  require_positive(tokens, "tokens");
  require(weight && x && y, "an address is missing");
  require(tokens == 1 || (x_stride >= columns && y_stride >= rows), "rows of x or y overlap");
  const DenseWeight dense{as_pointer<const void>(weight), static_cast<Type>(weight_type), rows, columns};
  const Rows from{as_pointer<void>(x), static_cast<Type>(x_type), x_stride};
  const Rows to{as_pointer<void>(y), static_cast<Type>(y_type), y_stride};
  nb::gil_scoped_release release;
  multiply_dense(dense, from, tokens, to, threads);
}

}  // namespace

void bind_dense(nb::module_& module) {
  module.def("dense_few", &dense_few,
             "weight, weight_type, rows, columns, x, x_type, x_stride, tokens, y, y_type, y_stride, threads: "
             "y = x W^T for few tokens.");
}

}  // namespace compress
