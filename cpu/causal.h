// Causal attention of many tokens.
#pragma once
#include "kernels.h"

namespace compress {

// (batch, heads, tokens, size) bf16 with neighbouring features side by side; strides in elements.
struct Heads {
  uint16_t* data;
  int64_t batch_stride, head_stride, token_stride;
};

struct CausalShape {
  int64_t batch, heads, kv_heads, tokens, size;
  float scale;
};

// Whether the kernels in use have it.
bool has_causal();

// out = softmax(scale q k^T, each token seeing itself and what is before it) v. size is a multiple of 32.
void attend_causal(const CausalShape& shape, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                   int threads);

}  // namespace compress
