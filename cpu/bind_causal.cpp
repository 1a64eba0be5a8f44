// Python's view of causal attention.
#include "bind.h"
#include "causal.h"

namespace nb = nanobind;

namespace compress {
namespace {

void causal(int64_t batch, int64_t heads, int64_t kv_heads, int64_t tokens, int64_t size, float scale, uintptr_t q,
            int64_t q_batch, int64_t q_head, int64_t q_token, uintptr_t k, int64_t k_batch, int64_t k_head,
            int64_t k_token, uintptr_t v, int64_t v_batch, int64_t v_head, int64_t v_token, uintptr_t out,
            int64_t out_batch, int64_t out_head, int64_t out_token, int threads) {
  require(has_causal(), "the kernels in use have no causal attention");
  require_positive(batch, "batch");
  require_positive(kv_heads, "kv_heads");
  require_positive(tokens, "tokens");
  require(heads > 0 && heads % kv_heads == 0, std::to_string(heads) + " heads can't share " + std::to_string(kv_heads));
  require(size > 0 && size % 32 == 0, "size must be a multiple of 32, got " + std::to_string(size));
  require(q && k && v && out, "an address is missing");
  const Heads queries{as_pointer<uint16_t>(q), q_batch, q_head, q_token};
  const Heads keys{as_pointer<uint16_t>(k), k_batch, k_head, k_token};
  const Heads values{as_pointer<uint16_t>(v), v_batch, v_head, v_token};
  const Heads results{as_pointer<uint16_t>(out), out_batch, out_head, out_token};
  nb::gil_scoped_release release;
  attend_causal({batch, heads, kv_heads, tokens, size, scale}, queries, keys, values, results, threads);
}

}  // namespace

void bind_causal(nb::module_& module) {
  module.def("has_causal", &has_causal, "Whether the kernels in use have causal attention.");
  module.def("causal", &causal,
             "batch, heads, kv_heads, tokens, size, scale, then address and strides (batch, head, token) of q, k, v, "
             "out, all bf16; threads.");
}

}  // namespace compress
