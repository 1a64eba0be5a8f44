"""The dense head's native product: the same logits, everything else left to nn.Linear."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from compress.kernels import library
from compress.runtime.head import FEW_TOKENS, HeadLinear, speed_up_head

pytestmark = pytest.mark.skipif(library.describe()["library"] is None, reason="the kernels are not built here")


def make_head(dtype: torch.dtype, columns: int = 97) -> nn.Linear:
    torch.manual_seed(2)
    head = nn.Linear(columns, 301, bias=False, dtype=dtype)
    head.__class__ = HeadLinear
    return head


@pytest.mark.parametrize("set_name", ["avx512", "avx2", "portable"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_against_float64(dtype: torch.dtype, set_name: str) -> None:
    if set_name not in library.available():
        pytest.skip(f"no {set_name} here")
    head = make_head(dtype)
    library.select_cpu(set_name)
    try:
        for tokens in range(1, FEW_TOKENS + 2):
            x = torch.randn(1, tokens, 97).to(dtype)
            wanted = x.double() @ head.weight.double().t()
            got = head(x)
            assert got.dtype is dtype
            # One rounding to 16 bits; in float32 the sums of 97 products round too.
            steps = 16 if dtype is torch.float32 else 1
            assert float((got.double() - wanted).abs().max()) <= steps * torch.finfo(dtype).eps * float(
                wanted.abs().max()
            )
    finally:
        library.select_cpu("auto")


def test_gradients_odd_strides_and_wrong_shapes_are_left_to_pytorch() -> None:
    head = make_head(torch.float32)
    head(torch.randn(1, 97)).sum().backward()
    assert head.weight.grad is not None
    with torch.no_grad():
        x = torch.randn(97, 2).t()
        assert torch.allclose(head(x), nn.functional.linear(x, head.weight), atol=1e-5)
        assert head(torch.randn(0, 97)).shape == (0, 301)
        with pytest.raises(RuntimeError):
            head(torch.randn(1, 96))


def test_a_model_keeps_its_ties_and_names() -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    plain = copy.deepcopy(model)
    assert speed_up_head(model)
    assert not speed_up_head(model)  # it is one already
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, 64, (1, 3))
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
