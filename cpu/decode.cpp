// The decode step: all blocks in one parallel region, threads meeting at a barrier five times per block.
#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>

#include "types.h"

namespace compress {
namespace {

// Threads of one region wait for each other: looking for a while (a phase takes microseconds), then giving way.
class Barrier {
 public:
  void wait(int threads) {
    if (threads == 1) return;
    const int round = round_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 4096) {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  std::atomic<int> arrived_{0}, round_{0};
};

// An input of matrices, in the forms that they want; each thread makes its own, since that is faster than waiting.
class Input {
 public:
  Input(const Kernels& table, Type model, int64_t largest, float* scratch, Int8Row& row, std::atomic<bool>& finite)
      : table_(table), model_(model), row_(row), finite_(finite), x_(scratch), pairs_(reinterpret_cast<uint32_t*>(scratch + largest)),
        half_(reinterpret_cast<uint16_t*>(scratch + largest + largest / 2)), sums_(scratch + 2 * largest) {}

  static int64_t scratch_size(int64_t largest) { return 2 * largest + largest / 32 + 16; }

  float* values() { return x_; }

  // After values() were filled: round them as the model would.
  void round(int64_t count) {
    count_ = count;
    group_ = 0;
    paired_ = false;
    if (model_ == Type::f32) return;
    table_.from_f32(x_, half_, model_, count);
    table_.to_f32(half_, model_, x_, count);
  }

  // Rows of panels first <= p < last: y[0] is row 16 first.
  void multiply(const Linear& linear, float* y, int64_t first, int64_t last) {
    if (first >= last) return;
    if (linear.kind == Linear::Kind::dense) return multiply_dense(linear, y, first, last);
    if (linear.kind == Linear::Kind::int8) {
      if (!row_.prepare(table_, linear.int8, linear.outliers, linear.threshold, x_)) finite_ = false;
      return row_.multiply(table_, linear.int8, first, last, y);
    }
    if (group_ != linear.weight.group) {
      group_ = linear.weight.group;
      table_.group_sums(x_, count_, group_, sums_);
    }
    if (!table_.weight_few_pairs || model_ != Type::bf16)
      return table_.weight_few(linear.weight, x_, sums_, 1, y, linear.rows, first, last);
    if (!paired_) table_.to_pairs(half_, 1, count_, 1, pairs_);
    paired_ = true;
    table_.weight_few_pairs(linear.weight, pairs_, sums_, 1, y, linear.rows, first, last);
  }

 private:
  void multiply_dense(const Linear& linear, float* y, int64_t first, int64_t last) {
    const int64_t begin = first * PANEL, end = std::min(last * PANEL, linear.rows);
    for (int64_t o = begin; o < end; ++o) {
      const char* row = static_cast<const char*>(linear.data) + o * linear.columns * size_of(linear.type);
      y[o - begin] = table_.dot(x_, row, linear.type, linear.columns) + (linear.bias ? linear.bias[o] : 0.0f);
    }
  }

