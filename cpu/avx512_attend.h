// Attention of one query with AVX-512: 16 keys at a time, their sums turned into one register of scores.
#pragma once
#include "attend.h"
#include "avx512_weight.h"

namespace compress {
namespace avx512 {
namespace {

template <Type TYPE>
inline __m512 load_row(const void* row, int64_t at) {
  return load_lanes(row, TYPE, at);
}

// scores[t] = scale q K[t]; returns the highest.
template <Type TYPE>
inline float score_keys(const float* q, const char* keys, int64_t row, int64_t size, int64_t count, float scale,
                        float* scores) {
  __m512 highest = _mm512_set1_ps(-__builtin_inff());
  for (int64_t t = 0; t < count; t += 16) {
    __m512 sum[16];
    for (int r = 0; r < 16; ++r) {
      sum[r] = _mm512_setzero_ps();
      const char* key = keys + (t + r < count ? t + r : count - 1) * row;
      for (int64_t i = 0; i < size; i += 16)
        sum[r] = _mm512_fmadd_ps(_mm512_loadu_ps(q + i), load_row<TYPE>(key, i), sum[r]);
    }
    transpose(sum);  // now sum[i] holds lane i of all 16 keys
    for (int step = 8; step; step /= 2)
      for (int i = 0; i < step; ++i) sum[i] = _mm512_add_ps(sum[i], sum[i + step]);
    const __m512 score = _mm512_mul_ps(sum[0], _mm512_set1_ps(scale));
    _mm512_storeu_ps(scores + t, score);
    highest = _mm512_mask_max_ps(highest, tail_mask(count - t), highest, score);
  }
  return _mm512_reduce_max_ps(highest);
}

// scores[t] = e^(scores[t] - highest); returns their sum.
inline float raise_scores(float* scores, int64_t count, float highest) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t += 16) {
    const __m512 raised = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + t), _mm512_set1_ps(highest)));
    _mm512_storeu_ps(scores + t, raised);
    sum = _mm512_mask_add_ps(sum, tail_mask(count - t), sum, raised);
  }
  return _mm512_reduce_add_ps(sum);
}

template <Type TYPE, int VECTORS>
inline void mix_values(const float* scores, const char* values, int64_t row, int64_t at, int64_t count, float factor,
                       float* out) {
  __m512 sum[VECTORS];
  for (int k = 0; k < VECTORS; ++k) sum[k] = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; ++t) {
    const __m512 weight = _mm512_set1_ps(scores[t]);
    for (int k = 0; k < VECTORS; ++k)
      sum[k] = _mm512_fmadd_ps(weight, load_row<TYPE>(values + t * row, at + 16 * k), sum[k]);
  }
  for (int k = 0; k < VECTORS; ++k)
    _mm512_storeu_ps(out + at + 16 * k, _mm512_mul_ps(sum[k], _mm512_set1_ps(factor)));
}

template <Type TYPE>
inline void attend_type(const float* q, const void* keys, const void* values, int64_t size, int64_t count, float scale,
                        float* scores, float* out) {
  const int64_t row = size * size_of(TYPE);
  const float highest = score_keys<TYPE>(q, static_cast<const char*>(keys), row, size, count, scale, scores);
  const float factor = 1.0f / raise_scores(scores, count, highest);
  const char* from = static_cast<const char*>(values);
  int64_t at = 0;
  for (; at + 64 <= size; at += 64) mix_values<TYPE, 4>(scores, from, row, at, count, factor, out);
  for (; at < size; at += 16) mix_values<TYPE, 1>(scores, from, row, at, count, factor, out);
}

inline void attend(const float* q, const void* keys, const void* values, Type type, int64_t size, int64_t count,
                   float scale, float* scores, float* out) {
  if (size % 16) return attend_with(dot, add_scaled, q, keys, values, type, size, count, scale, scores, out);
  switch (type) {
    case Type::bf16: return attend_type<Type::bf16>(q, keys, values, size, count, scale, scores, out);
    case Type::f16: return attend_type<Type::f16>(q, keys, values, size, count, scale, scores, out);
    default: return attend_type<Type::f32>(q, keys, values, size, count, scale, scores, out);
  }
}

}  // namespace
}  // namespace avx512
}  // namespace compress
