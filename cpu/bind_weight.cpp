// Python's view of the weight-only kernels: weight_matmul and weight_rows.
#include "bind.h"
#include "matmul.h"

namespace nb = nanobind;

namespace compress {
namespace {

Weight make_weight(uintptr_t codes, uintptr_t scale, int32_t scale_type, uintptr_t zero, int32_t zero_type, int64_t rows,
                   int64_t columns, int64_t group, int32_t bits) {
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, got " + std::to_string(bits));
  require_positive(rows, "rows");
  require_positive(columns, "columns");
  require(columns % 32 == 0, "columns must be a multiple of 32, got " + std::to_string(columns));
  require(group > 0 && group % 32 == 0 && columns % group == 0,
          "group must be a multiple of 32 that divides " + std::to_string(columns) + " columns, got " +
              std::to_string(group));
  require(codes && codes % 4 == 0, "codes must be at an address that is a multiple of 4, got " + std::to_string(codes));
  require(is_float(scale_type), "scale_type must be 1 (f32), 2 (bf16) or 3 (f16), got " + std::to_string(scale_type));
  const uintptr_t width = scale_type == static_cast<int32_t>(Type::f32) ? 4 : 2;
  require(scale && scale % width == 0, "scale must be at an address that is a multiple of " + std::to_string(width) +
                                           ", got " + std::to_string(scale));
  const bool bytes = zero_type == static_cast<int32_t>(Type::u8);
  require(!zero || bytes || zero_type == scale_type,
          "zero_type must be 4 (u8) or that of the scale, got " + std::to_string(zero_type));
  require(bytes || zero % width == 0,
          "zero must be at an address that is a multiple of " + std::to_string(width) + ", got " + std::to_string(zero));
  return {as_pointer<const uint32_t>(codes), as_pointer<const void>(scale), as_pointer<const void>(zero), nullptr, rows,
          columns, group, bits, static_cast<Type>(scale_type), zero ? static_cast<Type>(zero_type) : Type::none};
}

Rows make_rows(uintptr_t data, int32_t type, int64_t stride, int64_t width, int64_t count, const char* name) {
  const std::string word(name);
  require(is_float(type), word + " must be f32, bf16 or f16, got type " + std::to_string(type));
  const uintptr_t size = type == static_cast<int32_t>(Type::f32) ? 4 : 2;
  require(data && data % size == 0, word + " must be at an address that is a multiple of " + std::to_string(size) +
                                        ", got " + std::to_string(data));
  require(count == 1 || stride >= width, word + "'s rows of " + std::to_string(width) +
                                             " overlap: they are " + std::to_string(stride) + " elements apart");
  return {as_pointer<void>(data), static_cast<Type>(type), stride};
}

void weight_matmul(uintptr_t codes, uintptr_t scale, int32_t scale_type, uintptr_t zero, int32_t zero_type,
                uintptr_t bias, int32_t bias_type, int64_t rows, int64_t columns, int64_t group, int32_t bits,
                uintptr_t x, int32_t x_type, int64_t x_stride, int64_t tokens, uintptr_t y, int32_t y_type,
                int64_t y_stride, int threads) {
  const Weight weight = make_weight(codes, scale, scale_type, zero, zero_type, rows, columns, group, bits);
  require_positive(tokens, "tokens");
  const Rows from = make_rows(x, x_type, x_stride, columns, tokens, "x");
  const Rows to = make_rows(y, y_type, y_stride, rows, tokens, "y");
  require(!bias || is_float(bias_type), "bias must be f32, bf16 or f16, got type " + std::to_string(bias_type));
  require(bias % (bias_type == static_cast<int32_t>(Type::f32) ? 4 : 2) == 0,
          "bias is at a misaligned address: " + std::to_string(bias));
  const bool many = tokens > FEW_TOKENS;
  require(!many || (multiplies_pairs() && from.type == Type::bf16 && to.type == Type::bf16 && x_stride == columns),
          std::to_string(tokens) + " tokens: more than " + std::to_string(FEW_TOKENS) +
              " must be dense bf16, and the kernels in use must have products of pairs");
  nb::gil_scoped_release release;
  if (many) {
    multiply_many(weight, static_cast<const uint16_t*>(from.data), tokens, as_pointer<const void>(bias),
                  static_cast<Type>(bias_type), to, threads);
  } else {
    multiply_few(weight, from, tokens, as_pointer<const void>(bias), static_cast<Type>(bias_type), to, threads);
  }
}

void weight_rows(uintptr_t codes, uintptr_t scale, int32_t scale_type, uintptr_t zero, int32_t zero_type, int64_t rows,
                 int64_t columns, int64_t group, int32_t bits, uintptr_t out, int32_t out_type, int64_t first,
                 int64_t last, int threads) {
  const Weight weight = make_weight(codes, scale, scale_type, zero, zero_type, rows, columns, group, bits);
  const int64_t panels = (rows + PANEL - 1) / PANEL;
  require(first >= 0 && first < last && last <= panels, "panels " + std::to_string(first) + ".." + std::to_string(last) +
                                                            " are not among " + std::to_string(panels));
  require(out_type == static_cast<int32_t>(Type::f32) || out_type == static_cast<int32_t>(Type::bf16),
          "out must be f32 or bf16, got type " + std::to_string(out_type));
  const Rows to = make_rows(out, out_type, columns, columns, last - first, "out");
  nb::gil_scoped_release release;
  decode_rows(weight, to.data, to.type, first, last, threads);
}

// -1, or the first token that is not among the rows; nothing is written then.
int64_t look_up(uintptr_t codes, uintptr_t scale, int32_t scale_type, uintptr_t zero, int32_t zero_type, int64_t rows,
                int64_t columns, int64_t group, int32_t bits, uintptr_t tokens, int64_t count, uintptr_t out,
                int32_t out_type) {
  const Weight weight = make_weight(codes, scale, scale_type, zero, zero_type, rows, columns, group, bits);
  require(tokens && tokens % 8 == 0, "tokens must be int64, at an address that is a multiple of 8");
  require_positive(count, "count");
  const Rows to = make_rows(out, out_type, columns, columns, count, "out");
  const int64_t* index = as_pointer<const int64_t>(tokens);
  for (int64_t n = 0; n < count; ++n)
    if (index[n] < 0 || index[n] >= rows) return n;
  nb::gil_scoped_release release;
  look_up_rows(weight, index, count, to.data, to.type);
  return -1;
}

}  // namespace

void bind_weight(nb::module_& module) {
  module.attr("FEW_TOKENS") = FEW_TOKENS;
  module.def("multiplies_pairs", &multiplies_pairs, "Whether weight_matmul takes any number of bf16 tokens.");
  module.def("weight_matmul", &weight_matmul,
             "codes, scale, scale_type, zero, zero_type, bias, bias_type, rows, columns, group, bits, x, x_type, "
             "x_stride, tokens, y, y_type, y_stride, threads: y = x W^T + bias for at most FEW_TOKENS tokens, or for "
             "more dense bf16 ones.");
  module.def("look_up", &look_up,
             "codes, scale, scale_type, zero, zero_type, rows, columns, group, bits, tokens, count, out, out_type: rows "
             "of W by int64 index; gives the place of the first index out of range (nothing is written), or -1.");
  module.def("weight_rows", &weight_rows,
             "codes, scale, scale_type, zero, zero_type, rows, columns, group, bits, out, out_type, first, last, "
             "threads: panels first..last of W as dense rows.");
}

}  // namespace compress
