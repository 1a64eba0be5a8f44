// The table of the avx2 kernels; built with the flags that its instructions need.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "avx2_weight.h"

#include "avx2_int8.h"
#define COMPRESS_HAVE 1
#endif

namespace compress {

const Kernels* avx2_kernels() {
#ifdef COMPRESS_HAVE
  using namespace avx2;
  static const Kernels table = {
      "avx2",
      weight_few, weight_rows_bf16, weight_rows_f32,
      nullptr, nullptr, nullptr,
      to_f32, from_f32, group_sums,
      rms_norm, dot, add_scaled, silu_times, attend, nullptr, nullptr, nullptr,
      quantize_row, flag_outliers, int8_pack, int8_dot, int8_finish,
  };
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace compress
