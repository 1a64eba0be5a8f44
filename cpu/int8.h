// int8 products with outlier features in high precision (LLM.int8()): the drivers that share work out to threads.
#pragma once
#include <vector>

#include "kernels.h"
#include "matmul.h"

namespace compress {

constexpr int64_t INT8_COLUMNS = 132104;  // in features whose products of codes (127 * 128 at most) fit an int32 sum

// The features of a call that are multiplied in high precision: those with flag 1.
struct Int8Outliers {
  const uint8_t* flags;   // (I), or null: none
  const int64_t* index;   // (count) ascending: features whose weight is kept in high precision, in `weight`.
  int64_t count;          // The weight of any other flagged feature is its codes times the scale.
  const void* weight;     // (count, 16 P) of weight_type
  Type weight_type;
};

// The flagged features, ascending, and their places in outliers.index (-1: not there).
void list_features(const Int8Weight& weight, const Int8Outliers& outliers, std::vector<int64_t>& features,
                   std::vector<int64_t>& kept);
// Their weights (features, 16) of one panel.
void load_outlier_weights(const Int8Weight& weight, const Int8Outliers& outliers, const std::vector<int64_t>& features,
                          const std::vector<int64_t>& kept, int64_t panel, float* to);

// One token through int8 layers on the calling thread, some panels at a time: for the decode step.
class Int8Row {
 public:
  // x (I) float32: quantized, its outliers found. False where x is not finite. outliers.flags isn't looked at.
  bool prepare(const Kernels& table, const Int8Weight& weight, const Int8Outliers& outliers, float threshold,
               const float* x);
  // y[0] is row 16 first. The bias of the weight (float32) is added.
  void multiply(const Kernels& table, const Int8Weight& weight, int64_t first, int64_t last, float* y);

 private:
  Int8Outliers outliers_{};
  float scale_ = 0.0f;
  std::vector<int8_t> q_;
  std::vector<char> packed_;
  std::vector<uint8_t> flags_;
  std::vector<int64_t> features_, kept_;
  std::vector<float> values_, weights_;
};

// Quantizes rows of x (T, I): q (T, 4 K), row_scale (T), flags (I) 0 or 1: features where some |x| >= threshold
// (0: none), and those of `index` (count). Returns the first row that holds NaN or infinity (q is of no use then), or -1.
// May throw std::bad_alloc, before anything is written.
int64_t quantize_rows(const Rows& x, int64_t tokens, int64_t columns, float threshold, const int64_t* index,
                      int64_t count, int8_t* q, float* row_scale, uint8_t* flags, int threads);

// y (T, O) = row_scale scale q codes^T + x W^T over the outliers + bias (O) of bias_type, or null (weight.bias is not
// looked at). x (T, I) is looked at only where a flag is 1. May throw std::bad_alloc, before anything is written.
void multiply_int8(const Int8Weight& weight, const int8_t* q, const float* row_scale, int64_t tokens, const Rows& x,
                   const Int8Outliers& outliers, const void* bias, Type bias_type, const Rows& y, int threads);

// Both in one: x quantized, its outliers (threshold, and those of outliers.index) found, multiplied. Returns as
// quantize_rows does; y isn't written then. outliers.flags isn't looked at.
int64_t linear_int8(const Int8Weight& weight, const Rows& x, int64_t tokens, float threshold,
                    const Int8Outliers& outliers, const void* bias, Type bias_type, const Rows& y, int threads);

}  // namespace compress
