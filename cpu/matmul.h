// Weight-only products: the drivers that share the kernels' work out to threads.
#pragma once
#include "kernels.h"

namespace compress {

constexpr int64_t AT_ONCE = 8;      // tokens that weight_few takes at once
constexpr int64_t FEW_TOKENS = 16;  // up to so many, reading the codes again costs less than decoding them first

// A matrix of values: `rows` of `stride` elements of `type`.
struct Rows {
  void* data;
  Type type;
  int64_t stride;
};

// y (T, O) = x (T, I) W^T + bias, sums in float32, T <= FEW_TOKENS. bias (O) of bias_type, or null (weight.bias is
// not looked at). May throw std::bad_alloc, before anything is written.
void multiply_few(const Weight& weight, const Rows& x, int64_t tokens, const void* bias, Type bias_type, const Rows& y,
                  int threads);

// Whether the kernels in use have products of bf16 pairs, so that multiply_many can be called.
bool multiplies_pairs();

// As multiply_few for any number of tokens, x (T, I) and y (T, O) bf16, x dense. Weights are rounded to bf16 first.
void multiply_many(const Weight& weight, const uint16_t* x, int64_t tokens, const void* bias, Type bias_type,
                   const Rows& y, int threads);

// Panels first <= p < last of W as rows (16 (last - first), I) of bf16 or f32, dense.
void decode_rows(const Weight& weight, void* out, Type type, int64_t first, int64_t last, int threads);

// Rows `index` (count, each in 0..O-1) of W as rows (count, I) of `type`, dense: an embedding's lookup.
void look_up_rows(const Weight& weight, const int64_t* index, int64_t count, void* out, Type type);

}  // namespace compress
