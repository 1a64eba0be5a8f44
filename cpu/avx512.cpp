// The table of the avx512 kernels; built with the flags that its instructions need.
#include "kernels.h"

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#include "avx512_attend.h"
#include "avx512_causal.h"
#include "avx512_pairs.h"
#include "avx512_weight.h"

#include "avx512_int8.h"
#define COMPRESS_HAVE 1
#endif

namespace compress {

const Kernels* avx512_kernels() {
#ifdef COMPRESS_HAVE
  using namespace avx512;
  static const Kernels table = {
      "avx512",
      weight_few, weight_rows_bf16, weight_rows_f32,
      to_pairs, weight_few_pairs, weight_many_pairs,
      to_f32, from_f32, group_sums,
      rms_norm, dot, add_scaled, silu_times, attend, pack_keys, pack_values, attend_tile,
      quantize_row, flag_outliers, int8_pack, int8_dot, int8_finish,
  };
  return &table;
#else
  return nullptr;
#endif
}

}  // namespace compress
