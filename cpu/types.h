// 16-bit floating point types in plain C++: bfloat16 is the upper half of a float32, float16 is IEEE binary16.
#pragma once
#include <cstdint>
#include <cstring>

#include "kernels.h"

namespace compress {
namespace {

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bf16_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

// Round to nearest, ties to even; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float f16_to_float(uint16_t value) {
  const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16;
  const uint32_t exponent = (value >> 10) & 31u, fraction = value & 1023u;
  if (exponent == 31) return bits_to_float(sign | 0x7f800000u | (fraction << 13));
  if (exponent != 0) return bits_to_float(sign | ((exponent + 112u) << 23) | (fraction << 13));
  const float small = static_cast<float>(fraction) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -small : small;
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000u;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);  // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // subnormal in float16: adding 0.5 leaves the fraction in the lowest bits, rounded
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return static_cast<uint16_t>(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  magnitude += 0xc8000fffu + ((magnitude >> 13) & 1u);  // exponent - 112, round to nearest even
  return static_cast<uint16_t>(sign | (magnitude >> 13));
}

inline float load_value(const void* from, Type type, int64_t index) {
  switch (type) {
    case Type::f32: return static_cast<const float*>(from)[index];
    case Type::bf16: return bf16_to_float(static_cast<const uint16_t*>(from)[index]);
    case Type::f16: return f16_to_float(static_cast<const uint16_t*>(from)[index]);
    case Type::u8: return static_cast<float>(static_cast<const uint8_t*>(from)[index]);
    default: return 0.0f;
  }
}

inline void store_value(void* to, Type type, int64_t index, float value) {
  switch (type) {
    case Type::f32: static_cast<float*>(to)[index] = value; break;
    case Type::bf16: static_cast<uint16_t*>(to)[index] = float_to_bf16(value); break;
    case Type::f16: static_cast<uint16_t*>(to)[index] = float_to_f16(value); break;
    default: break;
  }
}

inline int64_t size_of(Type type) {
  return type == Type::f32 ? 4 : type == Type::u8 ? 1 : type == Type::none ? 0 : 2;
}

}  // namespace
}  // namespace compress
