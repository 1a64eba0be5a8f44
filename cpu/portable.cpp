// The table of the portable C++ kernels; built with the flags that its instructions need.
#include "portable_weight.h"

#include "portable_int8.h"

namespace compress {

const Kernels* portable_kernels() {
  using namespace portable;
  static const Kernels table = {
      "portable",
      weight_few, weight_rows_bf16, weight_rows_f32,
      nullptr, nullptr, nullptr,
      to_f32, from_f32, group_sums,
      rms_norm, dot, add_scaled, silu_times, attend, nullptr, nullptr, nullptr,
      quantize_row, flag_outliers, int8_pack, int8_dot, int8_finish,
  };
  return &table;
}

}  // namespace compress
