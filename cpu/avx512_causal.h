// Causal attention of many bfloat16 tokens with AVX-512 BF16: tiles of TILE queries against blocks of KEYS keys, with a
// running maximum and sum (online softmax), so that scores never leave the first-level cache.
#pragma once
#include "avx512_attend.h"
#include "avx512_pairs.h"

namespace compress {
namespace avx512 {
namespace {

// Rows of 16 keys -> (size / 2, 16) dwords: lane r of dword d holds features 2 d and 2 d + 1 of key r.
inline void pack_keys(const uint16_t* keys, int64_t stride, int64_t count, int64_t size, uint32_t* out) {
  for (int64_t key = 0; key < count; key += 16, out += 8 * size) {
    for (int64_t d = 0; d < size / 2; d += 16) {
      __m512 rows[16];
      for (int64_t r = 0; r < 16; ++r)
        rows[r] = key + r < count ? _mm512_loadu_ps(keys + (key + r) * stride + 2 * d) : _mm512_setzero_ps();
      transpose(rows);
      for (int64_t i = 0; i < 16; ++i) _mm512_storeu_ps(out + (d + i) * 16, rows[i]);
    }
  }
}

// Two values -> (size) dwords: the earlier one's feature in the low half.
inline void pack_values(const uint16_t* values, int64_t stride, int64_t count, int64_t size, uint32_t* out) {
  for (int64_t key = 0; key < count; key += 2, out += size) {
    for (int64_t d = 0; d < size; d += 16) {
      const __m256i* low = reinterpret_cast<const __m256i*>(values + key * stride + d);
      const __m256i* high = reinterpret_cast<const __m256i*>(values + (key + 1) * stride + d);
      __m512i lanes = _mm512_cvtepu16_epi32(_mm256_loadu_si256(low));
      if (key + 1 < count)
        lanes = _mm512_or_si512(lanes, _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(high)), 16));
      _mm512_storeu_si512(out + d, lanes);
    }
  }
}

// scores[t][32 half ..] = scale q k of 32 keys.
inline void score_tile(const uint32_t* q, const uint32_t* keys, int64_t size, float scale, float* scores) {
  __m512 acc[TILE][2];
  for (int t = 0; t < TILE; ++t) acc[t][0] = acc[t][1] = _mm512_setzero_ps();
  for (int64_t d = 0; d < size / 2; ++d, q += TILE, keys += 16) {
    const __m512i first = _mm512_loadu_si512(keys), second = _mm512_loadu_si512(keys + 8 * size);
#pragma GCC unroll 12
    for (int t = 0; t < TILE; ++t) {
      acc[t][0] = multiply_pairs(acc[t][0], first, q[t]);
      acc[t][1] = multiply_pairs(acc[t][1], second, q[t]);
    }
  }
  const __m512 times = _mm512_set1_ps(scale);
  for (int t = 0; t < TILE; ++t) {
    _mm512_storeu_ps(scores + t * KEYS, _mm512_mul_ps(acc[t][0], times));
    _mm512_storeu_ps(scores + t * KEYS + 16, _mm512_mul_ps(acc[t][1], times));
  }
}

// One row of scores (KEYS), of which the first `seen` count: shares[] = bf16(e^(score - maximum)). Updates the row's
// maximum and sum, returns what earlier results are to be multiplied with.
inline float soften(float* scores, int64_t seen, float& highest, float& sum, uint16_t* shares) {
  __m512 row[KEYS / 16], most = _mm512_set1_ps(highest);
  for (int i = 0; i < KEYS / 16; ++i) {
    row[i] = _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), seen > 16 * i ? tail_mask(seen - 16 * i) : 0,
                                  scores + 16 * i);
    most = _mm512_max_ps(most, row[i]);
  }
  const float now = _mm512_reduce_max_ps(most);
  __m512 total = _mm512_setzero_ps();
  for (int i = 0; i < KEYS / 16; ++i) {
    const __mmask16 inside = seen > 16 * i ? tail_mask(seen - 16 * i) : static_cast<__mmask16>(0);
    const __m512 raised = _mm512_maskz_mov_ps(inside, exponential(_mm512_sub_ps(row[i], _mm512_set1_ps(now))));
    total = _mm512_add_ps(total, raised);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(shares + 16 * i), to_bf16(raised));
  }
  const float factor = highest == -__builtin_inff() ? 0.0f : __builtin_expf(highest - now);
  sum = sum * factor + _mm512_reduce_add_ps(total);
  highest = now;
  return factor;
}

