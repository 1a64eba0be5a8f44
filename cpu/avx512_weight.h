// Weight-only products and the pieces of a decoder block with AVX-512: one out feature per lane of a register.
//
// A word of a panel holds, for 16 rows, the codes of 32 / bits neighbouring inputs. Shifting it right by k bits brings
// the next code to the bottom of each lane; vpermps looks only at the lowest four bits of a lane, so a table of 16
// floats turns the code into its value without masking (for 2 and 3 bits the table repeats). Per 16 weights: a shift,
// a permutation and a multiply-add with a broadcast input: less than the memory takes to deliver them.
#pragma once
#include <immintrin.h>

#include <utility>

#include "types.h"

namespace compress {
namespace avx512 {
namespace {

template <int BITS>
inline __m512 code_table() {
  alignas(64) float table[16];
  for (int i = 0; i < 16; ++i) table[i] = static_cast<float>((i & ((1 << BITS) - 1)) - (1 << (BITS - 1)));
  return _mm512_load_ps(table);
}

// Values (code - 2^(BITS-1)) of input I of a run of 32 whose words are `words` (BITS, 16).
template <int BITS, int I>
inline __m512 unpack_code(const uint32_t* words, __m512 table) {
  constexpr int bit = I % 16 * BITS, word = bit / 16, shift = bit % 16 + I / 16 * 16;
  __m512i lanes = _mm512_loadu_si512(words + word * PANEL);
  if constexpr (shift != 0) lanes = _mm512_srli_epi32(lanes, shift);
  if constexpr (bit % 16 + BITS > 16) {  // the code goes on in the same half of the next word
    constexpr int here = 16 - bit % 16, up = here - I / 16 * 16;  // bits in this word; up: where the others go
    const __m512i next = _mm512_loadu_si512(words + (word + 1) * PANEL);
    const __m512i rest = up >= 0 ? _mm512_slli_epi32(next, up) : _mm512_srli_epi32(next, -up);
    const __m512i low = _mm512_set1_epi32((1 << here) - 1);
    lanes = _mm512_ternarylogic_epi32(low, lanes, rest, 0xca);  // low bits from here, the others from there
  }
  if constexpr (BITS <= 4) {
    return _mm512_permutexvar_ps(lanes, table);
  } else {
    const __m512i code = shift + BITS == 32 ? lanes : _mm512_and_si512(lanes, _mm512_set1_epi32((1 << BITS) - 1));
    return _mm512_sub_ps(_mm512_cvtepi32_ps(code), _mm512_set1_ps(static_cast<float>(1 << (BITS - 1))));
  }
}

inline __m512 load_lanes(const void* from, Type type, int64_t offset) {
  switch (type) {
    case Type::f32: return _mm512_loadu_ps(static_cast<const float*>(from) + offset);
    case Type::bf16: {
      const void* at = static_cast<const uint16_t*>(from) + offset;
      const __m256i half = _mm256_loadu_si256(static_cast<const __m256i*>(at));
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    }
    case Type::f16: {
      const void* at = static_cast<const uint16_t*>(from) + offset;
      return _mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(at)));
    }
    default: {
      const void* at = static_cast<const uint8_t*>(from) + offset;
      return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(at))));
    }
  }
}

// One run of 32 inputs of PANELS neighbouring panels for TOKENS tokens: acc[panel][token][part] += code value * x.
// PARTS sums are kept side by side, so that a chain of additions is not waited for.
template <int BITS, int PANELS, int TOKENS, int PARTS, int... I>
inline void add_run(const uint32_t* const (&words)[PANELS], const float* x, int64_t stride, __m512 table,
                    __m512 (&acc)[PANELS][TOKENS][PARTS], std::integer_sequence<int, I...>) {
  auto one = [&](auto index) __attribute__((always_inline)) {
    constexpr int i = decltype(index)::value;
    __m512 code[PANELS];
    for (int p = 0; p < PANELS; ++p) code[p] = unpack_code<BITS, i>(words[p], table);
    for (int t = 0; t < TOKENS; ++t) {
      const __m512 value = _mm512_set1_ps(x[t * stride + i]);
      for (int p = 0; p < PANELS; ++p)
        acc[p][t][i % PARTS] = _mm512_fmadd_ps(code[p], value, acc[p][t][i % PARTS]);
    }
  };
  (one(std::integral_constant<int, I>{}), ...);
}