  const Kernels& table_;
  const Type model_;
  Int8Row& row_;
  std::atomic<bool>& finite_;
  float* const x_;
  uint32_t* const pairs_;
  uint16_t* const half_;
  float* const sums_;
  int64_t count_ = 0, group_ = 0;
  bool paired_ = false;
};

int64_t panels_of(const Linear& linear) { return (linear.rows + PANEL - 1) / PANEL; }

struct Step {
  const Kernels& table;
  const DecoderShape& shape;
  const std::vector<DecoderBlock>& blocks;
  const float *cos, *sin;
  int64_t length, capacity, widest;
  float *hidden, *q, *k, *v, *mixed, *wide;  // shared by the threads
  std::vector<std::vector<float>>& scratch;
  std::vector<Int8Row>& rows;
  std::atomic<bool> finite{true};
  Barrier barrier{};
};

// This thread's share of `total` panels.
struct Share {
  int64_t first, last;
  Share(int64_t total, int thread, int threads) : first(total * thread / threads), last(total * (thread + 1) / threads) {}
};

// Panels of several matrices with one input, shared out as one list.
void multiply_all(Input& input, const Linear* const* linears, float* const* outputs, int count, int thread,
                  int threads) {
  int64_t total = 0;
  for (int i = 0; i < count; ++i) total += panels_of(*linears[i]);
  const Share share(total, thread, threads);
  int64_t start = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t panels = panels_of(*linears[i]);
    const int64_t first = std::max<int64_t>(share.first - start, 0), last = std::min(share.last - start, panels);
    if (first < last) input.multiply(*linears[i], outputs[i] + first * PANEL, first, last);
    start += panels;
  }
}

// Rotary position embedding of one head, "rotate half": pairs are (i, i + rotary / 2).
void turn(float* head, const float* cos, const float* sin, int64_t rotary) {
  const int64_t half = rotary / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[half + i] + a * sin[half + i];
  }
}

// q (head_size) against the cache, which holds this token's own key and value too.
void attend(const Step& step, const DecoderBlock& block, const float* q, int64_t kv_head, float* scores, float* out) {
  const DecoderShape& shape = step.shape;
  const int64_t size = shape.head_size, row = size * size_of(shape.cache_type), seen = step.length + 1;
  const int64_t first = block.window > 0 && seen > block.window ? seen - block.window : 0;
  const int64_t start = (kv_head * step.capacity + first) * row;
  step.table.attend(q, static_cast<const char*>(block.keys) + start, static_cast<const char*>(block.values) + start,
                    shape.cache_type, size, seen - first, shape.attention_scale, scores, out);
}

void put_in_cache(const Step& step, void* cache, int64_t head, const float* row) {
  const int64_t at = (head * step.capacity + step.length) * step.shape.head_size * size_of(step.shape.cache_type);
  step.table.from_f32(row, static_cast<char*>(cache) + at, step.shape.cache_type, step.shape.head_size);
}

// Norms and rotates the shared q and k in place and fills the cache: heads are shared out, q's and k's alike.
void prepare_heads(const Step& step, const DecoderBlock& block, int thread, int threads) {
  const DecoderShape& shape = step.shape;
  const int64_t size = shape.head_size;
  const Share share(shape.heads + shape.kv_heads, thread, threads);
  for (int64_t i = share.first; i < share.last; ++i) {
    const bool query = i < shape.heads;
    float* head = query ? step.q + i * size : step.k + (i - shape.heads) * size;
    const float* norm = query ? block.q_norm : block.k_norm;
    if (norm) step.table.rms_norm(head, norm, shape.epsilon, size, head);
    turn(head, step.cos, step.sin, shape.rotary);
    if (query) continue;
    put_in_cache(step, block.keys, i - shape.heads, head);
    put_in_cache(step, block.values, i - shape.heads, step.v + (i - shape.heads) * size);
  }
}

void run_block(Step& step, const DecoderBlock& block, Input& input, float* scores, int thread, int threads) {
  const DecoderShape& shape = step.shape;
  const int64_t size = shape.head_size;
  step.table.rms_norm(step.hidden, block.attention_norm, shape.epsilon, shape.hidden, input.values());
  input.round(shape.hidden);
  const Linear* projections[] = {&block.q, &block.k, &block.v};
  float* outputs[] = {step.q, step.k, step.v};
  multiply_all(input, projections, outputs, 3, thread, threads);
  step.barrier.wait(threads);

  prepare_heads(step, block, thread, threads);
  step.barrier.wait(threads);

  const Share heads(shape.heads, thread, threads);
  for (int64_t head = heads.first; head < heads.last; ++head)
    attend(step, block, step.q + head * size, head * shape.kv_heads / shape.heads, scores, step.mixed + head * size);
  step.barrier.wait(threads);

  std::memcpy(input.values(), step.mixed, static_cast<size_t>(shape.heads * size) * sizeof(float));
  input.round(shape.heads * size);
  const Share out(panels_of(block.o), thread, threads);
  input.multiply(block.o, scores, out.first, out.last);
  for (int64_t o = out.first * PANEL; o < std::min(out.last * PANEL, shape.hidden); ++o)
    step.hidden[o] += scores[o - out.first * PANEL];
  step.barrier.wait(threads);

  step.table.rms_norm(step.hidden, block.mlp_norm, shape.epsilon, shape.hidden, input.values());
  input.round(shape.hidden);
  const Share wide(panels_of(block.gate), thread, threads);
  const int64_t from = wide.first * PANEL, count = std::min(wide.last * PANEL, block.gate.rows) - from;
  if (count > 0) {
    input.multiply(block.gate, scores, wide.first, wide.last);
    input.multiply(block.up, scores + count, wide.first, wide.last);
    step.table.silu_times(scores, scores + count, step.wide + from, count);
  }
  step.barrier.wait(threads);

  std::memcpy(input.values(), step.wide, static_cast<size_t>(block.down.columns) * sizeof(float));
  input.round(block.down.columns);
  const Share down(panels_of(block.down), thread, threads);
  input.multiply(block.down, scores, down.first, down.last);
  for (int64_t o = down.first * PANEL; o < std::min(down.last * PANEL, shape.hidden); ++o)
    step.hidden[o] += scores[o - down.first * PANEL];
  step.barrier.wait(threads);
}

void step_body(void* context, int thread, int threads) {
  Step& step = *static_cast<Step*>(context);
  float* scratch = step.scratch[static_cast<size_t>(thread)].data();
  Input input(step.table, step.shape.type, step.widest, scratch, step.rows[static_cast<size_t>(thread)], step.finite);
  float* scores = scratch + Input::scratch_size(step.widest);
  for (const DecoderBlock& block : step.blocks) run_block(step, block, input, scores, thread, threads);
}

}  // namespace

