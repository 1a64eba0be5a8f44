// The int8 product with AVX2. Codes and activations are widened to 16 bits and multiplied with vpmaddwd, which adds
// neighbouring products in 32 bits and so is exact (vpmaddubsw would saturate). Packed activations: (K, tokens, 4) int16.
#pragma once
#include <immintrin.h>

#include "avx2_weight.h"
#include "types.h"

namespace compress {
namespace avx2 {
namespace {

// All bits set in the lanes of features i .. i + 7 that are not outliers.
inline __m256i kept_lanes(const uint8_t* outlier, int64_t i) {
  const __m128i flags = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(outlier + i));
  return _mm256_cmpeq_epi32(_mm256_cvtepu8_epi32(flags), _mm256_setzero_si256());
}

inline uint32_t reduce_max(__m256i value) {
  alignas(32) uint32_t lanes[8];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), value);
  uint32_t most = lanes[0];
  for (int i = 1; i < 8; ++i) most = lanes[i] > most ? lanes[i] : most;
  return most;
}

inline __m256i load_magnitude(const float* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm256_and_si256(bits, _mm256_set1_epi32(0x7fffffff));
}

inline float quantize_row(const float* x, const uint8_t* outlier, int64_t count, int8_t* q) {
  __m256i largest = _mm256_setzero_si256();  // magnitudes order as their bits do, with NaN on top
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    __m256i magnitude = load_magnitude(x + i);
    if (outlier) magnitude = _mm256_and_si256(magnitude, kept_lanes(outlier, i));
    largest = _mm256_max_epu32(largest, magnitude);
  }
  uint32_t most = reduce_max(largest);
  for (; i < count; ++i) {
    const uint32_t magnitude = outlier && outlier[i] ? 0u : float_to_bits(x[i]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
  }
  const float m = bits_to_float(most);
  const int64_t padded = (count + 3) / 4 * 4;
  const float factor = m > 0.0f ? 127.0f / m : 0.0f;
  if (!(factor > 0.0f && factor <= 3.4028234663852886e38f)) {  // m is zero or too small, infinite or NaN
    std::memset(q, 0, static_cast<size_t>(padded));
    return m < 1.0f ? 0.0f : m;
  }
  const __m256 factors = _mm256_set1_ps(factor);
  const __m256i pick = _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1,
                                        -1, -1, -1, -1, -1, -1, -1, -1, -1, -1);
  for (i = 0; i + 8 <= count; i += 8) {
    __m256i codes = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), factors));
    if (outlier) codes = _mm256_and_si256(codes, kept_lanes(outlier, i));
    codes = _mm256_shuffle_epi8(codes, pick);
    const __m128i bytes = _mm_unpacklo_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(q + i), bytes);
  }
  for (; i < count; ++i) {
    const int32_t code = _mm_cvtss_si32(_mm_set_ss(x[i] * factor));
    q[i] = static_cast<int8_t>(outlier && outlier[i] ? 0 : code);
  }
  for (; i < padded; ++i) q[i] = 0;
  return m / 127.0f;
}

inline float flag_outliers(const float* x, float threshold, int64_t count, uint8_t* flag) {
  const __m256 limit = _mm256_set1_ps(threshold);
  __m256i largest = _mm256_setzero_si256();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256i magnitude = load_magnitude(x + i);
    largest = _mm256_max_epu32(largest, magnitude);
    int large = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_castsi256_ps(magnitude), limit, _CMP_GE_OQ));
    for (; large; large &= large - 1) flag[i + __builtin_ctz(static_cast<unsigned>(large))] = 1;
  }
  uint32_t most = reduce_max(largest);
  for (; i < count; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
    if (bits_to_float(magnitude) >= threshold) flag[i] = 1;
  }
  return bits_to_float(most);
}

inline void int8_pack(const int8_t* q, int64_t q_stride, int64_t tokens, int64_t groups, void* packed) {
  int16_t* to = static_cast<int16_t*>(packed);
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t k = 0; k < groups; ++k) {
      int32_t four;
      std::memcpy(&four, q + t * q_stride + 4 * k, sizeof four);
      const __m128i wide = _mm_cvtepi8_epi16(_mm_cvtsi32_si128(four));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to + (k * tokens + t) * 4), wide);
    }
  }
}