template <int BITS, int PANELS, int TOKENS>
inline void few_panels(const Weight& weight, const float* x, const float* sums, float* y, int64_t y_stride,
                       int64_t panel, int64_t first) {
  constexpr int PARTS = TOKENS == 1 ? 4 : TOKENS < 4 ? 2 : 1;
  const int64_t groups = weight.columns / weight.group, words_per_row = weight.columns / 32 * BITS;
  const __m512 table = code_table<BITS>();
  const __m512 middle = _mm512_set1_ps(static_cast<float>(1 << (BITS - 1)));
  const uint32_t* words[PANELS];
  __m512 total[PANELS][TOKENS];
  for (int p = 0; p < PANELS; ++p) {
    words[p] = weight.codes + (panel + p) * words_per_row * PANEL;
    for (int t = 0; t < TOKENS; ++t) total[p][t] = _mm512_setzero_ps();
  }
  for (int64_t g = 0; g < groups; ++g) {
    __m512 acc[PANELS][TOKENS][PARTS];
    for (int p = 0; p < PANELS; ++p)
      for (int t = 0; t < TOKENS; ++t)
        for (int k = 0; k < PARTS; ++k) acc[p][t][k] = _mm512_setzero_ps();
    for (int64_t i = g * weight.group; i < (g + 1) * weight.group; i += 32) {
      for (int p = 0; p < PANELS; ++p)
        for (int k = 0; k < BITS; ++k)
          _mm_prefetch(reinterpret_cast<const char*>(words[p] + (k + 8 * BITS) * PANEL), _MM_HINT_T0);
      add_run<BITS, PANELS, TOKENS, PARTS>(words, x + i, weight.columns, table, acc,
                                           std::make_integer_sequence<int, 32>{});
      for (int p = 0; p < PANELS; ++p) words[p] += BITS * PANEL;
    }
    for (int p = 0; p < PANELS; ++p) {
      const int64_t offset = ((panel + p) * groups + g) * PANEL;
      const __m512 scale = load_lanes(weight.scale, weight.scale_type, offset);
      for (int t = 0; t < TOKENS; ++t) {
        __m512 sum = acc[p][t][0];
        for (int k = 1; k < PARTS; ++k) sum = _mm512_add_ps(sum, acc[p][t][k]);
        if (weight.zero) {
          const __m512 shift = _mm512_sub_ps(load_lanes(weight.zero, weight.zero_type, offset), middle);
          sum = _mm512_fnmadd_ps(shift, _mm512_set1_ps(sums[t * groups + g]), sum);
        }
        total[p][t] = _mm512_fmadd_ps(scale, sum, total[p][t]);
      }
    }
  }
  for (int p = 0; p < PANELS; ++p) {
    const int64_t row = (panel + p) * PANEL, left = weight.rows - row;
    const __mmask16 inside = left >= PANEL ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
    const __m512 bias = weight.bias ? _mm512_maskz_loadu_ps(inside, weight.bias + row) : _mm512_setzero_ps();
    for (int t = 0; t < TOKENS; ++t)
      _mm512_mask_storeu_ps(y + t * y_stride + (panel + p - first) * PANEL, inside, _mm512_add_ps(total[p][t], bias));
  }
}

template <int BITS, int TOKENS>
inline void few_tokens(const Weight& weight, const float* x, const float* sums, float* y, int64_t y_stride,
                       int64_t first, int64_t last) {
  constexpr int PANELS = TOKENS <= 4 ? 2 : 1;
  int64_t p = first;
  for (; p + PANELS <= last; p += PANELS) few_panels<BITS, PANELS, TOKENS>(weight, x, sums, y, y_stride, p, first);
  for (; p < last; ++p) few_panels<BITS, 1, TOKENS>(weight, x, sums, y, y_stride, p, first);
}

