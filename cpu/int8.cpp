// Shares int8 products out to threads: rows are quantized and packed into tiles of INT8_TILE tokens, then threads take
// panels from a common counter, so that one that is held up costs no more than its last piece.
#include "int8.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "types.h"

namespace compress {
namespace {

constexpr int64_t PACKED_BYTES = 8;         // a packed group of four inputs takes at most this
constexpr int64_t BLOCK_BYTES = 8 << 20;    // of packed activations at a time
constexpr int64_t PIECES_PER_THREAD = 8;    // that the product is cut into
constexpr int64_t BYTES_PER_THREAD = 16384;  // codes; less isn't worth waking a thread for (a few microseconds)
constexpr int64_t VALUES_PER_THREAD = 32768;  // of x to quantize; the same

int choose_threads(int64_t work, int64_t per_thread, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, work / per_thread)));
}

// body(thread, total) on so many threads or fewer.
template <class Body>
void parallel(int threads, Body&& body) {
  run_parallel(
      threads,
      [](void* context, int thread, int total) { (*static_cast<std::remove_reference_t<Body>*>(context))(thread, total); },
      &body);
}

// -- quantizing -------------------------------------------------------------------------------------------------------

// Row t of x as float32: where it is, or in `buffer` (columns).
const float* row_as_float(const Kernels& table, const Rows& x, int64_t t, int64_t columns, float* buffer) {
  const char* row = static_cast<const char*>(x.data) + t * x.stride * size_of(x.type);
  if (x.type == Type::f32) return reinterpret_cast<const float*>(row);
  table.to_f32(row, x.type, buffer, columns);
  return buffer;
}

void keep_least(std::atomic<int64_t>& least, int64_t row) {
  int64_t seen = least.load();
  while (row < seen && !least.compare_exchange_weak(seen, row)) {
  }
}

bool any_flag(const uint8_t* flags, int64_t count) { return std::memchr(flags, 1, static_cast<size_t>(count)); }

// -- multiplying ------------------------------------------------------------------------------------------------------

struct Product {
  const Kernels& table;
  Int8Weight weight;
  const float* row_scale;  // of the block
  int64_t tokens;          // in the block
  int64_t groups;          // K
  const Int8Outliers& outliers;
  std::vector<int64_t> features;  // flagged ones, ascending
  std::vector<int64_t> kept;      // their places in outliers.index, or -1
  std::vector<float> values;      // (tokens, features) of x
  std::unique_ptr<char[]> packed;
  Rows y;

  int64_t tiles() const { return (tokens + INT8_TILE - 1) / INT8_TILE; }
  int64_t tile_start(int64_t tile) const { return tokens * tile / tiles(); }
  char* packed_tile(int64_t tile) const { return packed.get() + tile_start(tile) * groups * PACKED_BYTES; }
  int64_t panels() const { return (weight.rows + PANEL - 1) / PANEL; }
  int64_t feature_count() const { return static_cast<int64_t>(features.size()); }
};

void find_features(Product& product) {
  if (product.outliers.flags) list_features(product.weight, product.outliers, product.features, product.kept);
}

void pack_tile(Product& product, const int8_t* q, const Rows& x, int64_t tile) {
  const int64_t begin = product.tile_start(tile), end = product.tile_start(tile + 1), stride = 4 * product.groups;
  product.table.int8_pack(q + begin * stride, stride, end - begin, product.groups, product.packed_tile(tile));
  float* to = product.values.data() + begin * product.feature_count();
  for (int64_t t = begin; t < end; ++t)
    for (const int64_t i : product.features) *to++ = load_value(x.data, x.type, t * x.stride + i);
}

