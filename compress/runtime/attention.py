"""Causal attention for prefill on the CPU: Transformers' attention interface with a native product of bfloat16 pairs.

PyTorch's own takes a third of a small model's prefill or more. Only whole sequences without a mask take the native way:
bf16, no gradients, as many queries as keys. Everything else is Transformers' ``sdpa``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.kernels import library

NAME = "compress"  # of the attention implementation, in Transformers' list
BASE = "sdpa"
SMALLEST = 32  # tokens; below, PyTorch's own is as fast


def use_native_attention(model: Any) -> bool:
    """Give a model that would use ``sdpa`` the native attention; False where it uses something else or can't."""
    native = library.active()
    if native is None or not native.has_causal():
        return False
    if model.config._attn_implementation != BASE or model.dtype is not torch.bfloat16:
        return False
    _register()
    try:
        model.set_attn_implementation(NAME)
    except ValueError:
        return False
    return bool(model.config._attn_implementation == NAME)


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Query ``(B, H, T, D)``, key and value ``(B, H_kv, S, D)`` -> ``(B, T, H, D)``: Transformers' interface."""
    native = library.active()
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if native is None or attention_mask is not None or not causal or not _fits(native, query, key, value, kwargs):
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        options = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, **kwargs}
        output: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output
    batch, heads, tokens, size = query.shape
    out = torch.empty((batch, tokens, heads, size), dtype=query.dtype)
    place = out.transpose(1, 2)
    parts = [part for tensor in (query, key, value, place) for part in (tensor.data_ptr(), *tensor.stride()[:3])]
    scale = size**-0.5 if scaling is None else float(scaling)
    native.causal(batch, heads, key.shape[1], tokens, size, scale, *parts, torch.get_num_threads())
    return out, None


def _fits(native: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> bool:
    tokens, size = query.shape[2:]
    tensors = (query, key, value)
    return (
        tokens >= SMALLEST
        and size % 32 == 0
        and key.shape == value.shape
        and key.shape[2:] == query.shape[2:]
        and not torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not any(options.get(name) is not None for name in ("position_bias", "cache", "softcap"))
        and all(one.dtype is torch.bfloat16 and one.is_cpu and one.stride(3) == 1 for one in tensors)
        and native.has_causal()
    )
