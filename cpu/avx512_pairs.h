// Weight-only products of bfloat16 inputs with AVX-512 BF16: vdpbf16ps multiplies 32 pairs and adds them in float32.
//
// A lane of a panel's word holds the codes of inputs j and j + 16 of a run at the same place of its two halves. vpermw
// looks at the lowest five bits of each half, so one shift and one permutation turn 32 codes into 32 bfloat16 values,
// code - 2^(bits-1), exactly (its table of 32 repeats for fewer than 5 bits). 8 bits are two such halves of a byte.
#pragma once
#include <immintrin.h>

#include <utility>

#include "avx512_weight.h"

namespace compress {
namespace avx512 {
namespace {

// table[i] = bf16((i mod 2^width - below) * times)
inline __m512i pair_table(int width, int below, int times) {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = float_to_bf16(static_cast<float>(((i & ((1 << width) - 1)) - below) * times));
  return _mm512_load_si512(table);
}

template <int BITS>
struct PairTables {
  __m512i low, high;  // high: only for 8 bits, the upper four
  PairTables()
      : low(BITS == 8 ? pair_table(4, 0, 1) : pair_table(BITS, 1 << (BITS - 1), 1)), high(pair_table(4, 8, 16)) {}
};

// The codes of inputs J and J + 16 of a run at the bottom of each half; higher bits are left as they come.
template <int BITS, int J>
inline __m512i pair_codes(const uint32_t* words) {
  constexpr int bit = J * BITS, word = bit / 16, shift = bit % 16;
  const __m512i lanes = _mm512_loadu_si512(words + word * PANEL);
  if constexpr (shift + (BITS == 8 ? 4 : BITS) > 16) {
    const __m512i next = _mm512_loadu_si512(words + (word + 1) * PANEL);
    return _mm512_or_si512(_mm512_srli_epi16(lanes, shift), _mm512_slli_epi16(next, 16 - shift));
  }
  if constexpr (shift == 0) return lanes;
  return _mm512_srli_epi32(lanes, shift);
}

inline __m512bh as_pairs(__m512i value) { return reinterpret_cast<__m512bh>(value); }

inline __m512 multiply_pairs(__m512 sum, __m512i weight, uint32_t input) {
  return _mm512_dpbf16_ps(sum, as_pairs(weight), as_pairs(_mm512_set1_epi32(static_cast<int>(input))));
}

template <int BITS, int PANELS, int TOKENS, int PARTS, int... J>
inline void add_pairs(const uint32_t* const (&words)[PANELS], const uint32_t* pairs, const PairTables<BITS>& tables,
                      __m512 (&acc)[PANELS][TOKENS][PARTS], std::integer_sequence<int, J...>) {
  auto one = [&](auto index) __attribute__((always_inline)) {
    constexpr int j = decltype(index)::value;
    __m512i low[PANELS], high[PANELS];
    for (int p = 0; p < PANELS; ++p) {
      const __m512i codes = pair_codes<BITS, j>(words[p]);
      low[p] = _mm512_permutexvar_epi16(BITS == 8 ? _mm512_and_si512(codes, _mm512_set1_epi16(15)) : codes, tables.low);
      if (BITS == 8) high[p] = _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4), tables.high);
    }
    for (int t = 0; t < TOKENS; ++t) {
      for (int p = 0; p < PANELS; ++p) {
        __m512& sum = acc[p][t][j % PARTS];
        sum = multiply_pairs(sum, low[p], pairs[j * TOKENS + t]);
        if (BITS == 8) sum = multiply_pairs(sum, high[p], pairs[j * TOKENS + t]);
      }
    }
  };
  (one(std::integral_constant<int, J>{}), ...);
}

template <int BITS, int PANELS, int TOKENS>
inline void few_pair_panels(const Weight& weight, const uint32_t* pairs, const float* sums, float* y, int64_t y_stride,
                            int64_t panel, int64_t first) {
  constexpr int PARTS = TOKENS == 1 ? 4 : TOKENS < 4 ? 2 : 1;
  const int64_t groups = weight.columns / weight.group, words_per_row = weight.columns / 32 * BITS;
  const PairTables<BITS> tables;
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
    for (int64_t i = 0; i < weight.group; i += 32, pairs += 16 * TOKENS) {
      for (int p = 0; p < PANELS; ++p)
        for (int k = 0; k < BITS; ++k)
          _mm_prefetch(reinterpret_cast<const char*>(words[p] + (k + 8 * BITS) * PANEL), _MM_HINT_T0);
      add_pairs<BITS, PANELS, TOKENS, PARTS>(words, pairs, tables, acc, std::make_integer_sequence<int, 16>{});
      for (int p = 0; p < PANELS; ++p) words[p] += BITS * PANEL;
    }
    for (int p = 0; p < PANELS; ++p) {
      const int64_t offset = ((panel + p) * groups + g) * PANEL;
      const __m512 scale = load_lanes(weight.scale, weight.scale_type, offset);
      __m512 shift = _mm512_setzero_ps();
      if (weight.zero) shift = _mm512_sub_ps(load_lanes(weight.zero, weight.zero_type, offset), middle);
      for (int t = 0; t < TOKENS; ++t) {
        __m512 sum = acc[p][t][0];
        for (int k = 1; k < PARTS; ++k) sum = _mm512_add_ps(sum, acc[p][t][k]);
        sum = _mm512_fnmadd_ps(shift, _mm512_set1_ps(sums[t * groups + g]), sum);
        total[p][t] = _mm512_fmadd_ps(scale, sum, total[p][t]);
      }
    }
  }
  for (int p = 0; p < PANELS; ++p) {
    const int64_t row = (panel + p) * PANEL;
    const __mmask16 inside = tail_mask(weight.rows - row);
    const __m512 bias = weight.bias ? _mm512_maskz_loadu_ps(inside, weight.bias + row) : _mm512_setzero_ps();
    for (int t = 0; t < TOKENS; ++t)
      _mm512_mask_storeu_ps(y + t * y_stride + (panel + p - first) * PANEL, inside, _mm512_add_ps(total[p][t], bias));
  }
}

