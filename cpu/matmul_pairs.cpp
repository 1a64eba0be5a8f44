// Weight-only products of many bfloat16 tokens, on instruction sets that multiply pairs of them: tasks of two panels and
// a stretch of tokens, taken by whichever thread is free.
#include <algorithm>
#include <atomic>
#include <vector>

#include "matmul.h"

namespace compress {
namespace {

constexpr int64_t WIDTH = 2 * PANEL;
constexpr int64_t TOKENS_PER_TASK = 85 * TILE;  // the float32 sums of a task stay in the second-level cache

int64_t panels_of(const Weight& weight) { return (weight.rows + PANEL - 1) / PANEL; }

// Memory of one thread that grows and is kept, on a cache line.
class Scratch {
 public:
  template <class T>
  T* take(int64_t count) {
    const size_t bytes = static_cast<size_t>(count) * sizeof(T) + 64;
    if (data_.size() < bytes) data_ = std::vector<char>(bytes);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(data_.data()) + 63) / 64 * 64);
  }

 private:
  std::vector<char> data_;
};

struct Job {
  const Kernels& table;
  const Weight& weight;
  const uint16_t* x;
  const Rows& y;
  int64_t tokens;
  uint32_t* pairs;
  std::atomic<int64_t> next{0};
};

void pack_body(void* context, int thread, int threads) {
  const Job& job = *static_cast<Job*>(context);
  const int64_t columns = job.weight.columns, tiles = (job.tokens + TILE - 1) / TILE;
  for (int64_t tile = tiles * thread / threads; tile < tiles * (thread + 1) / threads; ++tile) {
    const int64_t t = tile * TILE;
    job.table.to_pairs(job.x + t * columns, std::min(TILE, job.tokens - t), columns, TILE, job.pairs + t * columns / 2);
  }
}

void multiply_body(void* context, int, int) {
  Job& job = *static_cast<Job*>(context);
  const int64_t panels = panels_of(job.weight), couples = (panels + 1) / 2;
  const int64_t stretches = (job.tokens + TOKENS_PER_TASK - 1) / TOKENS_PER_TASK;
  thread_local Scratch block_memory, sum_memory;
  uint32_t* block = block_memory.take<uint32_t>(RUN_BLOCK / 2 * WIDTH);
  float* sums = sum_memory.take<float>(std::min(job.tokens, TOKENS_PER_TASK) * WIDTH);
  for (int64_t task; (task = job.next.fetch_add(1, std::memory_order_relaxed)) < couples * stretches;) {
    const int64_t first = task / stretches * 2, last = std::min(first + 2, panels), row = first * PANEL;
    const int64_t from = task % stretches * TOKENS_PER_TASK, tokens = std::min(TOKENS_PER_TASK, job.tokens - from);
    const int64_t count = std::min(last * PANEL, job.weight.rows) - row;
    job.table.weight_many_pairs(job.weight, job.pairs + from * job.weight.columns / 2, tokens, sums, WIDTH, first, last,
                                block);
    uint16_t* to = static_cast<uint16_t*>(job.y.data) + from * job.y.stride + row;
    for (int64_t t = 0; t < tokens; ++t) job.table.from_f32(sums + t * WIDTH, to + t * job.y.stride, Type::bf16, count);
  }
}

}  // namespace

bool multiplies_pairs() { return kernels().weight_many_pairs != nullptr; }

void multiply_many(const Weight& layer, const uint16_t* x, int64_t tokens, const void* bias, Type bias_type,
                   const Rows& y, int threads) {
  const Kernels& table = kernels();
  thread_local Scratch pair_memory, bias_memory;
  const int64_t padded = (tokens + TILE - 1) / TILE * TILE;
  Weight weight = layer;
  weight.bias = static_cast<const float*>(bias);
  if (bias && bias_type != Type::f32) {
    float* converted = bias_memory.take<float>(layer.rows);
    table.to_f32(bias, bias_type, converted, layer.rows);
    weight.bias = converted;
  }
  Job job{table, weight, x, y, tokens, pair_memory.take<uint32_t>(padded * layer.columns / 2)};
  run_parallel(threads, pack_body, &job);
  run_parallel(threads, multiply_body, &job);
}

}  // namespace compress