// acc (TOKENS, 16) of one panel, for tokens of a tile of `tokens`.
template <int TOKENS>
inline void dot_tile(const int8_t* codes, const int16_t* packed, int64_t tokens, int64_t groups, int32_t* acc,
                     int64_t acc_stride) {
  __m256i sum[TOKENS][4];  // four rows each, two neighbouring lanes to a row
#pragma GCC unroll 3
  for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) sum[t][part] = _mm256_setzero_si256();
  }
  for (int64_t k = 0; k < groups; ++k) {
    __m256i value[TOKENS];
#pragma GCC unroll 3
    for (int t = 0; t < TOKENS; ++t) {
      int64_t four;
      std::memcpy(&four, packed + (k * tokens + t) * 4, sizeof four);
      value[t] = _mm256_set1_epi64x(four);
    }
#pragma GCC unroll 4
    for (int part = 0; part < 4; ++part) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + k * 64 + part * 16));
      const __m256i code = _mm256_cvtepi8_epi16(bytes);
#pragma GCC unroll 3
      for (int t = 0; t < TOKENS; ++t)
        sum[t][part] = _mm256_add_epi32(sum[t][part], _mm256_madd_epi16(code, value[t]));
    }
  }
#pragma GCC unroll 3
  for (int t = 0; t < TOKENS; ++t) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m256i rows = _mm256_hadd_epi32(sum[t][2 * half], sum[t][2 * half + 1]);
      __m256i* to = reinterpret_cast<__m256i*>(acc + t * acc_stride + 8 * half);
      _mm256_storeu_si256(to, _mm256_permute4x64_epi64(rows, 0xd8));
    }
  }
}

inline void int8_dot(const Int8Weight& weight, const void* packed, int64_t tokens, int32_t* acc, int64_t acc_stride,
                     int64_t first, int64_t last) {
  const int16_t* values = static_cast<const int16_t*>(packed);
  const int64_t groups = (weight.columns + 3) / 4;
  for (int64_t p = first; p < last; ++p) {
    const int8_t* codes = weight.codes + p * groups * PANEL * 4;
    for (int64_t t = 0; t < tokens; t += 3) {
      int32_t* to = acc + t * acc_stride + (p - first) * PANEL;
      switch (tokens - t) {
        case 1: dot_tile<1>(codes, values + 4 * t, tokens, groups, to, acc_stride); break;
        case 2: dot_tile<2>(codes, values + 4 * t, tokens, groups, to, acc_stride); break;
        default: dot_tile<3>(codes, values + 4 * t, tokens, groups, to, acc_stride);
      }
    }
  }
}

inline void finish_row(const Int8Panel& panel, const int32_t* acc, int64_t t, float* y) {
  const __m256 row_scale = _mm256_set1_ps(panel.row_scale[t]);
  const float* x = panel.x + t * panel.outliers;
  for (int half = 0; half < PANEL; half += 8) {
    const __m256 sums = _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(acc + half)));
    __m256 value = _mm256_mul_ps(_mm256_mul_ps(_mm256_loadu_ps(panel.scale + half), row_scale), sums);
    for (int64_t j = 0; j < panel.outliers; ++j)
      value = _mm256_fmadd_ps(_mm256_set1_ps(x[j]), _mm256_loadu_ps(panel.w + j * PANEL + half), value);
    _mm256_storeu_ps(y + half, value);
  }
}

inline void int8_finish(const Int8Panel& panel, const int32_t* acc, int64_t acc_stride, int64_t tokens) {
  alignas(32) float bias[PANEL] = {}, y[PANEL];
  for (int64_t r = 0; panel.bias && r < panel.lanes; ++r) bias[r] = panel.bias[r];
  const bool whole = panel.lanes == PANEL && panel.type != Type::f32;
  for (int64_t t = 0; t < tokens; ++t) {
    finish_row(panel, acc + t * acc_stride, t, y);
    for (int half = 0; half < PANEL; half += 8)
      _mm256_store_ps(y + half, _mm256_add_ps(_mm256_load_ps(y + half), _mm256_load_ps(bias + half)));
    const int64_t at = t * panel.y_stride;
    if (whole) {
      from_f32(y, static_cast<uint16_t*>(panel.y) + at, panel.type, PANEL);
    } else {
      for (int64_t r = 0; r < panel.lanes; ++r) store_value(panel.y, panel.type, at + r, y[r]);
    }
  }
}

}  // namespace
}  // namespace avx2
}  // namespace compress
