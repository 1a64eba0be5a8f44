// The int8 product in portable C++. Packed activations are 16 bits wide: (K, tokens, 4) int16.
#pragma once
#include "types.h"

namespace compress {
namespace portable {
namespace {

inline float quantize_row(const float* x, const uint8_t* outlier, int64_t count, int8_t* q) {
  uint32_t most = 0;  // magnitudes order as their bits do, with NaN on top
  for (int64_t i = 0; i < count; ++i) {
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
  for (int64_t i = 0; i < count; ++i) {
    // Adding 1.5 * 2^23 rounds to an integer, ties to even; it stands in the lowest bits.
    const uint32_t code = float_to_bits(x[i] * factor + 12582912.0f);
    q[i] = static_cast<int8_t>(outlier && outlier[i] ? 0u : code & 0xffu);
  }
  for (int64_t i = count; i < padded; ++i) q[i] = 0;
  return m / 127.0f;
}

inline float flag_outliers(const float* x, float threshold, int64_t count, uint8_t* flag) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    most = magnitude > most ? magnitude : most;
    if (bits_to_float(magnitude) >= threshold) flag[i] = 1;
  }
  return bits_to_float(most);
}

inline void int8_pack(const int8_t* q, int64_t q_stride, int64_t tokens, int64_t groups, void* packed) {
  int16_t* to = static_cast<int16_t*>(packed);
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t k = 0; k < groups; ++k)
      for (int64_t i = 0; i < 4; ++i) to[(k * tokens + t) * 4 + i] = q[t * q_stride + 4 * k + i];
}

inline void int8_dot(const Int8Weight& weight, const void* packed, int64_t tokens, int32_t* acc, int64_t acc_stride,
                     int64_t first, int64_t last) {
  const int16_t* values = static_cast<const int16_t*>(packed);
  const int64_t groups = (weight.columns + 3) / 4;
  for (int64_t p = first; p < last; ++p) {
    for (int64_t t = 0; t < tokens; ++t) {
      const int8_t* code = weight.codes + p * groups * PANEL * 4;
      int32_t sum[PANEL] = {};
      for (int64_t k = 0; k < groups; ++k, code += PANEL * 4) {
        const int16_t* value = values + (k * tokens + t) * 4;
        for (int r = 0; r < PANEL; ++r) {
          const int8_t* c = code + 4 * r;
          sum[r] += c[0] * value[0] + c[1] * value[1] + c[2] * value[2] + c[3] * value[3];
        }
      }
      for (int r = 0; r < PANEL; ++r) acc[t * acc_stride + (p - first) * PANEL + r] = sum[r];
    }
  }
}

inline void int8_finish(const Int8Panel& panel, const int32_t* acc, int64_t acc_stride, int64_t tokens) {
  for (int64_t t = 0; t < tokens; ++t) {
    const float* x = panel.x + t * panel.outliers;
    for (int64_t r = 0; r < panel.lanes; ++r) {
      float y = panel.scale[r] * panel.row_scale[t] * static_cast<float>(acc[t * acc_stride + r]);
      for (int64_t j = 0; j < panel.outliers; ++j) y += x[j] * panel.w[j * PANEL + r];
      if (panel.bias) y += panel.bias[r];
      store_value(panel.y, panel.type, t * panel.y_stride + r, y);
    }
  }
}

}  // namespace
}  // namespace portable
}  // namespace compress
