// Shares causal attention out to threads: keys and values are packed per head, then tiles of queries are taken from a
// common counter, the longest first.
#include "causal.h"

#include <algorithm>
#include <atomic>
#include <vector>

namespace compress {
namespace {

struct Job {
  const Kernels& table;
  const CausalShape& shape;
  const Heads &q, &k, &v, &out;
  int64_t padded;  // tokens, up to a multiple of KEYS
  uint32_t *keys, *values;  // (batch, kv_heads, padded * size / 2)
  std::atomic<int64_t> next_head{0}, next_tile{0};
};

const uint16_t* head_of(const Heads& heads, int64_t batch, int64_t head) {
  return heads.data + batch * heads.batch_stride + head * heads.head_stride;
}

void pack_body(void* context, int, int) {
  Job& job = *static_cast<Job*>(context);
  const CausalShape& shape = job.shape;
  const int64_t room = job.padded * shape.size / 2;
  for (int64_t task; (task = job.next_head.fetch_add(1)) < shape.batch * shape.kv_heads;) {
    const int64_t batch = task / shape.kv_heads, head = task % shape.kv_heads;
    uint32_t *keys = job.keys + task * room, *values = job.values + task * room;
    // What packing does not write is only in the last block; it must be finite, for it is multiplied with zeros.
    const int64_t last = (job.padded - KEYS) * shape.size / 2;
    std::fill(keys + last, keys + room, 0u);
    std::fill(values + last, values + room, 0u);
    job.table.pack_keys(head_of(job.k, batch, head), job.k.token_stride, shape.tokens, shape.size, keys);
    job.table.pack_values(head_of(job.v, batch, head), job.v.token_stride, shape.tokens, shape.size, values);
  }
}

void attend_body(void* context, int, int) {
  Job& job = *static_cast<Job*>(context);
  const CausalShape& shape = job.shape;
  const int64_t room = job.padded * shape.size / 2, columns = shape.batch * shape.heads;
  const int64_t tiles = (shape.tokens + TILE - 1) / TILE;
  std::vector<float> scratch(static_cast<size_t>(causal_scratch(shape.size)));
  for (int64_t task; (task = job.next_tile.fetch_add(1, std::memory_order_relaxed)) < tiles * columns;) {
    const int64_t first = (tiles - 1 - task / columns) * TILE, batch = task % columns / shape.heads;
    const int64_t head = task % shape.heads, kv = batch * shape.kv_heads + head * shape.kv_heads / shape.heads;
    const CausalTile tile{head_of(job.q, batch, head) + first * job.q.token_stride, job.q.token_stride,
                          std::min(TILE, shape.tokens - first), first, job.keys + kv * room, job.values + kv * room,
                          shape.size, shape.scale, scratch.data(),
                          const_cast<uint16_t*>(head_of(job.out, batch, head)) + first * job.out.token_stride,
                          job.out.token_stride};
    job.table.attend_tile(tile);
  }
}

}  // namespace

bool has_causal() { return kernels().attend_tile != nullptr; }

void attend_causal(const CausalShape& shape, const Heads& q, const Heads& k, const Heads& v, const Heads& out,
                   int threads) {
  thread_local std::vector<uint32_t> memory;
  const int64_t padded = (shape.tokens + KEYS - 1) / KEYS * KEYS;
  const int64_t room = shape.batch * shape.kv_heads * padded * shape.size / 2;
  if (static_cast<int64_t>(memory.size()) < 2 * room) memory.resize(static_cast<size_t>(2 * room));
  Job job{kernels(), shape, q, k, v, out, padded, memory.data(), memory.data() + room};
  run_parallel(threads, pack_body, &job);
  run_parallel(threads, attend_body, &job);
}

}  // namespace compress
