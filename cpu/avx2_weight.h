// Weight-only products and the pieces of a decoder block with AVX2, FMA and F16C: a panel is two registers of 8 lanes.
//
// Codes are shifted down, masked and converted; what the zero point takes away is done once per group, with the sum of
// the group's inputs: sum scale (code - zero) x = scale (sum code x - zero sum x).
#pragma once
#include <immintrin.h>

#include <utility>

#include "attend.h"
#include "types.h"

namespace compress {
namespace avx2 {
namespace {

constexpr int HALF = 8;

template <int BITS, int I>
inline __m256 unpack_code(const uint32_t* words) {
  constexpr int bit = I % 16 * BITS, word = bit / 16, shift = bit % 16 + I / 16 * 16;
  __m256i lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + word * PANEL));
  if constexpr (shift != 0) lanes = _mm256_srli_epi32(lanes, shift);
  if constexpr (bit % 16 + BITS > 16) {  // the code goes on in the same half of the next word
    constexpr int here = 16 - bit % 16, up = here - I / 16 * 16;  // bits in this word; up: where the others go
    const __m256i next = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words + (word + 1) * PANEL));
    const __m256i rest = up >= 0 ? _mm256_slli_epi32(next, up) : _mm256_srli_epi32(next, -up);
    const __m256i low = _mm256_set1_epi32((1 << here) - 1);
    lanes = _mm256_or_si256(_mm256_and_si256(low, lanes), _mm256_andnot_si256(low, rest));
  }
  if constexpr (shift + BITS != 32) lanes = _mm256_and_si256(lanes, _mm256_set1_epi32((1 << BITS) - 1));
  return _mm256_cvtepi32_ps(lanes);
}

inline __m256 load_lanes(const void* from, Type type, int64_t offset) {
  switch (type) {
    case Type::f32: return _mm256_loadu_ps(static_cast<const float*>(from) + offset);
    case Type::bf16: {
      const void* at = static_cast<const uint16_t*>(from) + offset;
      const __m128i half = _mm_loadu_si128(static_cast<const __m128i*>(at));
      return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
    }
    case Type::f16: {
      const void* at = static_cast<const uint16_t*>(from) + offset;
      return _mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(at)));
    }
    default: {
      const void* at = static_cast<const uint8_t*>(from) + offset;
      return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(at))));
    }
  }
}

inline __m256 load_zero(const Weight& weight, int64_t offset) {
  if (weight.zero) return load_lanes(weight.zero, weight.zero_type, offset);
  return _mm256_set1_ps(static_cast<float>(1 << (weight.bits - 1)));
}

inline float reduce(__m256 value) {
  __m128 sum = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
  sum = _mm_add_ps(sum, _mm_movehl_ps(sum, sum));
  return _mm_cvtss_f32(_mm_add_ss(sum, _mm_movehdup_ps(sum)));
}

// acc[half][token][part] += code x over one run of 32 inputs.
template <int BITS, int TOKENS, int PARTS, int... I>
inline void add_run(const uint32_t* words, const float* x, int64_t stride, __m256 (&acc)[2][TOKENS][PARTS],
                    std::integer_sequence<int, I...>) {
  auto one = [&](auto index) __attribute__((always_inline)) {
    constexpr int i = decltype(index)::value;
    const __m256 low = unpack_code<BITS, i>(words), high = unpack_code<BITS, i>(words + HALF);
    for (int t = 0; t < TOKENS; ++t) {
      const __m256 value = _mm256_broadcast_ss(x + t * stride + i);
      acc[0][t][i % PARTS] = _mm256_fmadd_ps(low, value, acc[0][t][i % PARTS]);
      acc[1][t][i % PARTS] = _mm256_fmadd_ps(high, value, acc[1][t][i % PARTS]);
    }
  };
  (one(std::integral_constant<int, I>{}), ...);
}

