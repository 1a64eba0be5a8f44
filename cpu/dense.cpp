// Few tokens times a dense matrix: one pass over its rows, at the speed of memory. (PyTorch's own product of one bf16
// row reaches about half of that.)
#include "dense.h"

#include <algorithm>
#include <vector>

#include "types.h"

namespace compress {
namespace {

constexpr int64_t ROWS_PER_THREAD = 64;  // fewer aren't worth waking a thread for

struct Job {
  const Kernels& table;
  const DenseWeight& weight;
  const float* x;  // (tokens, columns)
  int64_t tokens;
  const Rows& y;
  float* sums;  // (tokens, rows)
};

void multiply_body(void* context, int thread, int threads) {
  const Job& job = *static_cast<Job*>(context);
  const DenseWeight& weight = job.weight;
  const int64_t first = weight.rows * thread / threads, last = weight.rows * (thread + 1) / threads;
  for (int64_t o = first; o < last; ++o) {
    const char* row = static_cast<const char*>(weight.data) + o * weight.columns * size_of(weight.type);
    for (int64_t t = 0; t < job.tokens; ++t)
      job.sums[t * weight.rows + o] = job.table.dot(job.x + t * weight.columns, row, weight.type, weight.columns);
  }
  for (int64_t t = 0; t < job.tokens; ++t) {
    char* to = static_cast<char*>(job.y.data) + (t * job.y.stride + first) * size_of(job.y.type);
    job.table.from_f32(job.sums + t * weight.rows + first, to, job.y.type, last - first);
  }
}

}  // namespace

void multiply_dense(const DenseWeight& weight, const Rows& x, int64_t tokens, const Rows& y, int threads) {
  const Kernels& table = kernels();
  thread_local std::vector<float> buffer;
  const size_t wanted = static_cast<size_t>(tokens * (weight.columns + weight.rows));
  if (buffer.size() < wanted) buffer.resize(wanted);
  float* values = buffer.data();
  for (int64_t t = 0; t < tokens; ++t)
    table.to_f32(static_cast<const char*>(x.data) + t * x.stride * size_of(x.type), x.type, values + t * weight.columns,
                 weight.columns);
  Job job{table, weight, values, tokens, y, values + tokens * weight.columns};
  run_parallel(static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, weight.rows / ROWS_PER_THREAD))),
               multiply_body, &job);
}

}  // namespace compress
