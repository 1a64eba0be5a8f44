// Shares the panels of a weight-only quantized layer out to threads.
#include "matmul.h"

#include <algorithm>
#include <vector>

#include "types.h"

namespace compress {
namespace {

// Work of less than this many bytes of codes per thread isn't worth waking one for (a few microseconds).
constexpr int64_t BYTES_PER_THREAD = 16384;

int64_t panels_of(const Weight& weight) { return (weight.rows + PANEL - 1) / PANEL; }

int choose_threads(const Weight& weight, int64_t panels, int64_t tokens, int threads) {
  const int64_t bytes = panels * PANEL * weight.columns / 8 * weight.bits * tokens;
  const int64_t worth = std::min(bytes / BYTES_PER_THREAD, panels);
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, worth)));
}

// Grows and is kept: a decode step calls hundreds of times.
float* scratch(int64_t count) {
  thread_local std::vector<float> buffer;
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

struct FewJob {
  const Kernels& table;
  const Weight& weight;
  const float* x;         // float32, or
  const uint32_t* pairs;  // pairs of bf16
  const float* sums;
  int64_t tokens;
  float* y;  // float32 sums, row stride y_stride
  int64_t y_stride;
  const Rows& out;
};

void few_body(void* context, int thread, int threads) {
  const FewJob& job = *static_cast<FewJob*>(context);
  const int64_t panels = panels_of(job.weight);
  const int64_t first = panels * thread / threads, last = panels * (thread + 1) / threads;
  if (first == last) return;
  const int64_t row = first * PANEL, count = std::min(last * PANEL, job.weight.rows) - row;
  const int64_t columns = job.weight.columns, groups = columns / job.weight.group;
  for (int64_t t = 0; t < job.tokens; t += AT_ONCE) {
    const int64_t some = std::min(AT_ONCE, job.tokens - t);
    float* y = job.y + t * job.y_stride + row;
    const float* sums = job.sums + t * groups;
    if (job.pairs)
      job.table.weight_few_pairs(job.weight, job.pairs + t * columns / 2, sums, some, y, job.y_stride, first, last);
    else
      job.table.weight_few(job.weight, job.x + t * columns, sums, some, y, job.y_stride, first, last);
  }
  if (job.y == job.out.data) return;
  for (int64_t t = 0; t < job.tokens; ++t) {
    char* to = static_cast<char*>(job.out.data) + (t * job.out.stride + row) * size_of(job.out.type);
    job.table.from_f32(job.y + t * job.y_stride + row, to, job.out.type, count);
  }
}

struct RowsJob {
  const Kernels& table;
  const Weight& weight;
  void* out;
  Type type;
  int64_t first;
  int64_t last;
};

void rows_body(void* context, int thread, int threads) {
  const RowsJob& job = *static_cast<RowsJob*>(context);
  const int64_t panels = job.last - job.first;
  const int64_t first = job.first + panels * thread / threads, last = job.first + panels * (thread + 1) / threads;
  if (first == last) return;
  const int64_t offset = (first - job.first) * PANEL * job.weight.columns;
  if (job.type == Type::bf16) {
    job.table.weight_rows_bf16(job.weight, static_cast<uint16_t*>(job.out) + offset, first, last);
  } else {
    job.table.weight_rows_f32(job.weight, static_cast<float*>(job.out) + offset, first, last);
  }
}

}  // namespace

void multiply_few(const Weight& layer, const Rows& x, int64_t tokens, const void* bias, Type bias_type, const Rows& y,
                  int threads) {
  const Kernels& table = kernels();
  const int64_t inputs = layer.columns, groups = inputs / layer.group, rows = layer.rows;
  const bool dense = tokens == 1 || x.stride == inputs;
  const bool in_pairs = x.type == Type::bf16 && dense && table.weight_few_pairs;
  const bool convert_x = x.type != Type::f32 || !dense;
  const bool convert_bias = bias && bias_type != Type::f32, convert_y = y.type != Type::f32;
  float* at = scratch(tokens * groups + (in_pairs ? tokens * inputs / 2 : 0) + (convert_x ? tokens * inputs : 0) +
                      (convert_y ? tokens * rows : 0) + (convert_bias ? rows : 0));
  Weight weight = layer;
  FewJob job{table, weight, static_cast<const float*>(x.data), nullptr, at, tokens, nullptr, rows, y};
  float* const sums = at;
  at += tokens * groups;
  if (in_pairs) {
    uint32_t* pairs = reinterpret_cast<uint32_t*>(at);
    for (int64_t t = 0; t < tokens; t += AT_ONCE) {
      const int64_t some = std::min(AT_ONCE, tokens - t);
      table.to_pairs(static_cast<const uint16_t*>(x.data) + t * inputs, some, inputs, some, pairs + t * inputs / 2);
    }
    job.pairs = pairs;
    at += tokens * inputs / 2;
  }
  if (convert_x) {
    for (int64_t t = 0; t < tokens; ++t)
      table.to_f32(static_cast<const char*>(x.data) + t * x.stride * size_of(x.type), x.type, at + t * inputs, inputs);
    job.x = at;
    at += tokens * inputs;
  }
  for (int64_t t = 0; t < tokens; ++t) table.group_sums(job.x + t * inputs, inputs, layer.group, sums + t * groups);
  weight.bias = static_cast<const float*>(bias);
  if (convert_bias) {
    table.to_f32(bias, bias_type, at, rows);
    weight.bias = at;
    at += rows;
  }
  if (convert_y) {
    job.y = at;
  } else {
    job.y = static_cast<float*>(y.data);
    job.y_stride = y.stride;
  }
  run_parallel(choose_threads(weight, panels_of(weight), tokens, threads), few_body, &job);
}

void decode_rows(const Weight& weight, void* out, Type type, int64_t first, int64_t last, int threads) {
  RowsJob job{kernels(), weight, out, type, first, last};
  run_parallel(choose_threads(weight, last - first, 4, threads), rows_body, &job);
}

void look_up_rows(const Weight& weight, const int64_t* index, int64_t count, void* out, Type type) {
  const Kernels& table = kernels();
  const int64_t columns = weight.columns, groups = columns / weight.group, words = columns / 32 * weight.bits;
  const uint32_t mask = (1u << weight.bits) - 1u;
  std::vector<float> row(static_cast<size_t>(columns));
  for (int64_t n = 0; n < count; ++n) {
    const int64_t panel = index[n] / PANEL, lane = index[n] % PANEL;
    const uint32_t* codes = weight.codes + panel * words * PANEL + lane;
    for (int64_t i = 0; i < columns; ++i) {
      const int64_t half = i % 32 / 16, bit = i % 16 * weight.bits, word = i / 32 * weight.bits + bit / 16;
      const int64_t at = (panel * groups + i / weight.group) * PANEL + lane, shift = bit % 16;
      uint32_t code = (codes[word * PANEL] >> (16 * half) & 0xffffu) >> shift;
      if (shift + weight.bits > 16) code |= (codes[(word + 1) * PANEL] >> (16 * half)) << (16 - shift);
      const float zero = weight.zero ? load_value(weight.zero, weight.zero_type, at)
                                     : static_cast<float>(1 << (weight.bits - 1));
      const float scale = load_value(weight.scale, weight.scale_type, at);
      row[static_cast<size_t>(i)] = scale * (static_cast<float>(code & mask) - zero);
    }
    table.from_f32(row.data(), static_cast<char*>(out) + n * columns * size_of(type), type, columns);
  }
}

}  // namespace compress
