// What the files that meet Python share: addresses arrive as plain integers, sizes are checked before they are used.
#pragma once
#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

#include "kernels.h"

namespace compress {

template <class T>
T* as_pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

inline void require(bool holds, const std::string& message) {
  if (!holds) throw nanobind::value_error(message.c_str());
}

inline void require_positive(int64_t value, const char* name) {
  require(value > 0, std::string(name) + " must be positive, got " + std::to_string(value));
}

inline bool is_float(int32_t type) {
  return type == static_cast<int32_t>(Type::f32) || type == static_cast<int32_t>(Type::bf16) ||
         type == static_cast<int32_t>(Type::f16);
}

void bind_weight(nanobind::module_& module);
void bind_int8(nanobind::module_& module);
void bind_decode(nanobind::module_& module);
void bind_dense(nanobind::module_& module);
void bind_causal(nanobind::module_& module);

}  // namespace compress
