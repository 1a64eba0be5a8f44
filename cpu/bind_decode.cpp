// Python's view of the decode step: compress.kernels._cpu.Decoder.
#include <nanobind/stl/string.h>

#include <memory>

#include "bind.h"
#include "decode.h"

namespace nb = nanobind;

namespace compress {
namespace {

int64_t take_int(const nb::dict& from, const char* key) {
  require(from.contains(key), std::string("decoder: ") + key + " is missing");
  return nb::cast<int64_t>(from[key]);
}

template <class T>
T* take_pointer(const nb::dict& from, const char* key) {
  return as_pointer<T>(static_cast<uintptr_t>(take_int(from, key)));
}

Type take_type(const nb::dict& from, const char* key) {
  const int64_t type = take_int(from, key);
  require(is_float(static_cast<int32_t>(type)), std::string("decoder: ") + key +
                                                    " must be 1 (f32), 2 (bf16) or 3 (f16), got " + std::to_string(type));
  return static_cast<Type>(type);
}

Weight take_weight(const nb::dict& from, const float* bias, int64_t rows, int64_t columns) {
  const int64_t group = take_int(from, "group"), bits = take_int(from, "bits"), zero = take_int(from, "zero_type");
  require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "decoder: bits must be 2, 3, 4 or 8, got " +
                                                                std::to_string(bits));
  require(columns % 32 == 0 && group > 0 && group % 32 == 0 && columns % group == 0,
          "decoder: groups of " + std::to_string(group) + " do not fit " + std::to_string(columns) + " inputs");
  const Type scale_type = take_type(from, "scale_type");
  const Type zero_type = static_cast<Type>(zero);
  require(zero_type == Type::none || zero_type == Type::u8 || zero_type == scale_type,
          "decoder: zero_type must be 0 (none), 4 (u8) or that of the scale, got " + std::to_string(zero));
  return {take_pointer<const uint32_t>(from, "codes"), take_pointer<const void>(from, "scale"),
          take_pointer<const void>(from, "zero"), bias, rows, columns, group, static_cast<int32_t>(bits), scale_type,
          zero_type};
}

// A dict: kind ("weight", "int8" or "dense"), rows, columns, bias (address of float32 or 0), and what the kind has.
Linear take_linear(const nb::dict& block, const char* name, int64_t rows, int64_t columns) {
  require(block.contains(name), std::string("decoder: ") + name + " is missing");
  const nb::dict from = nb::cast<nb::dict>(block[name]);
  const std::string kind = nb::cast<std::string>(from["kind"]);
  const int64_t got_rows = take_int(from, "rows"), got_columns = take_int(from, "columns");
  require(got_rows == rows && got_columns == columns,
          std::string("decoder: ") + name + " is " + std::to_string(got_rows) + " x " + std::to_string(got_columns) +
              ", wanted " + std::to_string(rows) + " x " + std::to_string(columns));
  Linear linear{};
  linear.rows = rows;
  linear.columns = columns;
  linear.bias = take_pointer<const float>(from, "bias");
  if (kind == "weight") {
    linear.kind = Linear::Kind::weight;
    linear.weight = take_weight(from, linear.bias, rows, columns);
    return linear;
  }
  if (kind == "int8") {
    linear.kind = Linear::Kind::int8;
    linear.int8 = {take_pointer<const int8_t>(from, "codes"), take_pointer<const float>(from, "scale"),
                   take_pointer<const int32_t>(from, "sums"), linear.bias, rows, columns};
    const int64_t count = take_int(from, "outliers");
    linear.outliers = {nullptr, take_pointer<const int64_t>(from, "outlier_index"), count,
                       take_pointer<const void>(from, "outlier_weight"),
                       count ? take_type(from, "outlier_type") : Type::none};
    for (int64_t j = 0; j < count; ++j)
      require(linear.outliers.index[j] >= 0 && linear.outliers.index[j] < columns,
              "decoder: outlier " + std::to_string(linear.outliers.index[j]) + " is not among " +
                  std::to_string(columns) + " inputs");
    linear.threshold = nb::cast<float>(from["threshold"]);
    require(columns <= INT8_COLUMNS, "decoder: " + std::to_string(columns) + " inputs do not fit an int32 sum");
    return linear;
  }
  require(kind == "dense", "decoder: a matrix of kind " + kind + " is unknown");
  linear.kind = Linear::Kind::dense;
  linear.data = take_pointer<const void>(from, "data");
  linear.type = take_type(from, "type");
  return linear;
}

std::unique_ptr<Decoder> make_decoder(const nb::dict& from) {
  DecoderShape shape{};
  shape.hidden = take_int(from, "hidden");
  shape.heads = take_int(from, "heads");
  shape.kv_heads = take_int(from, "kv_heads");
  shape.head_size = take_int(from, "head_size");
  shape.rotary = take_int(from, "rotary");
  shape.epsilon = nb::cast<float>(from["epsilon"]);
  shape.attention_scale = nb::cast<float>(from["attention_scale"]);
  shape.type = take_type(from, "type");
  shape.cache_type = take_type(from, "cache_type");
  require_positive(shape.hidden, "hidden");
  require_positive(shape.kv_heads, "kv_heads");
  require_positive(shape.head_size, "head_size");
  require(shape.heads > 0 && shape.heads % shape.kv_heads == 0,
          "decoder: " + std::to_string(shape.heads) + " heads can't share " + std::to_string(shape.kv_heads) +
              " heads of keys");
  require(shape.rotary >= 0 && shape.rotary % 2 == 0 && shape.rotary <= shape.head_size,
          "decoder: " + std::to_string(shape.rotary) + " rotary features do not fit a head of " +
              std::to_string(shape.head_size));
  auto decoder = std::make_unique<Decoder>(shape);
  decoder->final_norm = take_pointer<const float>(from, "final_norm");
  return decoder;
}

void add_block(Decoder& decoder, const nb::dict& from) {
  const DecoderShape shape = decoder.shape();
  const int64_t q = shape.heads * shape.head_size, k = shape.kv_heads * shape.head_size;
  const int64_t wide = take_int(from, "intermediate");
  require_positive(wide, "intermediate");
  DecoderBlock block{};
  block.attention_norm = take_pointer<const float>(from, "attention_norm");
  block.mlp_norm = take_pointer<const float>(from, "mlp_norm");
  require(block.attention_norm && block.mlp_norm, "decoder: norms are missing");
  block.q_norm = take_pointer<const float>(from, "q_norm");
  block.k_norm = take_pointer<const float>(from, "k_norm");
  block.q = take_linear(from, "q", q, shape.hidden);
  block.k = take_linear(from, "k", k, shape.hidden);
  block.v = take_linear(from, "v", k, shape.hidden);
  block.o = take_linear(from, "o", shape.hidden, q);
  block.gate = take_linear(from, "gate", wide, shape.hidden);
  block.up = take_linear(from, "up", wide, shape.hidden);
  block.down = take_linear(from, "down", shape.hidden, wide);
  block.window = take_int(from, "window");
  decoder.blocks().push_back(block);
}

void set_cache(Decoder& decoder, int64_t index, uintptr_t keys, uintptr_t values) {
  require(index >= 0 && index < static_cast<int64_t>(decoder.blocks().size()),
          "decoder: block " + std::to_string(index) + " is not among " + std::to_string(decoder.blocks().size()));
  require(keys && values, "decoder: the cache of block " + std::to_string(index) + " is missing");
  decoder.blocks()[static_cast<size_t>(index)].keys = as_pointer<void>(keys);
  decoder.blocks()[static_cast<size_t>(index)].values = as_pointer<void>(values);
}

void step(Decoder& decoder, uintptr_t hidden, uintptr_t cos, uintptr_t sin, int64_t length, int64_t capacity,
          uintptr_t out, int threads) {
  require(hidden && cos && sin && out, "decoder: an address is missing");
  require(length >= 0 && length < capacity, "decoder: " + std::to_string(length) + " tokens are in a cache for " +
                                                std::to_string(capacity) + "; there is no room for one more");
  for (const DecoderBlock& block : decoder.blocks())
    require(block.keys && block.values, "decoder: set_cache was not called for every block");
  bool finite;
  {
    nb::gil_scoped_release release;
    finite = decoder.step(as_pointer<const void>(hidden), as_pointer<const float>(cos), as_pointer<const float>(sin),
                          length, capacity, as_pointer<void>(out), threads);
  }
  require(finite, "decoder: the input of an int8 layer holds NaN or infinity; the model's weights or tokens are damaged");
}

}  // namespace

void bind_decode(nb::module_& module) {
  nb::class_<Decoder>(module, "Decoder", "One decode step of a Llama-like model in one call; addresses are borrowed.")
      .def("__init__",
           [](Decoder* self, const nb::dict& shape) {
             const std::unique_ptr<Decoder> made = make_decoder(shape);
             new (self) Decoder(made->shape());
             self->final_norm = made->final_norm;
           })
      .def("add_block", &add_block)
      .def("set_cache", &set_cache, "index, keys, values: (kv_heads, capacity, head_size) of the cache's type.")
      .def("step", &step,
           "hidden, cos, sin, length, capacity, out, threads: hidden (D) of the model's type -> out (D); keys and values "
           "are added to the cache at row `length`.");
}

}  // namespace compress
