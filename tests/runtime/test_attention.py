"""Native causal attention: values against float64, and everything that it is not for left to Transformers."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from compress.kernels import library
from compress.runtime import attention
from compress.runtime.attention import attend, use_native_attention


def has_causal() -> bool:
    native = library.active()
    return native is not None and bool(native.has_causal())


needs_kernel = pytest.mark.skipif(not has_causal(), reason="no kernels with products of bf16 pairs here")
MODULE = SimpleNamespace(is_causal=True, num_key_value_groups=1)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """``(B, T, H, D)`` in float64."""
    groups = query.shape[1] // key.shape[1]
    key, value = (one.double().repeat_interleave(groups, 1) for one in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    tokens = query.shape[2]
    hidden = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ value).transpose(1, 2)


def make(batch: int, heads: int, kv_heads: int, tokens: int, size: int, spread: float = 1.0) -> tuple[Tensor, ...]:
    torch.manual_seed(tokens)
    query = torch.randn(batch, tokens, heads, size).transpose(1, 2) * spread  # strided, as a model has it
    key, value = (torch.randn(batch, tokens, kv_heads, size).transpose(1, 2) * spread for _ in range(2))
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


@needs_kernel
@pytest.mark.parametrize("tokens", [32, 33, 63, 64, 65, 127, 130, 200, 333])
@pytest.mark.parametrize("shape", [(1, 9, 3, 64), (2, 4, 4, 32), (1, 4, 1, 128), (1, 2, 2, 96)], ids=str)
@torch.no_grad()
def test_against_float64(shape: tuple[int, int, int, int], tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, heads, kv_heads, size = shape
    query, key, value = make(batch, heads, kv_heads, tokens, size)

    def forbidden(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("not native")

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", forbidden)
    wanted = exact(query, key, value, size**-0.5)
    got, _ = attend(MODULE, query, key, value, None)
    assert got.shape == wanted.shape
    # Shares and values are rounded to bf16 before their products, and the result once more.
    assert float((got.double() - wanted).abs().max()) < 3 * 2**-8 * float(wanted.abs().max())
    own = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    theirs = float((own.transpose(1, 2).double() - wanted).norm())
    assert float((got.double() - wanted).norm()) < 1.5 * theirs


@needs_kernel
@torch.no_grad()
def test_large_scores_do_not_overflow() -> None:
    query, key, value = make(1, 2, 2, 150, 64, spread=30.0)
    got, _ = attend(MODULE, query, key, value, None, scaling=1.0)
    wanted = exact(query, key, value, 1.0)
    assert bool(got.isfinite().all())
    assert float((got.double() - wanted).norm() / wanted.norm()) < 1e-2


@torch.no_grad()
def test_masks_chunks_and_other_types_are_left_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def note(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.dtype)
        return query, None

    monkeypatch.setattr("transformers.integrations.sdpa_attention.sdpa_attention_forward", note)
    query, key, value = make(1, 2, 2, 40, 64)
    attend(MODULE, query, key, value, torch.ones(1, 1, 40, 40, dtype=torch.bool))
    attend(MODULE, query[:, :, -3:], key, value, None)
    attend(MODULE, query.float(), key.float(), value.float(), None)
    attend(MODULE, query, key, value, None, is_causal=False)
    attend(MODULE, query[:, :, :8], key[:, :, :8], value[:, :, :8], None)
    with library.mode("reference"):
        attend(MODULE, query, key, value, None)
    with torch.enable_grad():
        attend(MODULE, query, key, value, None)
    assert len(seen) == 7


@needs_kernel
def test_a_model_on_it() -> None:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16().eval()
    native, truth = copy.deepcopy(model), copy.deepcopy(model).double()
    assert use_native_attention(native)
    assert not use_native_attention(native)  # it does already
    assert native.config._attn_implementation == attention.NAME
    ids = torch.randint(0, 128, (2, 70))
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    with torch.no_grad():
        wanted = truth(ids).logits
        ours, own = native(ids).logits, model(ids).logits
        assert float((ours.double() - wanted).norm()) < 1.2 * float((own.double() - wanted).norm())
        padded = model(ids, attention_mask=mask).logits[0, 30:]
        assert torch.equal(native(ids, attention_mask=mask).logits[0, 30:], padded)  # a mask: Transformers' own
    assert torch.equal(
        native.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0),
        model.generate(ids[:1], max_new_tokens=5, do_sample=False, pad_token_id=0),
    )
    assert not use_native_attention(copy.deepcopy(truth))
