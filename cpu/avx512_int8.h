// The int8 product with AVX-512 VNNI. vpdpbusd adds four products of unsigned by signed bytes to each 32-bit lane,
// without saturation, so sums are exact. Activations become unsigned by adding 128 (flipping the highest bit):
// sum q c = sum (q + 128) c - 128 sum c, and the sum of a row's codes is known.
#pragma once
#include <immintrin.h>

#include "avx512_weight.h"
#include "types.h"

namespace compress {
namespace avx512 {
namespace {

constexpr int64_t PREFETCH_BYTES = 4096;  // how far ahead of its use the memory-bound product asks for codes

// Lanes of x whose feature is not an outlier, at most `left` of them.
inline __mmask16 kept_lanes(const uint8_t* outlier, int64_t i, int64_t left) {
  const __mmask16 lanes = tail_mask(left);
  if (!outlier) return lanes;
  return _mm_mask_testn_epi8_mask(lanes, _mm_maskz_loadu_epi8(lanes, outlier + i), _mm_set1_epi8(-1));
}

inline float quantize_row(const float* x, const uint8_t* outlier, int64_t count, int8_t* q) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i most = _mm512_setzero_si512();  // magnitudes order as their bits do, with NaN on top
  for (int64_t i = 0; i < count; i += 16) {
    const __m512i bits = _mm512_maskz_loadu_epi32(kept_lanes(outlier, i, count - i), x + i);
    most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
  }
  const float m = bits_to_float(_mm512_reduce_max_epu32(most));
  const int64_t padded = (count + 3) / 4 * 4;
  const float factor = m > 0.0f ? 127.0f / m : 0.0f;
  if (!(factor > 0.0f && factor <= 3.4028234663852886e38f)) {  // m is zero or too small, infinite or NaN
    std::memset(q, 0, static_cast<size_t>(padded));
    return m < 1.0f ? 0.0f : m;
  }
  const __m512 factors = _mm512_set1_ps(factor);
  for (int64_t i = 0; i < padded; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(kept_lanes(outlier, i, count - i), x + i);
    const __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(value, factors));
    _mm512_mask_cvtepi32_storeu_epi8(q + i, tail_mask(padded - i), codes);
  }
  return m / 127.0f;
}

inline float flag_outliers(const float* x, float threshold, int64_t count, uint8_t* flag) {
  const __m512 limit = _mm512_set1_ps(threshold);
  __m512i most = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 lanes = tail_mask(count - i);
    const __m512 value = _mm512_abs_ps(_mm512_maskz_loadu_ps(lanes, x + i));
    most = _mm512_max_epu32(most, _mm512_castps_si512(value));
    const __mmask16 large = _mm512_mask_cmp_ps_mask(lanes, value, limit, _CMP_GE_OQ);
    if (large) _mm_mask_storeu_epi8(flag + i, large, _mm_set1_epi8(1));
  }
  return bits_to_float(_mm512_reduce_max_epu32(most));
}

inline void int8_pack(const int8_t* q, int64_t q_stride, int64_t tokens, int64_t groups, void* packed) {
  uint32_t* to = static_cast<uint32_t*>(packed);
  const __m512i flip = _mm512_set1_epi32(static_cast<int32_t>(0x80808080u));
  const __mmask16 used = tail_mask(tokens);
  for (int64_t k = 0; k < groups; k += 16) {
    const int64_t count = groups - k < 16 ? groups - k : 16;
    const __mmask16 lanes = tail_mask(count);
    __m512 rows[16];
    for (int64_t t = 0; t < 16; ++t) {
      rows[t] = _mm512_castsi512_ps(flip);
      if (t >= tokens) continue;
      const __m512i codes = _mm512_maskz_loadu_epi32(lanes, q + t * q_stride + 4 * k);
      rows[t] = _mm512_castsi512_ps(_mm512_xor_si512(codes, flip));
    }
    if (tokens == 1) {
      _mm512_mask_storeu_ps(to + k, lanes, rows[0]);
      continue;
    }
    transpose(rows);
    for (int64_t i = 0; i < count; ++i) _mm512_mask_storeu_ps(to + (k + i) * tokens, used, rows[i]);
  }
}