template <int BITS, int TOKENS>
inline void few_pair_tokens(const Weight& weight, const uint32_t* pairs, const float* sums, float* y, int64_t y_stride,
                            int64_t first, int64_t last) {
  constexpr int PANELS = TOKENS <= 4 ? 2 : 1;
  int64_t p = first;
  for (; p + PANELS <= last; p += PANELS)
    few_pair_panels<BITS, PANELS, TOKENS>(weight, pairs, sums, y, y_stride, p, first);
  for (; p < last; ++p) few_pair_panels<BITS, 1, TOKENS>(weight, pairs, sums, y, y_stride, p, first);
}

template <int BITS>
inline void few_pair_bits(const Weight& weight, const uint32_t* pairs, const float* sums, int64_t tokens, float* y,
                          int64_t y_stride, int64_t first, int64_t last) {
  switch (tokens) {
    case 1: return few_pair_tokens<BITS, 1>(weight, pairs, sums, y, y_stride, first, last);
    case 2: return few_pair_tokens<BITS, 2>(weight, pairs, sums, y, y_stride, first, last);
    case 3: return few_pair_tokens<BITS, 3>(weight, pairs, sums, y, y_stride, first, last);
    case 4: return few_pair_tokens<BITS, 4>(weight, pairs, sums, y, y_stride, first, last);
    case 5: return few_pair_tokens<BITS, 5>(weight, pairs, sums, y, y_stride, first, last);
    case 6: return few_pair_tokens<BITS, 6>(weight, pairs, sums, y, y_stride, first, last);
    case 7: return few_pair_tokens<BITS, 7>(weight, pairs, sums, y, y_stride, first, last);
    case 8: return few_pair_tokens<BITS, 8>(weight, pairs, sums, y, y_stride, first, last);
    default: return;
  }
}

inline void weight_few_pairs(const Weight& weight, const uint32_t* pairs, const float* sums, int64_t tokens, float* y,
                             int64_t y_stride, int64_t first, int64_t last) {
  switch (weight.bits) {
    case 2: return few_pair_bits<2>(weight, pairs, sums, tokens, y, y_stride, first, last);
    case 3: return few_pair_bits<3>(weight, pairs, sums, tokens, y, y_stride, first, last);
    case 4: return few_pair_bits<4>(weight, pairs, sums, tokens, y, y_stride, first, last);
    default: return few_pair_bits<8>(weight, pairs, sums, tokens, y, y_stride, first, last);
  }
}

inline void to_pairs(const uint16_t* x, int64_t tokens, int64_t columns, int64_t width, uint32_t* pairs) {
  for (int64_t run = 0; run < columns / 32; ++run, pairs += 16 * width) {
    alignas(64) uint32_t lanes[TILE][16];
    for (int64_t t = 0; t < width; ++t) {
      if (t >= tokens) {
        _mm512_store_si512(lanes[t], _mm512_setzero_si512());
        continue;
      }
      const __m256i* at = reinterpret_cast<const __m256i*>(x + t * columns + run * 32);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at + 1));
      _mm512_store_si512(lanes[t], _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
    if (width == 1) {
      _mm512_storeu_si512(pairs, _mm512_load_si512(lanes[0]));
      continue;
    }
    for (int j = 0; j < 16; ++j)
      for (int64_t t = 0; t < width; ++t) pairs[j * width + t] = lanes[t][j];
  }
}

// bf16 pairs, scaled, of one run of a panel: out[32 j + ...] for j < 16, 16 lanes each (out's rows hold two panels).
// scale * code - offset is exact in float32 where the scale has 16 bits, so rounding to bf16 is the only one.
template <int BITS, int... J>
inline void scale_run(const uint32_t* words, __m512 table, __m512 scale, __m512 offset, __m512i interleave,
                      uint32_t* out, std::integer_sequence<int, J...>) {
  auto one = [&](auto index) __attribute__((always_inline)) {
    constexpr int j = decltype(index)::value;
    const __m512 low = _mm512_fmsub_ps(scale, unpack_code<BITS, j>(words, table), offset);
    const __m512 high = _mm512_fmsub_ps(scale, unpack_code<BITS, j + 16>(words, table), offset);
    const __m512i halves = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));  // 16 of low, then 16 of high
    _mm512_store_si512(out + 32 * j, _mm512_permutexvar_epi16(interleave, halves));
  };
  (one(std::integral_constant<int, J>{}), ...);
}