bool Decoder::step(const void* hidden, const float* cos, const float* sin, int64_t length, int64_t capacity, void* out,
                   int threads) {
  std::lock_guard<std::mutex> lock(busy_);
  const Kernels& table = kernels();
  int64_t widest = std::max(shape_.hidden, shape_.heads * shape_.head_size), tallest = shape_.hidden;
  for (const DecoderBlock& block : blocks_) {
    widest = std::max(widest, block.down.columns);
    tallest = std::max(tallest, 2 * block.gate.rows);
  }
  widest = (widest + 31) / 32 * 32;
  const int64_t q = shape_.heads * shape_.head_size, k = shape_.kv_heads * shape_.head_size;
  buffer_.resize(static_cast<size_t>(shape_.hidden + 2 * q + 2 * k + widest));
  scratch_.resize(std::max<size_t>(static_cast<size_t>(std::max(threads, 1)), scratch_.size()));
  rows_.resize(scratch_.size());
  const int64_t scores = std::max(std::max(tallest, length + 1), q) + 32;
  for (std::vector<float>& one : scratch_) {
    const size_t wanted = static_cast<size_t>(Input::scratch_size(widest) + scores);
    if (one.size() < wanted) one.resize(wanted + wanted / 2);  // grows with the cache, not at every token
  }
  float* at = buffer_.data();
  Step job{table,  shape_,   blocks_, cos, sin, length, capacity, widest, at,
           at + shape_.hidden, at + shape_.hidden + q, at + shape_.hidden + q + k, at + shape_.hidden + q + 2 * k,
           at + shape_.hidden + 2 * q + 2 * k, scratch_, rows_};
  table.to_f32(hidden, shape_.type, job.hidden, shape_.hidden);
  run_parallel(threads, step_body, &job);  // the pool may give fewer threads than asked for, never more
  if (!job.finite) return false;
  if (final_norm) table.rms_norm(job.hidden, final_norm, shape_.epsilon, shape_.hidden, job.hidden);
  table.from_f32(job.hidden, out, shape_.type, shape_.hidden);
  return true;
}

}  // namespace compress
