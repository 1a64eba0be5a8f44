// Weight-only products and the pieces of a decoder block in portable C++: the lanes of a panel are a plain loop that
// any compiler can turn into what the target has.
#pragma once
#include <cmath>

#include "attend.h"
#include "types.h"

namespace compress {
namespace portable {
namespace {

// Code of input `i` (within its run of 32) for each lane, minus 2^(bits-1). `words` is the run's first word (bits, 16).
inline void unpack_lanes(const uint32_t* words, int bits, int i, float* codes) {
  const int half = i >> 4, bit = (i & 15) * bits, word = bit >> 4, shift = bit & 15;
  const uint32_t mask = (1u << bits) - 1u;
  const float middle = static_cast<float>(1 << (bits - 1));
  const uint32_t* low = words + word * PANEL;
  const bool straddles = shift + bits > 16;
  for (int r = 0; r < PANEL; ++r) {
    uint32_t code = ((low[r] >> (16 * half)) & 0xffffu) >> shift;
    if (straddles) code |= (low[PANEL + r] >> (16 * half)) << (16 - shift);
    codes[r] = static_cast<float>(code & mask) - middle;
  }
}

inline void load_lanes(const void* from, Type type, int64_t offset, float* to) {
  for (int r = 0; r < PANEL; ++r) to[r] = load_value(from, type, offset + r);
}

// zero - 2^(bits-1) of a group for each lane.
inline void load_shift(const Weight& weight, int64_t offset, float* shift) {
  const float middle = static_cast<float>(1 << (weight.bits - 1));
  for (int r = 0; r < PANEL; ++r)
    shift[r] = weight.zero ? load_value(weight.zero, weight.zero_type, offset + r) - middle : 0.0f;
}

inline void weight_few(const Weight& weight, const float* x, const float* sums, int64_t tokens, float* y,
                       int64_t y_stride, int64_t first, int64_t last) {
  const int64_t groups = weight.columns / weight.group, words = weight.columns / 32 * weight.bits;
  for (int64_t p = first; p < last; ++p) {
    for (int64_t t = 0; t < tokens; ++t) {
      float total[PANEL] = {};
      for (int64_t g = 0; g < groups; ++g) {
        float partial[PANEL] = {}, codes[PANEL], scale[PANEL], shift[PANEL];
        for (int64_t i = g * weight.group; i < (g + 1) * weight.group; ++i) {
          unpack_lanes(weight.codes + (p * words + i / 32 * weight.bits) * PANEL, weight.bits, i % 32, codes);
          const float value = x[t * weight.columns + i];
          for (int r = 0; r < PANEL; ++r) partial[r] += codes[r] * value;
        }
        load_lanes(weight.scale, weight.scale_type, (p * groups + g) * PANEL, scale);
        load_shift(weight, (p * groups + g) * PANEL, shift);
        for (int r = 0; r < PANEL; ++r) total[r] += scale[r] * (partial[r] - shift[r] * sums[t * groups + g]);
      }
      for (int r = 0; r < PANEL && p * PANEL + r < weight.rows; ++r)
        y[t * y_stride + (p - first) * PANEL + r] = total[r] + (weight.bias ? weight.bias[p * PANEL + r] : 0.0f);
    }
  }
}

template <class Store>
inline void weight_rows(const Weight& weight, int64_t first, int64_t last, Store store) {
  const int64_t groups = weight.columns / weight.group, words = weight.columns / 32 * weight.bits;
  for (int64_t p = first; p < last; ++p) {
    float codes[PANEL], scale[PANEL], shift[PANEL];
    for (int64_t i = 0; i < weight.columns; ++i) {
      if (i % weight.group == 0) {
        const int64_t offset = (p * groups + i / weight.group) * PANEL;
        load_lanes(weight.scale, weight.scale_type, offset, scale);
        load_shift(weight, offset, shift);
      }
      unpack_lanes(weight.codes + (p * words + i / 32 * weight.bits) * PANEL, weight.bits, i % 32, codes);
      for (int r = 0; r < PANEL; ++r)
        store(((p - first) * PANEL + r) * weight.columns + i, scale[r] * (codes[r] - shift[r]));
    }
  }
}

inline void weight_rows_bf16(const Weight& weight, uint16_t* out, int64_t first, int64_t last) {
  weight_rows(weight, first, last, [=](int64_t at, float value) { out[at] = float_to_bf16(value); });
}

inline void weight_rows_f32(const Weight& weight, float* out, int64_t first, int64_t last) {
  weight_rows(weight, first, last, [=](int64_t at, float value) { out[at] = value; });
}

inline void to_f32(const void* from, Type type, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = load_value(from, type, i);
}

inline void from_f32(const float* from, void* to, Type type, int64_t count) {
  for (int64_t i = 0; i < count; ++i) store_value(to, type, i, from[i]);
}

inline void group_sums(const float* x, int64_t count, int64_t group, float* sums) {
  for (int64_t g = 0; g < count / group; ++g) {
    float sum = 0.0f;
    for (int64_t i = 0; i < group; ++i) sum += x[g * group + i];
    sums[g] = sum;
  }
}

inline void rms_norm(const float* x, const float* weight, float epsilon, int64_t count, float* y) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) y[i] = x[i] * factor * weight[i];
}

inline float dot(const float* a, const void* b, Type type, int64_t count) {
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) sum += a[i] * load_value(b, type, i);
  return sum;
}

inline void add_scaled(float* y, const void* x, Type type, float factor, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] += factor * load_value(x, type, i);
}

inline void silu_times(const float* gate, const float* up, float* y, int64_t count) {
  for (int64_t i = 0; i < count; ++i) y[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

inline void attend(const float* q, const void* keys, const void* values, Type type, int64_t size, int64_t count,
                   float scale, float* scores, float* out) {
  attend_with(dot, add_scaled, q, keys, values, type, size, count, scale, scores, out);
}

}  // namespace
}  // namespace portable
}  // namespace compress