// acc (TOKENS, 16 PANELS) for PANELS neighbouring panels. Groups of inputs go to PARTS sums in turn, so that a chain of
// additions is not waited for.
template <int TOKENS, int PANELS, int PARTS>
inline void dot_tile(const int8_t* codes, const int32_t* sums, const uint32_t* packed, int64_t groups, int32_t* acc,
                     int64_t acc_stride) {
  __m512i sum[TOKENS][PANELS][PARTS];
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p) {
    const __m512i shift = _mm512_slli_epi32(_mm512_loadu_si512(sums + p * PANEL), 7);
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t) {
      sum[t][p][0] = _mm512_sub_epi32(_mm512_setzero_si512(), shift);
#pragma GCC unroll 4
      for (int part = 1; part < PARTS; ++part) sum[t][p][part] = _mm512_setzero_si512();
    }
  }
  const int64_t panel_bytes = groups * PANEL * 4;
  auto step = [&](int64_t k, int part) __attribute__((always_inline)) {
    __m512i code[PANELS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
      const int8_t* at = codes + p * panel_bytes + k * 64;
      if constexpr (PARTS > 1) _mm_prefetch(reinterpret_cast<const char*>(at + PREFETCH_BYTES), _MM_HINT_T0);
      code[p] = _mm512_loadu_si512(at);
    }
#pragma GCC unroll 12
    for (int t = 0; t < TOKENS; ++t) {
      const __m512i value = _mm512_set1_epi32(static_cast<int32_t>(packed[k * TOKENS + t]));
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p) sum[t][p][part] = _mm512_dpbusd_epi32(sum[t][p][part], value, code[p]);
    }
  };
  int64_t k = 0;
  for (; k + PARTS <= groups; k += PARTS) {
#pragma GCC unroll 4
    for (int part = 0; part < PARTS; ++part) step(k + part, part);
  }
  if constexpr (PARTS > 1) {
    for (; k < groups; ++k) step(k, 0);
  }
#pragma GCC unroll 12
  for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p) {
#pragma GCC unroll 4
      for (int part = 1; part < PARTS; ++part) sum[t][p][0] = _mm512_add_epi32(sum[t][p][0], sum[t][p][part]);
      _mm512_storeu_si512(acc + t * acc_stride + p * PANEL, sum[t][p][0]);
    }
  }
}

template <int TOKENS>
inline void dot_panels(const Int8Weight& weight, const uint32_t* packed, int32_t* acc, int64_t acc_stride, int64_t first,
                       int64_t last) {
  constexpr int parts = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  const int64_t groups = (weight.columns + 3) / 4, panel_bytes = groups * PANEL * 4;
  int64_t p = first;
  for (; p + 2 <= last; p += 2)
    dot_tile<TOKENS, 2, parts>(weight.codes + p * panel_bytes, weight.sums + p * PANEL, packed, groups,
                               acc + (p - first) * PANEL, acc_stride);
  if (p < last)
    dot_tile<TOKENS, 1, parts>(weight.codes + p * panel_bytes, weight.sums + p * PANEL, packed, groups,
                               acc + (p - first) * PANEL, acc_stride);
}

inline void int8_dot(const Int8Weight& weight, const void* packed, int64_t tokens, int32_t* acc, int64_t acc_stride,
                     int64_t first, int64_t last) {
  const uint32_t* values = static_cast<const uint32_t*>(packed);
  switch (tokens) {
    case 1: return dot_panels<1>(weight, values, acc, acc_stride, first, last);
    case 2: return dot_panels<2>(weight, values, acc, acc_stride, first, last);
    case 3: return dot_panels<3>(weight, values, acc, acc_stride, first, last);
    case 4: return dot_panels<4>(weight, values, acc, acc_stride, first, last);
    case 5: return dot_panels<5>(weight, values, acc, acc_stride, first, last);
    case 6: return dot_panels<6>(weight, values, acc, acc_stride, first, last);
    case 7: return dot_panels<7>(weight, values, acc, acc_stride, first, last);
    case 8: return dot_panels<8>(weight, values, acc, acc_stride, first, last);
    case 9: return dot_panels<9>(weight, values, acc, acc_stride, first, last);
    case 10: return dot_panels<10>(weight, values, acc, acc_stride, first, last);
    case 11: return dot_panels<11>(weight, values, acc, acc_stride, first, last);
    default: return dot_panels<12>(weight, values, acc, acc_stride, first, last);
  }
}

inline void int8_finish(const Int8Panel& panel, const int32_t* acc, int64_t acc_stride, int64_t tokens) {
  const __mmask16 lanes = tail_mask(panel.lanes);
  const __m512 scale = _mm512_loadu_ps(panel.scale);
  const __m512 bias = panel.bias ? _mm512_maskz_loadu_ps(lanes, panel.bias) : _mm512_setzero_ps();
  for (int64_t t = 0; t < tokens; ++t) {
    const __m512 sums = _mm512_cvtepi32_ps(_mm512_loadu_si512(acc + t * acc_stride));
    __m512 y = _mm512_mul_ps(_mm512_mul_ps(scale, _mm512_set1_ps(panel.row_scale[t])), sums);
    const float* x = panel.x + t * panel.outliers;
    for (int64_t j = 0; j < panel.outliers; ++j)
      y = _mm512_fmadd_ps(_mm512_set1_ps(x[j]), _mm512_loadu_ps(panel.w + j * PANEL), y);
    y = _mm512_add_ps(y, bias);
    const int64_t at = t * panel.y_stride;
    if (panel.type == Type::f32) {
      _mm512_mask_storeu_ps(static_cast<float*>(panel.y) + at, lanes, y);
    } else {
      const __m256i half = panel.type == Type::bf16 ? to_bf16(y) : _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(panel.y) + at, lanes, half);
    }
  }
}

}  // namespace
}  // namespace avx512
}  // namespace compress
