// Attention of one query in plain loops over an instruction set's dot and add_scaled.
#pragma once
#include <cmath>

#include "types.h"

namespace compress {
namespace {

template <class Dot, class AddScaled>
inline void attend_with(Dot dot, AddScaled add_scaled, const float* q, const void* keys, const void* values, Type type,
                        int64_t size, int64_t count, float scale, float* scores, float* out) {
  const char *key = static_cast<const char*>(keys), *value = static_cast<const char*>(values);
  const int64_t row = size * size_of(type);
  float highest = -INFINITY, sum = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    scores[t] = dot(q, key + t * row, type, size) * scale;
    if (scores[t] > highest) highest = scores[t];
  }
  for (int64_t i = 0; i < size; ++i) out[i] = 0.0f;
  for (int64_t t = 0; t < count; ++t) {
    const float weight = std::exp(scores[t] - highest);
    sum += weight;
    add_scaled(out, value + t * row, type, weight, size);
  }
  for (int64_t i = 0; i < size; ++i) out[i] /= sum;
}

}  // namespace
}  // namespace compress
