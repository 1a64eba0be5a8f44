// Few tokens times a dense matrix.
#pragma once
#include "matmul.h"

namespace compress {

struct DenseWeight {
  const void* data;  // (rows, columns) of f32, bf16 or f16
  Type type;
  int64_t rows;
  int64_t columns;
};

// y (T, O) = x (T, I) W^T, sums in float32. Meant for few tokens: each row of W is read once.
void multiply_dense(const DenseWeight& weight, const Rows& x, int64_t tokens, const Rows& y, int threads);

}  // namespace compress
