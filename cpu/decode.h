// One decode step of a Llama-like model in one call: token's hidden state in, hidden state after the last block out.
//
// Per block: h += o(attention(rope(q), rope(k), v)), with q, k, v of rms_norm(h); h += down(silu(gate) * up), with gate,
// up of rms_norm(h). Everything between the matrices is float32; only the inputs of matrices are rounded to the
// model's type, as in the model itself. The cache keeps the model's own type and layout.
#pragma once
#include <mutex>
#include <vector>

#include "int8.h"
#include "kernels.h"

namespace compress {

// One of: weight-only quantized, int8 with int8 inputs, or dense rows (O, I) of f32, bf16 or f16. Addresses are borrowed.
struct Linear {
  enum class Kind : int32_t { weight, int8, dense } kind;
  Weight weight;     // kind weight
  Int8Weight int8;   // kind int8
  Int8Outliers outliers;
  float threshold;
  const void* data;  // kind dense
  Type type;
  const float* bias;
  int64_t rows;
  int64_t columns;
};

struct DecoderBlock {
  const float *attention_norm, *mlp_norm;  // (D)
  const float *q_norm, *k_norm;            // (head_size), or null
  Linear q, k, v, o, gate, up, down;
  void *keys, *values;   // (kv_heads, capacity, head_size) of the cache's type
  int64_t window;        // how many of the last tokens are seen, this one among them; 0: all
};

struct DecoderShape {
  int64_t hidden, heads, kv_heads, head_size, rotary;  // rotary: how many of a head's features are turned
  float epsilon, attention_scale;
  Type type;  // of the model: inputs of matrices are rounded to it
  Type cache_type;
};

class Decoder {
 public:
  explicit Decoder(const DecoderShape& shape) : shape_(shape) {}

  DecoderShape shape() const { return shape_; }
  std::vector<DecoderBlock>& blocks() { return blocks_; }
  const float* final_norm = nullptr;  // (D), or null: none is applied

  // hidden (D) of the model's type -> out (D); cos, sin (rotary) of this position. `length` tokens are in the cache, of
  // `capacity` that fit; keys and values of this one are added to it. May throw std::bad_alloc, before it starts.
  // False where the input of an int8 layer was not finite; out isn't written then.
  bool step(const void* hidden, const float* cos, const float* sin, int64_t length, int64_t capacity, void* out,
            int threads);

 private:
  DecoderShape shape_;
  std::vector<DecoderBlock> blocks_;
  std::vector<float> buffer_;
  std::vector<std::vector<float>> scratch_;  // of each thread
  std::vector<Int8Row> rows_;                // of each thread
  std::mutex busy_;
};

}  // namespace compress