template <int BITS>
inline void few_bits(const Weight& weight, const float* x, const float* sums, int64_t tokens, float* y,
                     int64_t y_stride, int64_t first, int64_t last) {
  switch (tokens) {
    case 1: return few_tokens<BITS, 1>(weight, x, sums, y, y_stride, first, last);
    case 2: return few_tokens<BITS, 2>(weight, x, sums, y, y_stride, first, last);
    case 3: return few_tokens<BITS, 3>(weight, x, sums, y, y_stride, first, last);
    case 4: return few_tokens<BITS, 4>(weight, x, sums, y, y_stride, first, last);
    case 5: return few_tokens<BITS, 5>(weight, x, sums, y, y_stride, first, last);
    case 6: return few_tokens<BITS, 6>(weight, x, sums, y, y_stride, first, last);
    case 7: return few_tokens<BITS, 7>(weight, x, sums, y, y_stride, first, last);
    default: break;
  }
  const int64_t groups = weight.columns / weight.group;
  for (; tokens >= 8; tokens -= 8, x += 8 * weight.columns, sums += 8 * groups, y += 8 * y_stride)
    few_tokens<BITS, 8>(weight, x, sums, y, y_stride, first, last);
  if (tokens) few_bits<BITS>(weight, x, sums, tokens, y, y_stride, first, last);
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

// 16 x 16 floats: row[i] holds input i for 16 out features; afterwards row[r] holds 16 inputs of out feature r.
inline void transpose(__m512 (&row)[16]) {
  __m512 pair[16], quad[16];
  for (int i = 0; i < 16; i += 2) {
    pair[i] = _mm512_unpacklo_ps(row[i], row[i + 1]);
    pair[i + 1] = _mm512_unpackhi_ps(row[i], row[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int k = 0; k < 2; ++k) {
      quad[i + 2 * k] = _mm512_castpd_ps(
          _mm512_unpacklo_pd(_mm512_castps_pd(pair[i + k]), _mm512_castps_pd(pair[i + 2 + k])));
      quad[i + 2 * k + 1] = _mm512_castpd_ps(
          _mm512_unpackhi_pd(_mm512_castps_pd(pair[i + k]), _mm512_castps_pd(pair[i + 2 + k])));
    }
  }
  // quad[4 b + r] holds, in 128-bit part q, inputs 4 b .. 4 b + 3 of out feature 4 q + r.
  for (int r = 0; r < 4; ++r) {
    const __m512 a = _mm512_shuffle_f32x4(quad[r], quad[4 + r], 0x88);       // parts 0, 2 of blocks 0 and 1
    const __m512 b = _mm512_shuffle_f32x4(quad[r], quad[4 + r], 0xdd);       // parts 1, 3
    const __m512 c = _mm512_shuffle_f32x4(quad[8 + r], quad[12 + r], 0x88);  // the same of blocks 2 and 3
    const __m512 d = _mm512_shuffle_f32x4(quad[8 + r], quad[12 + r], 0xdd);
    row[r] = _mm512_shuffle_f32x4(a, c, 0x88);
    row[4 + r] = _mm512_shuffle_f32x4(b, d, 0x88);
    row[8 + r] = _mm512_shuffle_f32x4(a, c, 0xdd);
    row[12 + r] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

template <int BITS, int HALF, class Store, int... I>
inline void rows_of_half(const uint32_t* words, __m512 table, __m512 scale, __m512 shift, Store store,
                         std::integer_sequence<int, I...>) {
  __m512 value[16];
  ((value[I] = _mm512_mul_ps(scale, _mm512_sub_ps(unpack_code<BITS, 16 * HALF + I>(words, table), shift))), ...);
  transpose(value);
  for (int r = 0; r < 16; ++r) store(r, 16 * HALF, value[r]);
}

template <int BITS, class Store>
inline void rows_bits(const Weight& weight, int64_t first, int64_t last, Store store) {
  const int64_t groups = weight.columns / weight.group, words_per_row = weight.columns / 32 * BITS;
  const __m512 table = code_table<BITS>();
  const __m512 middle = _mm512_set1_ps(static_cast<float>(1 << (BITS - 1)));
  for (int64_t p = first; p < last; ++p) {
    __m512 scale = _mm512_setzero_ps(), shift = _mm512_setzero_ps();
    for (int64_t i = 0; i < weight.columns; i += 32) {
      if (i % weight.group == 0) {
        const int64_t offset = (p * groups + i / weight.group) * PANEL;
        scale = load_lanes(weight.scale, weight.scale_type, offset);
        if (weight.zero) shift = _mm512_sub_ps(load_lanes(weight.zero, weight.zero_type, offset), middle);
      }
      const uint32_t* words = weight.codes + (p * words_per_row + i / 32 * BITS) * PANEL;
      auto put = [&](int row, int input, __m512 value) __attribute__((always_inline)) {
        store(((p - first) * PANEL + row) * weight.columns + i + input, value);
      };
      rows_of_half<BITS, 0>(words, table, scale, shift, put, std::make_integer_sequence<int, 16>{});
      rows_of_half<BITS, 1>(words, table, scale, shift, put, std::make_integer_sequence<int, 16>{});
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

inline __m256i to_bf16(__m512 value) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)); }

inline void weight_rows_bf16(const Weight& weight, uint16_t* out, int64_t first, int64_t last) {
  weight_rows(weight, first, last, [=](int64_t at, __m512 value) __attribute__((always_inline)) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + at), to_bf16(value));
  });
}

inline void weight_rows_f32(const Weight& weight, float* out, int64_t first, int64_t last) {
  weight_rows(weight, first, last, [=](int64_t at, __m512 value) __attribute__((always_inline)) {
    _mm512_storeu_ps(out + at, value);
  });
}

inline void to_f32(const void* from, Type type, float* to, int64_t count) {
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) _mm512_storeu_ps(to + i, load_lanes(from, type, i));
  for (; i < count; ++i) to[i] = load_value(from, type, i);
}