// One or two panels from `first`, for tiles begin <= tile < end. outlier_weights: room for (2, features, 16).
void multiply_panels(const Product& product, int64_t first, int64_t begin, int64_t end, float* outlier_weights) {
  alignas(64) int32_t acc[INT8_TILE * 2 * PANEL];
  const int64_t last = std::min(first + 2, product.panels()), count = product.feature_count();
  for (int64_t p = first; p < last && count; ++p)
    load_outlier_weights(product.weight, product.outliers, product.features, product.kept, p,
                         outlier_weights + (p - first) * count * PANEL);
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t t = product.tile_start(tile), tokens = product.tile_start(tile + 1) - t;
    product.table.int8_dot(product.weight, product.packed_tile(tile), tokens, acc, 2 * PANEL, first, last);
    for (int64_t p = first; p < last; ++p) {
      const int64_t row = p * PANEL;
      char* y = static_cast<char*>(product.y.data) + (t * product.y.stride + row) * size_of(product.y.type);
      const Int8Panel panel{product.row_scale + t, product.weight.scale + row,
                            product.weight.bias ? product.weight.bias + row : nullptr,
                            product.values.data() + t * count, outlier_weights + (p - first) * count * PANEL, count,
                            std::min(PANEL, product.weight.rows - row), y, product.y.stride, product.y.type};
      product.table.int8_finish(panel, acc + (p - first) * PANEL, 2 * PANEL, tokens);
    }
  }
}

void multiply_block(Product& product, const int8_t* q, const Rows& x, int threads) {
  const int64_t tiles = product.tiles(), pairs = (product.panels() + 1) / 2, count = product.feature_count();
  const int packers = choose_threads(product.tokens * product.groups * 4, VALUES_PER_THREAD, threads);
  std::atomic<int64_t> next_tile{0};
  auto pack = [&](int, int) {
    for (int64_t tile; (tile = next_tile.fetch_add(1)) < tiles;) pack_tile(product, q, x, tile);
  };
  parallel(static_cast<int>(std::min<int64_t>(packers, tiles)), pack);

  // A piece is a run of pairs of panels for a run of tiles: long runs of pairs where memory is what is waited for.
  const int workers = choose_threads(pairs * 2 * PANEL * product.weight.columns * tiles, BYTES_PER_THREAD, threads);
  const int64_t wanted = workers == 1 ? 1 : workers * PIECES_PER_THREAD;
  const int64_t span = tiles > 1 ? 1 : std::max<int64_t>(1, pairs / wanted), spans = (pairs + span - 1) / span;
  const int64_t cuts = std::max<int64_t>(1, std::min(tiles, (wanted + spans - 1) / spans));
  std::vector<float> weights(static_cast<size_t>(workers * 2 * count * PANEL));
  std::atomic<int64_t> next_piece{0};
  auto multiply = [&](int thread, int) {
    float* room = weights.data() + thread * 2 * count * PANEL;
    for (int64_t piece; (piece = next_piece.fetch_add(1)) < spans * cuts;) {
      const int64_t begin = piece / cuts * span, cut = piece % cuts;
      for (int64_t pair = begin; pair < std::min(begin + span, pairs); ++pair)
        multiply_panels(product, 2 * pair, tiles * cut / cuts, tiles * (cut + 1) / cuts, room);
    }
  };
  parallel(workers, multiply);
}

}  // namespace

void list_features(const Int8Weight& weight, const Int8Outliers& outliers, std::vector<int64_t>& features,
                   std::vector<int64_t>& kept) {
  const int64_t* end = outliers.index + outliers.count;
  features.clear();
  kept.clear();
  for (int64_t i = 0; i < weight.columns; ++i) {
    if (!outliers.flags[i]) continue;
    const int64_t* at = std::lower_bound(outliers.index, end, i);
    features.push_back(i);
    kept.push_back(at != end && *at == i ? at - outliers.index : -1);
  }
}

