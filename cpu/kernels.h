// What every instruction set implements, in plain C++ types: no Python, no torch. One table of functions per
// instruction set (portable.cpp, avx2.cpp, avx512.cpp); isa.cpp chooses one at run time.
//
// Letters: O out features, I in features, P panels of 16 out features, G groups of inputs, T tokens.
// Every function works on one thread; the callers (matmul.cpp, int8.cpp, decode.cpp) share work out.
#pragma once
#include <cstdint>

namespace compress {

constexpr int64_t PANEL = 16;  // out features that lie side by side, one per 32-bit lane of a 512-bit register

constexpr int64_t TILE = 12;  // tokens that the many-token kernel keeps in registers
constexpr int64_t RUN_BLOCK = 2048;  // inputs of two panels that it keeps in the second-level cache

enum class Type : int32_t { none = 0, f32 = 1, bf16 = 2, f16 = 3, u8 = 4 };

// Weight-only quantized (O, I): w[o][i] = scale[o][g] * (code[o][i] - zero[o][g]), g = i / group.
// codes (P, I * bits / 32, 16) uint32: a run of 32 inputs takes `bits` words per lane; their low halves hold the codes
// of the first 16 inputs as one string of bits, lowest first, their high halves those of the other 16. So inputs j and
// j + 16 of a run share a lane, at the same place of its two halves. Rows from O to 16 P have scale 0. I is a multiple
// of 32, so is group (one group per row: group = I).
struct Weight {
  const uint32_t* codes;
  const void* scale;   // (P, G, 16) of scale_type: f32, bf16 or f16
  const void* zero;    // (P, G, 16) of zero_type: u8, or as the scale; null: 2^(bits-1) everywhere
  const float* bias;   // (O), or null
  int64_t rows;        // O
  int64_t columns;     // I
  int64_t group;
  int32_t bits;        // 2, 3, 4 or 8
  Type scale_type;
  Type zero_type;
};

// int8 (O, I): w[o][i] = scale[o] * code[o][i], codes -127..127.
// codes (P, K, 16, 4) int8, K = ceil(I / 4): four neighbouring inputs of a row share a 32-bit lane; the rest is zero.
struct Int8Weight {
  const int8_t* codes;
  const float* scale;   // (16 P), zero beyond O
  const int32_t* sums;  // (16 P): sum of a row's codes
  const float* bias;    // (O), or null
  int64_t rows;
  int64_t columns;
};

constexpr int64_t INT8_TILE = 12;  // tokens that the int8 product takes at once

// What turns the int32 sums of up to INT8_TILE tokens and one panel into outputs.
struct Int8Panel {
  const float* row_scale;  // (tokens)
  const float* scale;      // (16)
  const float* bias;       // (lanes), or null
  const float* x;          // (tokens, outliers) inputs of the features in high precision
  const float* w;          // (outliers, 16) their weights
  int64_t outliers;
  int64_t lanes;           // out features of this panel that exist, 1..16
  void* y;                 // (tokens, lanes) of type f32, bf16 or f16, row stride y_stride elements
  int64_t y_stride;
  Type type;
};

constexpr int64_t KEYS = 64;  // that the causal attention looks at at once; packed keys and values are padded to it

// Queries first <= position < first + rows (rows <= TILE) of one head against the keys and values up to their own.
struct CausalTile {
  const uint16_t* q;       // (rows, size) bf16, row stride q_stride
  int64_t q_stride;
  int64_t rows;
  int64_t first;
  const uint32_t* keys;    // what pack_keys and pack_values made, zeros up to a multiple of KEYS
  const uint32_t* values;
  int64_t size;            // a multiple of 32
  float scale;
  float* scratch;          // causal_scratch(size) floats
  uint16_t* out;           // (rows, size) bf16, row stride out_stride
  int64_t out_stride;
};

constexpr int64_t causal_scratch(int64_t size) { return TILE * size + TILE * KEYS + size / 2 * TILE + TILE * KEYS / 2; }

struct Kernels {
  const char* name;

  // y[t][o - 16 * first] for the panels first <= p < last: weight-only product of few tokens (T <= 8), float32 sums.
  // x (T, I) float32, row stride I; sums (T, G): sum of x over each group; y row stride y_stride. Adds the bias.
  void (*weight_few)(const Weight&, const float* x, const float* sums, int64_t tokens, float* y, int64_t y_stride,
                     int64_t first, int64_t last);
  // The weight of panels first <= p < last as bf16 (round to nearest even) or float32, row-major (16 (last-first), I).
  void (*weight_rows_bf16)(const Weight&, uint16_t* out, int64_t first, int64_t last);
  void (*weight_rows_f32)(const Weight&, float* out, int64_t first, int64_t last);