template <int BITS>
inline void scale_block(const Weight& weight, int64_t panel, int64_t from, int64_t to, uint32_t* out) {
  const int64_t groups = weight.columns / weight.group, words_per_row = weight.columns / 32 * BITS;
  const __m512 table = code_table<BITS>();
  const __m512 middle = _mm512_set1_ps(static_cast<float>(1 << (BITS - 1)));
  alignas(64) uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  const __m512i interleave = _mm512_load_si512(order);
  __m512 scale = _mm512_setzero_ps(), offset = _mm512_setzero_ps();
  for (int64_t i = from; i < to; i += 32, out += 16 * 32) {
    if (i == from || i % weight.group == 0) {
      const int64_t at = (panel * groups + i / weight.group) * PANEL;
      scale = load_lanes(weight.scale, weight.scale_type, at);
      if (weight.zero)
        offset = _mm512_mul_ps(scale, _mm512_sub_ps(load_lanes(weight.zero, weight.zero_type, at), middle));
    }
    const uint32_t* words = weight.codes + (panel * words_per_row + i / 32 * BITS) * PANEL;
    scale_run<BITS>(words, table, scale, offset, interleave, out, std::make_integer_sequence<int, 16>{});
  }
}

// TILE tokens x PANELS panels over `count` pairs; y (+)= sum, tokens beyond `tokens` are not stored.
template <int PANELS>
inline void multiply_tile(const uint32_t* pairs, const uint32_t* block, int64_t count, int64_t tokens, float* y,
                          int64_t y_stride, bool add, const __mmask16 (&inside)[2]) {
  __m512 acc[TILE][PANELS];
  for (int t = 0; t < TILE; ++t)
    for (int p = 0; p < PANELS; ++p)
      acc[t][p] = add && t < tokens ? _mm512_maskz_loadu_ps(inside[p], y + t * y_stride + p * PANEL) : _mm512_setzero_ps();
  for (int64_t i = 0; i < count; ++i, pairs += TILE, block += 32) {
    __m512i value[PANELS];
    for (int p = 0; p < PANELS; ++p) value[p] = _mm512_load_si512(block + p * PANEL);
#pragma GCC unroll 12
    for (int t = 0; t < TILE; ++t)
      for (int p = 0; p < PANELS; ++p) acc[t][p] = multiply_pairs(acc[t][p], value[p], pairs[t]);
  }
  for (int t = 0; t < TILE && t < tokens; ++t)
    for (int p = 0; p < PANELS; ++p) _mm512_mask_storeu_ps(y + t * y_stride + p * PANEL, inside[p], acc[t][p]);
}

inline void weight_many_pairs(const Weight& weight, const uint32_t* pairs, int64_t tokens, float* y, int64_t y_stride,
                              int64_t first, int64_t last, uint32_t* scratch) {
  const int64_t half = weight.columns / 2;
  const __mmask16 inside[2] = {tail_mask(weight.rows - first * PANEL),
                               last - first > 1 ? tail_mask(weight.rows - (first + 1) * PANEL) : __mmask16(0)};
  for (int64_t from = 0; from < weight.columns; from += RUN_BLOCK) {
    const int64_t to = from + RUN_BLOCK < weight.columns ? from + RUN_BLOCK : weight.columns;
    for (int64_t p = first; p < last; ++p) {
      uint32_t* out = scratch + (p - first) * PANEL;
      switch (weight.bits) {
        case 2: scale_block<2>(weight, p, from, to, out); break;
        case 3: scale_block<3>(weight, p, from, to, out); break;
        case 4: scale_block<4>(weight, p, from, to, out); break;
        default: scale_block<8>(weight, p, from, to, out);
      }
    }
    for (int64_t t = 0; t < tokens; t += TILE) {
      const uint32_t* tile = pairs + t * half + from / 2 * TILE;
      if (last - first > 1)
        multiply_tile<2>(tile, scratch, (to - from) / 2, tokens - t, y + t * y_stride, y_stride, from > 0, inside);
      else
        multiply_tile<1>(tile, scratch, (to - from) / 2, tokens - t, y + t * y_stride, y_stride, from > 0, inside);
    }
  }
  if (!weight.bias) return;
  for (int64_t p = first; p < last; ++p) {
    const __m512 bias = _mm512_maskz_loadu_ps(inside[p - first], weight.bias + p * PANEL);
    for (int64_t t = 0; t < tokens; ++t) {
      float* at = y + t * y_stride + (p - first) * PANEL;
      const __m512 sum = _mm512_add_ps(_mm512_maskz_loadu_ps(inside[p - first], at), bias);
      _mm512_mask_storeu_ps(at, inside[p - first], sum);
    }
  }
}

}  // namespace
}  // namespace avx512
}  // namespace compress
