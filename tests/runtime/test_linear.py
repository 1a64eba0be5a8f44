"""Modules on packed weights compute what their dequantized weights do, and survive what users do to models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from compress.runtime.embedding import QuantEmbedding
from compress.runtime.int8_linear import Int8Linear, make_int8_linear
from compress.runtime.linear import WeightLinear, pack_coded
from compress.runtime.merge import Sibling, merge_siblings
from compress.storage.formats.base import CodedWeight
from compress.types import ActivationRule, Outliers

# Relative to the largest output: what rounding the output (and, for many tokens, the weight) to the type costs.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def make_coded(
    rows: int = 48, columns: int = 64, bits: int = 4, group_size: int = 32, zero: str = "none", seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> CodedWeight:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    shape = (rows, columns // group_size)
    scale = (torch.rand(shape, generator=generator) + 0.5).to(dtype) / 2**bits
    zeros: dict[str, Any] = {
        "none": None,
        "integer": torch.randint(2**bits, shape, generator=generator).to(torch.uint8),
        "float": (torch.rand(shape, generator=generator) * 2**bits).to(dtype),
    }
    return CodedWeight(codes, scale, zeros[zero], bits, group_size)


def make_linear(coded: CodedWeight, bias: Tensor | None = None, dtype: torch.dtype = torch.float32) -> WeightLinear:
    packed = pack_coded(coded)
    assert not isinstance(packed, str), packed
    return WeightLinear(packed[0], bias, packed[1], dtype)


def make_input(tokens: int, columns: int = 64, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)


def assert_close(got: Tensor, wanted: Tensor) -> None:
    limit = TOLERANCE[got.dtype] * float(wanted.float().abs().max())
    assert float((got.float() - wanted.float()).abs().max()) <= limit


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 40])
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", range(1, 9))
def test_it_multiplies_with_its_weight(bits: int, zero: str, tokens: int, dtype: torch.dtype) -> None:
    coded = make_coded(rows=33, bits=bits, zero=zero)
    bias = torch.randn(33, generator=torch.Generator().manual_seed(1)).to(dtype)
    layer = make_linear(coded, bias, dtype)
    x = make_input(tokens, dtype=dtype)
    got = layer(x)
    assert got.dtype == dtype and got.shape == (tokens, 33)
    assert_close(got, functional.linear(x.float(), coded.dequantize(), bias.float()))
    assert torch.equal(layer.weight, coded.dequantize().to(dtype))


def test_inputs_in_the_order_of_their_groups() -> None:
    groups = torch.randperm(64, generator=torch.Generator().manual_seed(3)) % 2
    plain = make_coded(zero="integer")
    coded = CodedWeight(plain.codes, plain.scale, plain.zero, 4, 32, groups)
    layer = make_linear(coded)
    x = make_input(5)
    assert layer.order is not None
    assert_close(layer(x), x @ coded.dequantize().t())
    assert torch.equal(layer.weight, coded.dequantize())


def test_reasons_why_not() -> None:
    assert "not a multiple" in str(pack_coded(make_coded(columns=48, group_size=16)))
    uneven = (torch.arange(64) >= 16).long()
    coded = make_coded()
    got = pack_coded(CodedWeight(coded.codes, coded.scale, None, 4, 32, uneven))
    assert got == "g_idx has groups of 16 to 48 inputs, not of 32"


def test_casting_the_model_leaves_scales_alone() -> None:
    layer = make_linear(make_coded(zero="float", dtype=torch.float32), torch.ones(48))
    scale = layer.scale.clone()
    layer.to(torch.bfloat16)
    assert layer.scale.dtype == torch.float32 and torch.equal(layer.scale, scale)
    assert layer.zero is not None and layer.zero.dtype == torch.float32
    assert layer.bias is not None and layer.bias.dtype == torch.bfloat16
    twin = copy.deepcopy(layer)
    x = make_input(1, dtype=torch.bfloat16)
    assert torch.equal(twin(x), layer(x)) and twin.codes.data_ptr() != layer.codes.data_ptr()


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_embedding_looks_up_rows_of_its_weight(bits: int, zero: str) -> None:
    coded = make_coded(rows=37, bits=bits, zero=zero)
    packed = pack_coded(coded)
    assert not isinstance(packed, str)
    embedding = QuantEmbedding(packed[0], torch.bfloat16)
    tokens = torch.tensor([[0, 36, 16], [15, 5, 36]])
    assert torch.equal(embedding(tokens), coded.dequantize().to(torch.bfloat16)[tokens])
    scaled = QuantEmbedding(packed[0], torch.float32, torch.tensor(3.0))
    assert torch.equal(scaled(tokens), coded.dequantize()[tokens] * 3)
    for wrong in (-1, 37):
        with pytest.raises(IndexError, match="the vocabulary has 37"):
            embedding(torch.tensor([wrong]))


# -- siblings ---------------------------------------------------------------------------------------------------------


def make_attention(rows: tuple[int, int, int] = (48, 16, 16), **options: Any) -> torch.nn.Module:
    block = torch.nn.Module()
    for seed, (name, count) in enumerate(zip(("q_proj", "k_proj", "v_proj"), rows, strict=True)):
        coded = make_coded(count, seed=seed, **options)
        setattr(block, name, make_linear(coded, torch.full((count,), float(seed)) if seed else None))
    return block


def test_siblings_give_what_they_gave_alone() -> None:
    alone, block = make_attention(), make_attention()
    assert merge_siblings(block) == [(".q_proj", ".k_proj", ".v_proj")]
    for tokens in (1, 20):
        x = make_input(tokens)
        for name in ("q_proj", "k_proj", "v_proj"):
            merged, single = getattr(block, name), getattr(alone, name)
            assert_close(merged(x), single(x))
            assert torch.equal(merged.weight, single.weight)
    assert isinstance(block.q_proj, Sibling)
    assert block.q_proj.group.shelf.kept is None, "nothing is kept once all had their part"


def test_siblings_compute_once(monkeypatch: pytest.MonkeyPatch) -> None:
    block = make_attention()
    merge_siblings(block)
    calls = []
    group = block.q_proj.group
    multiply = group.multiply
    monkeypatch.setattr(group, "multiply", lambda x: calls.append(1) or multiply(x))
    x = make_input(2)
    block.k_proj(x), block.q_proj(x), block.v_proj(x)
    assert len(calls) == 1


def test_a_stale_result_is_never_served() -> None:
    alone, block = make_attention(), make_attention()
    merge_siblings(block)
    x = make_input(2)
    block.q_proj(x)
    x.mul_(2)
    assert_close(block.k_proj(x), alone.k_proj(x))  # written to in between
    block.q_proj(x)
    assert_close(block.v_proj(x.clone()), alone.v_proj(x))  # another tensor
    block.q_proj(x)
    x.data.mul_(2)  # behind the version's back: only the same sibling again tells
    assert_close(block.q_proj(x), alone.q_proj(x))
    with torch.inference_mode():  # no versions there
        y = make_input(3)
        block.q_proj(y)
        y.mul_(2)
        assert_close(block.k_proj(y), alone.k_proj(y))


def test_siblings_that_are_called_apart_stop_computing_for_each_other() -> None:
    block = make_attention()
    merge_siblings(block)
    for tokens in range(1, 9):
        block.q_proj(make_input(tokens))
    block.q_proj.group.shelf.kept = None
    x = make_input(4)
    assert_close(block.q_proj(x), make_attention().q_proj(x))
    assert block.q_proj.group.shelf.kept is None, "no more results for others"


def test_only_siblings_that_are_alike_are_merged() -> None:
    assert merge_siblings(make_attention(rows=(40, 16, 16))) == [], "k would begin inside a panel"
    mixed = make_attention()
    mixed.v_proj = make_linear(make_coded(16, bits=8))
    assert merge_siblings(mixed) == []
    ordered = make_attention()
    coded = make_coded(16)
    ordered.v_proj = make_linear(CodedWeight(coded.codes, coded.scale, None, 4, 32, torch.arange(64) % 2))
    assert merge_siblings(ordered) == []
    assert merge_siblings(make_attention(rows=(48, 32, 24))) != [], "the last may end anywhere"


# -- int8 -------------------------------------------------------------------------------------------------------------


def make_int8(threshold: float = 0.0, kept: list[int] | None = None) -> tuple[CodedWeight, Int8Linear]:
    coded = make_coded(rows=33, bits=8, group_size=64, dtype=torch.float32)
    codes = coded.codes.clamp(min=1)
    outliers = None
    if kept is not None:
        codes[:, kept] = 128
        outliers = Outliers(torch.tensor(kept), torch.randn(33, len(kept)))
    coded = CodedWeight(codes, coded.scale, None, 8, 64, None, ActivationRule(8, threshold), outliers)
    layer = make_int8_linear(coded, torch.arange(33.0), torch.float32)
    assert isinstance(layer, Int8Linear), layer
    return coded, layer


@pytest.mark.parametrize(("threshold", "kept"), [(0.0, None), (6.0, None), (0.0, [3, 40]), (6.0, [3, 40])])
def test_int8_rounds_inputs_and_spares_outliers(threshold: float, kept: list[int] | None) -> None:
    from compress.numerics.activations import round_rows

    coded, layer = make_int8(threshold, kept)
    x = make_input(7)
    x[:, 5] *= 20
    assert coded.activations is not None
    read = round_rows(x, coded.activations, None if coded.outliers is None else coded.outliers.index)
    assert_close(layer(x), read @ coded.dequantize().t() + torch.arange(33.0))
    assert torch.allclose(layer.weight, coded.dequantize(), atol=1e-7)
    layer.to(torch.float16)
    assert layer.scale.dtype == torch.float32


def test_what_int8_products_can_not_take() -> None:
    coded, _ = make_int8()
    rule = ActivationRule(8, 0.0, 4)
    grouped = CodedWeight(coded.codes, coded.scale, None, 8, 64, None, rule, None, torch.zeros(64, dtype=torch.uint8))
    assert "4 groups have no kernel" in str(make_int8_linear(grouped, None, torch.float32))
    lowest = CodedWeight(coded.codes * 0, coded.scale, None, 8, 64, None, ActivationRule())
    assert "-128" in str(make_int8_linear(lowest, None, torch.float32))