  // For bf16 inputs, where the instruction set multiplies pairs of them (else these three are null).
  // to_pairs: x (T, I) bf16 -> pairs (I / 2, width): dword [16 r + j][t] holds inputs 32 r + j (low half) and 32 r + j +
  // 16 (high half) of token t < tokens; zero for tokens <= t < width.
  void (*to_pairs)(const uint16_t* x, int64_t tokens, int64_t columns, int64_t width, uint32_t* pairs);
  // As weight_few, T <= 8, pairs of width T.
  void (*weight_few_pairs)(const Weight&, const uint32_t* pairs, const float* sums, int64_t tokens, float* y,
                           int64_t y_stride, int64_t first, int64_t last);
  // Many tokens, one or two panels (last - first <= 2): weights are first rounded to bf16, as a dense model has them.
  // pairs: ceil(T / TILE) blocks of width TILE, one after another. Adds the bias.
  // scratch: RUN_BLOCK / 2 * 32 dwords, 64-byte aligned.
  void (*weight_many_pairs)(const Weight&, const uint32_t* pairs, int64_t tokens, float* y, int64_t y_stride,
                            int64_t first, int64_t last, uint32_t* scratch);

  // float32 <-> 16 bit.
  void (*to_f32)(const void* from, Type type, float* to, int64_t count);
  void (*from_f32)(const float* from, void* to, Type type, int64_t count);
  // Sum over each group: sums (count / group).
  void (*group_sums)(const float* x, int64_t count, int64_t group, float* sums);

  // Pieces of a decoder block for one token, float32.
  void (*rms_norm)(const float* x, const float* weight, float epsilon, int64_t count, float* y);
  float (*dot)(const float* a, const void* b, Type type, int64_t count);               // sum a[i] b[i]
  void (*add_scaled)(float* y, const void* x, Type type, float factor, int64_t count);  // y += factor x
  void (*silu_times)(const float* gate, const float* up, float* y, int64_t count);      // y = gate / (1 + e^-gate) * up
  // Attention of one query (size) to `count` keys and values, rows of `size` of `type`: out = softmax(scale q K^T) V.
  // scores: room for `count` rounded up to 16.
  void (*attend)(const float* q, const void* keys, const void* values, Type type, int64_t size, int64_t count,
                 float scale, float* scores, float* out);
  // Causal attention of many bf16 tokens (null where there are no products of pairs): keys (count, size) -> packed
  // (ceil(count / 16) * 8 size) dwords, values -> (ceil(count / 2) * size) dwords; then tile by tile.
  void (*pack_keys)(const uint16_t* keys, int64_t stride, int64_t count, int64_t size, uint32_t* out);
  void (*pack_values)(const uint16_t* values, int64_t stride, int64_t count, int64_t size, uint32_t* out);
  void (*attend_tile)(const CausalTile&);

  // int8 (see int8.h for the drivers). Activations are quantized by rows, features whose |x| is large are left out.
  // One row: q = round(x * (127 / m)), m = max |x[i]| over the features that are not outliers; q of outliers is 0.
  // outlier (I) uint8 flags, or null. Returns m / 127: 0 (and q 0) where 127 / m overflows, so for a row of zeros;
  // NaN or infinity if m is. q is padded with zeros to 4 ceil(I / 4). Ties go to the even code.
  float (*quantize_row)(const float* x, const uint8_t* outlier, int64_t count, int8_t* q);
  // flag[i] |= |x[i]| >= threshold. Returns max |x[i]|, NaN if the row holds one.
  float (*flag_outliers)(const float* x, float threshold, int64_t count, uint8_t* flag);
  // Rows of q (tokens, 4 K), row stride q_stride, as int8_dot reads them: (K, tokens) groups of four neighbouring
  // inputs, 8 bytes each or less. tokens <= INT8_TILE.
  void (*int8_pack)(const int8_t* q, int64_t q_stride, int64_t tokens, int64_t groups, void* packed);
  // sum over i of q[t][i] code[o][i], exact int32, for the tokens of one tile (packed by int8_pack) and panels
  // first <= p < last: acc (tokens, 16 (last - first)), row stride acc_stride. 1 <= tokens <= INT8_TILE.
  void (*int8_dot)(const Int8Weight&, const void* packed, int64_t tokens, int32_t* acc, int64_t acc_stride,
                   int64_t first, int64_t last);
  // y[t][r] = row_scale[t] scale[r] acc[t][r] + sum over j of x[t][j] w[j][r] + bias[r], one panel.
  void (*int8_finish)(const Int8Panel&, const int32_t* acc, int64_t acc_stride, int64_t tokens);
};

const Kernels* portable_kernels();
const Kernels* avx2_kernels();    // null where the compiler or the CPU lacks it
const Kernels* avx512_kernels();  // AVX-512 F, BW, VL, DQ, VNNI, BF16

// The table in use. select("auto" | "portable" | "avx2" | "avx512") returns false if this CPU or build lacks it.
const Kernels& kernels();
bool select_kernels(const char* name);

// body(thread, threads) on every thread of the pool, at the same time. Nested calls run on one thread.
void run_parallel(int threads, void (*body)(void* context, int thread, int threads), void* context);
// PyTorch's own OpenMP runtime (addresses of GOMP_parallel, omp_get_thread_num and omp_get_num_threads), so that both
// share one pool of threads; without it run_parallel keeps threads of its own.
void use_openmp(void* parallel, void* thread_number, void* thread_total);

}  // namespace compress