void load_outlier_weights(const Int8Weight& weight, const Int8Outliers& outliers, const std::vector<int64_t>& features,
                          const std::vector<int64_t>& kept, int64_t panel, float* to) {
  const int64_t width = (weight.rows + PANEL - 1) / PANEL * PANEL, groups = (weight.columns + 3) / 4;
  for (size_t j = 0; j < features.size(); ++j, to += PANEL) {
    const int64_t i = features[j];
    const int8_t* codes = weight.codes + (panel * groups + i / 4) * PANEL * 4 + i % 4;
    for (int64_t r = 0; r < PANEL; ++r) {
      const int64_t row = panel * PANEL + r;
      to[r] = kept[j] >= 0 ? load_value(outliers.weight, outliers.weight_type, kept[j] * width + row)
                           : weight.scale[row] * static_cast<float>(codes[4 * r]);
    }
  }
}

bool Int8Row::prepare(const Kernels& table, const Int8Weight& weight, const Int8Outliers& outliers, float threshold,
                      const float* x) {
  const int64_t columns = weight.columns, groups = (columns + 3) / 4;
  outliers_ = outliers;
  features_.clear();
  q_.resize(static_cast<size_t>(4 * groups));
  packed_.resize(static_cast<size_t>(groups * PACKED_BYTES));
  const bool scan = threshold > 0.0f || outliers.count > 0;
  if (scan) {
    flags_.assign(static_cast<size_t>(columns), 0);
    for (int64_t j = 0; j < outliers.count; ++j) flags_[static_cast<size_t>(outliers.index[j])] = 1;
    const float limit = threshold > 0.0f ? threshold : std::numeric_limits<float>::infinity();
    if (!std::isfinite(table.flag_outliers(x, limit, columns, flags_.data()))) return false;
    outliers_.flags = flags_.data();
    list_features(weight, outliers_, features_, kept_);
  }
  scale_ = table.quantize_row(x, features_.empty() ? nullptr : flags_.data(), columns, q_.data());
  table.int8_pack(q_.data(), 4 * groups, 1, groups, packed_.data());
  values_.resize(features_.size());
  weights_.resize(features_.size() * PANEL);
  for (size_t j = 0; j < features_.size(); ++j) values_[j] = x[features_[j]];
  return std::isfinite(scale_);
}

void Int8Row::multiply(const Kernels& table, const Int8Weight& weight, int64_t first, int64_t last, float* y) {
  alignas(64) int32_t acc[2 * PANEL];
  const int64_t count = static_cast<int64_t>(features_.size());
  for (int64_t p = first; p < last; p += 2) {
    const int64_t end = std::min(p + 2, last);
    table.int8_dot(weight, packed_.data(), 1, acc, 2 * PANEL, p, end);
    for (int64_t one = p; one < end; ++one) {
      const int64_t row = one * PANEL, lanes = std::min(PANEL, weight.rows - row);
      if (count) load_outlier_weights(weight, outliers_, features_, kept_, one, weights_.data());
      const Int8Panel panel{&scale_, weight.scale + row, weight.bias ? weight.bias + row : nullptr, values_.data(),
                            weights_.data(), count, lanes, y + (one - first) * PANEL, weight.rows, Type::f32};
      table.int8_finish(panel, acc + (one - p) * PANEL, 2 * PANEL, 1);
    }
  }
}