inline void from_f32(const float* from, void* to, Type type, int64_t count) {
  int64_t i = 0;
  for (; type != Type::f32 && i + 16 <= count; i += 16) {
    const __m512 value = _mm512_loadu_ps(from + i);
    const __m256i half = type == Type::bf16 ? to_bf16(value) : _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(static_cast<uint16_t*>(to) + i), half);
  }
  for (; i < count; ++i) store_value(to, type, i, from[i]);
}

inline void group_sums(const float* x, int64_t count, int64_t group, float* sums) {
  for (int64_t g = 0; g < count / group; ++g) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < group; i += 16) sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + g * group + i));
    sums[g] = _mm512_reduce_add_ps(sum);
  }
}

inline __mmask16 tail_mask(int64_t left) {
  return left >= 16 ? static_cast<__mmask16>(0xffff) : static_cast<__mmask16>((1u << left) - 1u);
}

inline void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, float* y) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < count; i += 16) {
    const __m512 value = _mm512_maskz_loadu_ps(tail_mask(count - i), x + i);
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  const float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(count);
  const __m512 factor = _mm512_set1_ps(1.0f / __builtin_sqrtf(mean + epsilon));
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512 scaled = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x + i), factor);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(scaled, _mm512_maskz_loadu_ps(mask, weight + i)));
  }
}

inline float dot(const float* a, const void* b, Type type, int64_t count) {
  __m512 sum = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= count; i += 16) sum = _mm512_fmadd_ps(_mm512_loadu_ps(a + i), load_lanes(b, type, i), sum);
  float rest = 0.0f;
  for (; i < count; ++i) rest += a[i] * load_value(b, type, i);
  return _mm512_reduce_add_ps(sum) + rest;
}

inline void add_scaled(float* y, const void* x, Type type, float factor, int64_t count) {
  const __m512 times = _mm512_set1_ps(factor);
  int64_t i = 0;
  for (; i + 16 <= count; i += 16)
    _mm512_storeu_ps(y + i, _mm512_fmadd_ps(times, load_lanes(x, type, i), _mm512_loadu_ps(y + i)));
  for (; i < count; ++i) y[i] += factor * load_value(x, type, i);
}

// e^x for any x, within 2 units in the last place: 2^n e^r with |r| <= ln 2 / 2, e^r by its Taylor polynomial of degree 7.
inline __m512 exponential(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.0f)), _mm512_set1_ps(88.0f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  const float coefficients[] = {1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f};
  __m512 sum = _mm512_set1_ps(coefficients[0]);
  for (int k = 1; k < 8; ++k) sum = _mm512_fmadd_ps(sum, r, _mm512_set1_ps(coefficients[k]));
  return _mm512_scalef_ps(sum, n);
}

inline void silu_times(const float* gate, const float* up, float* y, int64_t count) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < count; i += 16) {
    const __mmask16 mask = tail_mask(count - i);
    const __m512 value = _mm512_maskz_loadu_ps(mask, gate + i);
    const __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), value)));
    const __m512 activated = _mm512_div_ps(value, below);
    _mm512_mask_storeu_ps(y + i, mask, _mm512_mul_ps(activated, _mm512_maskz_loadu_ps(mask, up + i)));
  }
}

}  // namespace
}  // namespace avx512
}  // namespace compress