// out[t][d ..] = factor[t] out + shares values, 32 features of KEYS keys.
inline void mix_tile(const uint32_t* shares, const uint32_t* values, int64_t size, const float* factor, float* out) {
  __m512 acc[TILE][2];
  for (int t = 0; t < TILE; ++t)
    for (int k = 0; k < 2; ++k)
      acc[t][k] = _mm512_mul_ps(_mm512_loadu_ps(out + t * size + 16 * k), _mm512_set1_ps(factor[t]));
  for (int pair = 0; pair < KEYS / 2; ++pair, values += size) {
    const __m512i first = _mm512_loadu_si512(values), second = _mm512_loadu_si512(values + 16);
#pragma GCC unroll 12
    for (int t = 0; t < TILE; ++t) {
      acc[t][0] = multiply_pairs(acc[t][0], first, shares[t * (KEYS / 2) + pair]);
      acc[t][1] = multiply_pairs(acc[t][1], second, shares[t * (KEYS / 2) + pair]);
    }
  }
  for (int t = 0; t < TILE; ++t)
    for (int k = 0; k < 2; ++k) _mm512_storeu_ps(out + t * size + 16 * k, acc[t][k]);
}

inline void attend_tile(const CausalTile& tile) {
  const int64_t size = tile.size, seen = tile.first + tile.rows;
  float* out = tile.scratch;                                          // (TILE, size)
  float* scores = out + TILE * size;                                  // (TILE, KEYS)
  uint32_t* q = reinterpret_cast<uint32_t*>(scores + TILE * KEYS);    // (size / 2, TILE)
  uint32_t* shares = q + size / 2 * TILE;                             // (TILE, KEYS / 2)
  float highest[TILE], sum[TILE], factor[TILE];
  for (int t = 0; t < TILE; ++t) {
    highest[t] = -__builtin_inff();
    sum[t] = 0.0f;
    for (int64_t d = 0; d < size / 2; ++d) {
      uint32_t pair = 0;
      if (t < tile.rows) __builtin_memcpy(&pair, tile.q + t * tile.q_stride + 2 * d, 4);
      q[d * TILE + t] = pair;
    }
  }
  for (int64_t i = 0; i < TILE * size; ++i) out[i] = 0.0f;
  for (int64_t key = 0; key < seen; key += KEYS) {
    for (int half = 0; half < KEYS; half += 32)
      score_tile(q, tile.keys + (key + half) / 2 * size, size, tile.scale, scores + half);
    for (int t = 0; t < TILE; ++t) {
      const int64_t own = tile.first + (t < tile.rows ? t : 0) + 1 - key;  // keys that this row may see
      uint16_t* row = reinterpret_cast<uint16_t*>(shares + t * (KEYS / 2));
      factor[t] = own > 0 ? soften(scores + t * KEYS, own < KEYS ? own : KEYS, highest[t], sum[t], row) : 1.0f;
      if (own <= 0) __builtin_memset(row, 0, 2 * KEYS);
    }
    for (int64_t d = 0; d < size; d += 32)
      mix_tile(shares, tile.values + key / 2 * size + d, size, factor, out + d);
  }
  for (int64_t t = 0; t < tile.rows; ++t) {
    const __m512 times = _mm512_set1_ps(1.0f / sum[t]);
    for (int64_t d = 0; d < size; d += 16)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(tile.out + t * tile.out_stride + d),
                          to_bf16(_mm512_mul_ps(_mm512_loadu_ps(out + t * size + d), times)));
  }
}

}  // namespace
}  // namespace avx512
}  // namespace compress
