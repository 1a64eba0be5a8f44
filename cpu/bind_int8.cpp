// Python's view of the int8 kernels: quantize_rows, int8_matmul, int8_linear.
#include "bind.h"
#include "int8.h"

namespace nb = nanobind;

namespace compress {
namespace {

void require_aligned(uintptr_t address, uintptr_t width, const char* name) {
  require(address % width == 0, std::string(name) + " must be at an address that is a multiple of " +
                                    std::to_string(width) + ", got " + std::to_string(address));
}

Rows make_values(uintptr_t data, int32_t type, int64_t stride, int64_t width, int64_t count, const char* name) {
  const std::string word(name);
  require(is_float(type), word + " must be f32, bf16 or f16, got type " + std::to_string(type));
  require(data != 0, word + " has no memory");
  require_aligned(data, type == static_cast<int32_t>(Type::f32) ? 4 : 2, name);
  require(count == 1 || stride >= width, word + "'s rows of " + std::to_string(width) + " overlap: they are " +
                                             std::to_string(stride) + " elements apart");
  return {as_pointer<void>(data), static_cast<Type>(type), stride};
}

void require_columns(int64_t columns) {
  require(columns > 0 && columns <= INT8_COLUMNS, "columns must be 1.." + std::to_string(INT8_COLUMNS) +
                                                      " (sums are int32), got " + std::to_string(columns));
}

Int8Weight make_weight(uintptr_t codes, uintptr_t scale, uintptr_t sums, int64_t rows, int64_t columns) {
  require_positive(rows, "rows");
  require_columns(columns);
  require(codes && scale && sums, "codes, scale and sums must have memory");
  require_aligned(scale, 4, "scale");
  require_aligned(sums, 4, "sums");
  return {as_pointer<const int8_t>(codes), as_pointer<const float>(scale), as_pointer<const int32_t>(sums), nullptr,
          rows, columns};
}

void require_index(uintptr_t index, int64_t count, int64_t columns) {
  require(count >= 0 && (count == 0 || index), "outlier_index has no memory for " + std::to_string(count));
  require_aligned(index, 8, "outlier_index");
  const int64_t* feature = as_pointer<const int64_t>(index);
  for (int64_t j = 0; j < count; ++j) {
    if (feature[j] < 0 || feature[j] >= columns)
      require(false, "outlier_index[" + std::to_string(j) + "] must be in 0.." + std::to_string(columns - 1) +
                         ", got " + std::to_string(feature[j]));
    if (j > 0 && feature[j - 1] >= feature[j])
      require(false, "outlier_index must ascend, got " + std::to_string(feature[j - 1]) + " before " +
                         std::to_string(feature[j]));
  }
}

Int8Outliers make_outliers(uintptr_t flags, uintptr_t index, int64_t count, uintptr_t weight, int32_t weight_type,
                           int64_t columns) {
  require_index(index, count, columns);
  require(count == 0 || (weight && is_float(weight_type)),
          "outlier_weight must be f32, bf16 or f16, got type " + std::to_string(weight_type));
  require_aligned(weight, weight_type == static_cast<int32_t>(Type::f32) ? 4 : 2, "outlier_weight");
  return {as_pointer<const uint8_t>(flags), as_pointer<const int64_t>(index), count, as_pointer<const void>(weight),
          static_cast<Type>(weight_type)};
}

void require_bias(uintptr_t bias, int32_t type) {
  require(!bias || is_float(type), "bias must be f32, bf16 or f16, got type " + std::to_string(type));
  require_aligned(bias, type == static_cast<int32_t>(Type::f32) ? 4 : 2, "bias");
}

int64_t bind_quantize_rows(uintptr_t x, int32_t x_type, int64_t x_stride, int64_t tokens, int64_t columns,
                           float threshold, uintptr_t index, int64_t count, uintptr_t q, uintptr_t row_scale,
                           uintptr_t flags, int threads) {
  require_positive(tokens, "tokens");
  require_columns(columns);
  require(threshold >= 0.0f, "threshold must not be negative, got " + std::to_string(threshold));
  const Rows from = make_values(x, x_type, x_stride, columns, tokens, "x");
  require_index(index, count, columns);
  require(q && row_scale && flags, "q, scale and outliers must have memory");
  require_aligned(row_scale, 4, "scale");
  nb::gil_scoped_release release;
  return quantize_rows(from, tokens, columns, threshold, as_pointer<const int64_t>(index), count,
                       as_pointer<int8_t>(q), as_pointer<float>(row_scale), as_pointer<uint8_t>(flags), threads);
}

void bind_matmul(uintptr_t codes, uintptr_t scale, uintptr_t sums, int64_t rows, int64_t columns, uintptr_t q,
                 uintptr_t row_scale, int64_t tokens, uintptr_t x, int32_t x_type, int64_t x_stride, uintptr_t flags,
                 uintptr_t index, int64_t count, uintptr_t outlier_weight, int32_t outlier_type, uintptr_t bias,
                 int32_t bias_type, uintptr_t y, int32_t y_type, int64_t y_stride, int threads) {
  const Int8Weight weight = make_weight(codes, scale, sums, rows, columns);
  require_positive(tokens, "tokens");
  require(q && row_scale, "q and row_scale must have memory");
  require_aligned(row_scale, 4, "row_scale");
  const Rows from = flags ? make_values(x, x_type, x_stride, columns, tokens, "x") : Rows{nullptr, Type::none, 0};
  const Int8Outliers outliers = make_outliers(flags, index, count, outlier_weight, outlier_type, columns);
  require_bias(bias, bias_type);
  const Rows to = make_values(y, y_type, y_stride, rows, tokens, "y");
  nb::gil_scoped_release release;
  multiply_int8(weight, as_pointer<const int8_t>(q), as_pointer<const float>(row_scale), tokens, from, outliers,
                as_pointer<const void>(bias), static_cast<Type>(bias_type), to, threads);
}

int64_t bind_linear(uintptr_t codes, uintptr_t scale, uintptr_t sums, int64_t rows, int64_t columns, uintptr_t x,
                    int32_t x_type, int64_t x_stride, int64_t tokens, float threshold, uintptr_t index, int64_t count,
                    uintptr_t outlier_weight, int32_t outlier_type, uintptr_t bias, int32_t bias_type, uintptr_t y,
                    int32_t y_type, int64_t y_stride, int threads) {
  const Int8Weight weight = make_weight(codes, scale, sums, rows, columns);
  require_positive(tokens, "tokens");
  require(threshold >= 0.0f, "threshold must not be negative, got " + std::to_string(threshold));
  const Rows from = make_values(x, x_type, x_stride, columns, tokens, "x");
  const Int8Outliers outliers = make_outliers(0, index, count, outlier_weight, outlier_type, columns);
  require_bias(bias, bias_type);
  const Rows to = make_values(y, y_type, y_stride, rows, tokens, "y");
  nb::gil_scoped_release release;
  return linear_int8(weight, from, tokens, threshold, outliers, as_pointer<const void>(bias),
                     static_cast<Type>(bias_type), to, threads);
}

}  // namespace

void bind_int8(nb::module_& module) {
  module.def("quantize_rows", &bind_quantize_rows,
             "x, x_type, x_stride, tokens, columns, threshold, outlier_index, count, q, scale, outliers, threads: "
             "rows as int8; the first row that holds NaN or infinity, or -1.");
  module.def("int8_matmul", &bind_matmul,
             "codes, scale, sums, rows, columns, q, row_scale, tokens, x, x_type, x_stride, outliers, outlier_index, "
             "count, outlier_weight, outlier_type, bias, bias_type, y, y_type, y_stride, threads.");
  module.def("int8_linear", &bind_linear,
             "codes, scale, sums, rows, columns, x, x_type, x_stride, tokens, threshold, outlier_index, count, "
             "outlier_weight, outlier_type, bias, bias_type, y, y_type, y_stride, threads: both in one; returns as "
             "quantize_rows does.");
}

}  // namespace compress
