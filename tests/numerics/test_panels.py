"""Panels against a reference that places every code bit by bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.numerics import packing, panels


def place_slowly(codes: Tensor, bits: int) -> dict[tuple[int, int, int], int]:
    """(panel, word, lane) -> word: low halves hold the first 16 inputs of a run of 32, high halves the others."""
    words: dict[tuple[int, int, int], int] = {}
    for row, line in enumerate(codes.tolist()):
        for i, code in enumerate(line):
            run, half, first_bit = i // 32, i % 32 // 16, i % 16 * bits
            for k in range(bits):
                word, bit = divmod(first_bit + k, 16)
                key = (row // 16, run * bits + word, row % 16)
                words[key] = words.get(key, 0) | (code >> k & 1) << (16 * half + bit)
    return words


def make(rows: int, columns: int, bits: int, group_size: int, seed: int = 0) -> tuple[Tensor, Tensor, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    return codes, torch.randn(rows, columns // group_size, generator=generator), generator


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize("columns", [32, 96])
def test_every_code_is_where_the_layout_says(bits: int, rows: int, columns: int) -> None:
    codes, scale, _ = make(rows, columns, bits, 32)
    packed = panels.pack_panels(codes, scale, None, bits, 32)
    count = -(-rows // 16)
    assert packed.codes.shape == (count, columns * bits // 32, 16)
    assert packed.scale.shape == (count, columns // 32, 16)
    expected = place_slowly(codes, bits)
    for p in range(count):
        for k in range(columns * bits // 32):
            for r in range(16):
                assert int(packed.codes[p, k, r]) & 0xFFFFFFFF == expected.get((p, k, r), 0)
    for row in range(count * 16):
        given = scale[row] if row < rows else torch.zeros(columns // 32)
        assert torch.equal(packed.scale[row // 16, :, row % 16], given)


def test_the_example_of_the_documentation() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(2).unsqueeze(0)
    packed = panels.pack_panels(codes, torch.ones(1, 1), None, 4, 32)
    words = [int(word) & 0xFFFFFFFF for word in packed.codes[0, :, 0]]
    assert words == [0x32103210, 0x76547654, 0xBA98BA98, 0xFEDCFEDC]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 96])
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_goes_in_comes_back(bits: int, group_size: int, kind: str, dtype: torch.dtype) -> None:
    codes, scale, generator = make(21, 96, bits, group_size)
    scale = scale.to(dtype)
    zero: Tensor | None = None
    if kind == "integer":
        zero = torch.randint(0, 256, scale.shape, generator=generator)
    elif kind == "float":
        zero = (torch.rand(scale.shape, generator=generator) * 2**bits).to(dtype)
    packed = panels.pack_panels(codes, scale, zero, bits, group_size)
    assert packed.nbytes == packed.codes.nbytes + packed.scale.nbytes + (
        0 if packed.zero is None else packed.zero.nbytes
    )
    back = panels.unpack_panels(packed)
    assert torch.equal(back[0], codes) and back[0].dtype == torch.uint8
    assert torch.equal(back[1], scale) and back[1].dtype == dtype
    if zero is None:
        assert back[2] is None
    else:
        assert back[2] is not None and back[2].dtype == (torch.uint8 if kind == "integer" else dtype)
        assert torch.equal(back[2].to(zero.dtype), zero)
    shift = torch.full(scale.shape, 2.0 ** (bits - 1)) if zero is None else zero.float()
    weight = panels.dequantize_panels(packed)
    for row, column in ((0, 0), (20, 95), (7, 40)):
        group = column // group_size
        expected = float(scale[row, group].float() * (float(codes[row, column]) - shift[row, group]))
        assert float(weight[row, column]) == expected


def test_rows_can_be_read_without_unpacking_all() -> None:
    codes, scale, _ = make(20, 64, 3, 32)
    packed = panels.pack_panels(codes, scale, None, 3, 32)
    words = panels.join_halves(packed.codes[1, :, 3].unsqueeze(0), 3)
    assert torch.equal(words, packing.pack_codes(codes[19:20], 3))


@pytest.mark.parametrize(
    "shape, bits, group_size, reason",
    [
        ((16, 32), 5, 32, "got 5"),
        ((16, 48), 4, 48, "48 is not a multiple"),
        ((16, 64), 4, 16, "got 16"),
        ((16, 96), 4, 64, "divide 96 inputs, got 64"),
        ((16, 64), 4, -1, "got -1"),
        ((0, 64), 4, 32, "no weights in 0 x 64"),
    ],
)
def test_what_does_not_fit_is_named(shape: tuple[int, int], bits: int, group_size: int, reason: str) -> None:
    assert reason in str(panels.why_not_panels(shape, bits, group_size))
    with pytest.raises(ValueError, match=reason):
        panels.pack_panels(torch.zeros(shape, dtype=torch.uint8), torch.ones(shape[0], 1), None, bits, group_size)


def test_a_layer_that_fits_has_no_reason() -> None:
    assert panels.why_not_panels((1, 32), 3, 32) is None
    assert panels.count_panels(1) == panels.count_panels(16) == 1
    assert panels.count_panels(17) == 2


@pytest.mark.parametrize(
    "scale, zero, message",
    [
        (torch.ones(16, 2), None, r"scale is \[16, 2\], wanted \[16, 1\]"),
        (torch.ones(16, 1, dtype=torch.float64), None, "got torch.float64"),
        (torch.ones(16, 1), torch.ones(1, 16), r"zero is \[1, 16\]"),
        (torch.ones(16, 1), torch.ones(16, 1, dtype=torch.float16), "got torch.float16"),
        (torch.ones(16, 1), torch.full((16, 1), 256), r"0\.\.255, got 256"),
        (torch.ones(16, 1), torch.full((16, 1), -1), r"0\.\.255, got -1"),
    ],
)
def test_scales_and_zeros_that_contradict_the_layer_are_refused(
    scale: Tensor, zero: Tensor | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        panels.pack_panels(torch.zeros(16, 32, dtype=torch.uint8), scale, zero, 4, 32)


def test_zeros_take_the_smallest_form_that_holds_them() -> None:
    assert panels.compact_zero(torch.full((4, 2), 8.0), 4, torch.float16) is None
    small = panels.compact_zero(torch.tensor([[8.0, 16.0]]), 4, torch.float16)
    assert small is not None and small.dtype == torch.uint8 and small.tolist() == [[8, 16]]
    for values in ([[8.5, 1.0]], [[-1.0, 8.0]]):
        kept = panels.compact_zero(torch.tensor(values), 4, torch.float16)
        assert kept is not None and kept.dtype == torch.float16 and kept.tolist() == values
    with pytest.raises(ValueError, match=r"torch\.bfloat16 rounds"):
        panels.compact_zero(torch.tensor([[7.001]]), 4, torch.bfloat16)