template <int BITS, int TOKENS>
inline void few_panel(const Weight& weight, const float* x, const float* sums, float* y, int64_t y_stride,
                      int64_t panel, int64_t first) {
  constexpr int PARTS = TOKENS == 1 ? 4 : TOKENS == 2 ? 2 : 1;
  const int64_t groups = weight.columns / weight.group;
  const uint32_t* words = weight.codes + panel * (weight.columns / 32 * BITS) * PANEL;
  __m256 total[2][TOKENS];
  for (int h = 0; h < 2; ++h)
    for (int t = 0; t < TOKENS; ++t) total[h][t] = _mm256_setzero_ps();
  for (int64_t g = 0; g < groups; ++g) {
    __m256 acc[2][TOKENS][PARTS];
    for (int h = 0; h < 2; ++h)
      for (int t = 0; t < TOKENS; ++t)
        for (int k = 0; k < PARTS; ++k) acc[h][t][k] = _mm256_setzero_ps();
    for (int64_t i = g * weight.group; i < (g + 1) * weight.group; i += 32, words += BITS * PANEL)
      add_run<BITS, TOKENS, PARTS>(words, x + i, weight.columns, acc, std::make_integer_sequence<int, 32>{});
    for (int h = 0; h < 2; ++h) {
      const int64_t offset = (panel * groups + g) * PANEL + h * HALF;
      const __m256 scale = load_lanes(weight.scale, weight.scale_type, offset), zero = load_zero(weight, offset);
      for (int t = 0; t < TOKENS; ++t) {
        __m256 sum = acc[h][t][0];
        for (int k = 1; k < PARTS; ++k) sum = _mm256_add_ps(sum, acc[h][t][k]);
        sum = _mm256_fnmadd_ps(zero, _mm256_set1_ps(sums[t * groups + g]), sum);
        total[h][t] = _mm256_fmadd_ps(scale, sum, total[h][t]);
      }
    }
  }
  for (int t = 0; t < TOKENS; ++t) {
    alignas(32) float lanes[PANEL];
    _mm256_store_ps(lanes, total[0][t]);
    _mm256_store_ps(lanes + HALF, total[1][t]);
    for (int r = 0; r < PANEL && panel * PANEL + r < weight.rows; ++r)
      y[t * y_stride + (panel - first) * PANEL + r] = lanes[r] + (weight.bias ? weight.bias[panel * PANEL + r] : 0.0f);
  }
}

template <int BITS>
inline void few_bits(const Weight& weight, const float* x, const float* sums, int64_t tokens, float* y,
                     int64_t y_stride, int64_t first, int64_t last) {
  const int64_t groups = weight.columns / weight.group;
  for (int64_t t = 0; t < tokens;) {
    const int64_t left = tokens - t;
    for (int64_t p = first; p < last; ++p) {
      const float *at = x + t * weight.columns, *its = sums + t * groups;
      float* to = y + t * y_stride;
      if (left >= 4) few_panel<BITS, 4>(weight, at, its, to, y_stride, p, first);
      else if (left >= 2) few_panel<BITS, 2>(weight, at, its, to, y_stride, p, first);
      else few_panel<BITS, 1>(weight, at, its, to, y_stride, p, first);
    }
    t += left >= 4 ? 4 : left >= 2 ? 2 : 1;
  }
}

inline void weight_few(const Weight& weight, const float* x, const float* sums, int64_t tokens, float* y,
                       int64_t y_stride, int64_t first, int64_t last) {
  switch (weight.bits) {
    case 2: return few_bits<2>(weight, x, sums, tokens, y, y_stride, first, last);
    case 3: return few_bits<3>(weight, x, sums, tokens, y, y_stride, first, last);
    case 4: return few_bits<4>(weight, x, sums, tokens, y, y_stride, first, last);
    default: return few_bits<8>(weight, x, sums, tokens, y, y_stride, first, last);
  }
}

// 8 x 8 floats: row[i] holds input i for 8 out features; afterwards row[r] holds 8 inputs of out feature r.
inline void transpose(__m256 (&row)[8]) {
  __m256 pair[8], quad[8];
  for (int i = 0; i < 8; i += 2) {
    pair[i] = _mm256_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm256_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    quad[i] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0x44);
    quad[i + 1] = _mm256_shuffle_ps(pair[i], pair[i + 2], 0xee);
    quad[i + 2] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0x44);
    quad[i + 3] = _mm256_shuffle_ps(pair[i + 1], pair[i + 3], 0xee);
  }
  for (int r = 0; r < 4; ++r) {
    row[r] = _mm256_permute2f128_ps(quad[r], quad[4 + r], 0x20);
    row[4 + r] = _mm256_permute2f128_ps(quad[r], quad[4 + r], 0x31);
  }
}

template <int BITS, int EIGHTH, class Store, int... I>
inline void rows_of_part(const uint32_t* words, __m256 scale, __m256 zero, Store store,
                         std::integer_sequence<int, I...>) {
  __m256 value[8];
  ((value[I] = _mm256_mul_ps(scale, _mm256_sub_ps(unpack_code<BITS, 8 * EIGHTH + I>(words), zero))), ...);
  transpose(value);
  for (int r = 0; r < 8; ++r) store(r, 8 * EIGHTH, value[r]);
}

template <int BITS, class Store>
inline void rows_bits(const Weight& weight, int64_t first, int64_t last, Store store) {
  const int64_t groups = weight.columns / weight.group, words_per_row = weight.columns / 32 * BITS;
  const auto eight = std::make_integer_sequence<int, 8>{};
  for (int64_t p = first; p < last; ++p) {
    for (int h = 0; h < 2; ++h) {
      __m256 scale = _mm256_setzero_ps(), zero = _mm256_setzero_ps();
      for (int64_t i = 0; i < weight.columns; i += 32) {
        if (i % weight.group == 0) {
          const int64_t offset = (p * groups + i / weight.group) * PANEL + h * HALF;
          scale = load_lanes(weight.scale, weight.scale_type, offset);
          zero = load_zero(weight, offset);
        }
        const uint32_t* words = weight.codes + (p * words_per_row + i / 32 * BITS) * PANEL + h * HALF;
        auto put = [&](int row, int input, __m256 value) __attribute__((always_inline)) {
          store(((p - first) * PANEL + h * HALF + row) * weight.columns + i + input, value);
        };
        rows_of_part<BITS, 0>(words, scale, zero, put, eight);
        rows_of_part<BITS, 1>(words, scale, zero, put, eight);
        rows_of_part<BITS, 2>(words, scale, zero, put, eight);
        rows_of_part<BITS, 3>(words, scale, zero, put, eight);
      }
    }
  }
}