int64_t quantize_rows(const Rows& x, int64_t tokens, int64_t columns, float threshold, const int64_t* index,
                      int64_t count, int8_t* q, float* row_scale, uint8_t* flags, int threads) {
  const Kernels& table = kernels();
  threads = static_cast<int>(std::min<int64_t>(choose_threads(tokens * columns, VALUES_PER_THREAD, threads), tokens));
  const bool dynamic = threshold > 0.0f, scan = dynamic || count > 0;
  std::vector<float> rows(x.type == Type::f32 ? 0 : static_cast<size_t>(threads * columns));
  std::vector<uint8_t> found(scan && threads > 1 ? static_cast<size_t>(threads * columns) : 0);
  std::memset(flags, 0, static_cast<size_t>(columns));
  for (int64_t j = 0; j < count; ++j) flags[index[j]] = 1;

  const int64_t none = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> bad{none};
  if (scan) {
    const float limit = dynamic ? threshold : std::numeric_limits<float>::infinity();
    auto look = [&](int thread, int total) {
      uint8_t* own = threads > 1 ? found.data() + thread * columns : flags;
      for (int64_t t = tokens * thread / total; t < tokens * (thread + 1) / total; ++t) {
        const float* row = row_as_float(table, x, t, columns, rows.data() + thread * columns);
        if (!std::isfinite(table.flag_outliers(row, limit, columns, own))) keep_least(bad, t);
      }
    };
    parallel(threads, look);
    for (size_t at = 0; at < found.size(); ++at) flags[at % static_cast<size_t>(columns)] |= found[at];
    if (bad != none) return bad;
  }
  const uint8_t* outlier = scan && any_flag(flags, columns) ? flags : nullptr;
  auto quantize = [&](int thread, int total) {
    for (int64_t t = tokens * thread / total; t < tokens * (thread + 1) / total; ++t) {
      const float* row = row_as_float(table, x, t, columns, rows.data() + thread * columns);
      row_scale[t] = table.quantize_row(row, outlier, columns, q + t * ((columns + 3) / 4 * 4));
      if (!std::isfinite(row_scale[t])) keep_least(bad, t);
    }
  };
  parallel(threads, quantize);
  return bad == none ? -1 : bad.load();
}

void multiply_int8(const Int8Weight& weight, const int8_t* q, const float* row_scale, int64_t tokens, const Rows& x,
                   const Int8Outliers& outliers, const void* bias, Type bias_type, const Rows& y, int threads) {
  const Kernels& table = kernels();
  const int64_t groups = (weight.columns + 3) / 4;
  const int64_t most = std::max(8 * INT8_TILE, BLOCK_BYTES / (groups * PACKED_BYTES) / INT8_TILE * INT8_TILE);
  const int64_t block = std::min(tokens, most);
  Product product{table, weight, row_scale, block, groups, outliers, {}, {}, {}, nullptr, y};
  find_features(product);
  product.values.resize(static_cast<size_t>(block * product.feature_count()));
  product.packed.reset(new char[static_cast<size_t>(block * groups * PACKED_BYTES)]);
  std::vector<float> converted(bias && bias_type != Type::f32 ? static_cast<size_t>(weight.rows) : 0);
  if (!converted.empty()) table.to_f32(bias, bias_type, converted.data(), weight.rows);
  product.weight.bias = converted.empty() ? static_cast<const float*>(bias) : converted.data();
  for (int64_t t = 0; t < tokens; t += block) {
    product.tokens = std::min(block, tokens - t);
    product.row_scale = row_scale + t;
    product.y.data = static_cast<char*>(y.data) + t * y.stride * size_of(y.type);
    Rows rows = x;
    if (x.data) rows.data = static_cast<char*>(x.data) + t * x.stride * size_of(x.type);
    multiply_block(product, q + t * 4 * groups, rows, threads);
  }
}

int64_t linear_int8(const Int8Weight& weight, const Rows& x, int64_t tokens, float threshold,
                    const Int8Outliers& outliers, const void* bias, Type bias_type, const Rows& y, int threads) {
  const int64_t padded = (weight.columns + 3) / 4 * 4;
  const std::unique_ptr<int8_t[]> q(new int8_t[static_cast<size_t>(tokens * padded)]);
  const std::unique_ptr<float[]> row_scale(new float[static_cast<size_t>(tokens)]);
  const std::unique_ptr<uint8_t[]> flags(new uint8_t[static_cast<size_t>(weight.columns)]);
  const int64_t bad = quantize_rows(x, tokens, weight.columns, threshold, outliers.index, outliers.count, q.get(),
                                    row_scale.get(), flags.get(), threads);
  if (bad >= 0) return bad;
  Int8Outliers flagged = outliers;
  flagged.flags = threshold > 0.0f || outliers.count > 0 ? flags.get() : nullptr;
  multiply_int8(weight, q.get(), row_scale.get(), tokens, x, flagged, bias, bias_type, y, threads);
  return -1;
}

}  // namespace compress