template <class Store>
inline void weight_rows(const Weight& weight, int64_t first, int64_t last, Store store) {
  switch (weight.bits) {
    case 2: return rows_bits<2>(weight, first, last, store);
    case 3: return rows_bits<3>(weight, first, last, store);
    case 4: return rows_bits<4>(weight, first, last, store);
    default: return rows_bits<8>(weight, first, last, store);
  }
}

// Round to nearest, ties to even; NaN stays NaN.
inline __m128i to_bf16(__m256 value) {
  const __m256i bits = _mm256_castps_si256(value);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc0), nan);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(rounded, rounded), 0xd8);
  return _mm256_castsi256_si128(packed);
}

inline void weight_rows_bf16(const Weight& weight, uint16_t* out, int64_t first, int64_t last) {
  weight_rows(weight, first, last, [=](int64_t at, __m256 value) __attribute__((always_inline)) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + at), to_bf16(value));
  });
}

inline void weight_rows_f32(const Weight& weight, float* out, int64_t first, int64_t last) {
  weight_rows(weight, first, last, [=](int64_t at, __m256 value) __attribute__((always_inline)) {
    _mm256_storeu_ps(out + at, value);
  });
}

inline void to_f32(const void* from, Type type, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) _mm256_storeu_ps(to + i, load_lanes(from, type, i));
  for (; i < count; ++i) to[i] = load_value(from, type, i);
}

inline void from_f32(const float* from, void* to, Type type, int64_t count) {
  int64_t i = 0;
  for (; type != Type::f32 && i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(from + i);
    const __m128i half = type == Type::bf16 ? to_bf16(value) : _mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(to) + i), half);
  }
  for (; i < count; ++i) store_value(to, type, i, from[i]);
}

inline void group_sums(const float* x, int64_t count, int64_t group, float* sums) {
  for (int64_t g = 0; g < count / group; ++g) {
    __m256 sum = _mm256_setzero_ps();
    for (int64_t i = 0; i < group; i += 8) sum = _mm256_add_ps(sum, _mm256_loadu_ps(x + g * group + i));
    sums[g] = reduce(sum);
  }
}

inline float dot(const float* a, const void* b, Type type, int64_t count) {
  __m256 sum = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) sum = _mm256_fmadd_ps(_mm256_loadu_ps(a + i), load_lanes(b, type, i), sum);
  float rest = 0.0f;
  for (; i < count; ++i) rest += a[i] * load_value(b, type, i);
  return reduce(sum) + rest;
}

inline void add_scaled(float* y, const void* x, Type type, float factor, int64_t count) {
  const __m256 times = _mm256_set1_ps(factor);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8)
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(times, load_lanes(x, type, i), _mm256_loadu_ps(y + i)));
  for (; i < count; ++i) y[i] += factor * load_value(x, type, i);
}

inline void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, float* y) {
  const float mean = dot(x, x, Type::f32, count) / static_cast<float>(count);
  const float factor = 1.0f / __builtin_sqrtf(mean + epsilon);
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

// e^x within 2 units in the last place: 2^n e^r, |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7.
inline __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.0f)), _mm256_set1_ps(88.0f));
  const int nearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), nearest);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  const float coefficients[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  __m256 sum = _mm256_set1_ps(coefficients[0]);
  for (int k = 1; k < 8; ++k) sum = _mm256_fmadd_ps(sum, r, _mm256_set1_ps(coefficients[k]));
  const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(sum, _mm256_castsi256_ps(power));
}

inline void silu_times(const float* gate, const float* up, float* y, int64_t count) {
  const __m256 one = _mm256_set1_ps(1.0f);
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(gate + i);
    const __m256 below = _mm256_add_ps(one, exponential(_mm256_sub_ps(_mm256_setzero_ps(), value)));
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_div_ps(value, below), _mm256_loadu_ps(up + i)));
  }
  for (; i < count; ++i) y[i] = gate[i] / (1.0f + __builtin_expf(-gate[i])) * up[i];
}

inline void attend(const float* q, const void* keys, const void* values, Type type, int64_t size, int64_t count,
                   float scale, float* scores, float* out) {
  attend_with(dot, add_scaled, q, keys, values, type, size, count, scale, scores, out);
}

}  // namespace
}  // namespace avx2
}  // namespace compress
