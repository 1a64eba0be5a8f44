"""Packing against a bit-by-bit reference."""

from __future__ import annotations

import pytest
import torch

from compress.numerics import packing


def pack_slowly(codes: list[int], bits: int) -> list[int]:
    stream = [code >> k & 1 for code in codes for k in range(bits)]
    stream += [0] * (-len(stream) % 32)
    words = [sum(bit << k for k, bit in enumerate(stream[a : a + 32])) for a in range(0, len(stream), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [1, 31, 32, 64, 75])
@pytest.mark.parametrize("dim", [0, 1, -1])
def test_matches_the_reference_and_comes_back(bits: int, count: int, dim: int) -> None:
    codes = torch.randint(0, 2**bits, (count, 5), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    lines = codes.T.tolist()
    if dim != 0:
        codes = codes.T.contiguous()
    words = packing.pack_codes(codes, bits, dim)
    assert words.dtype == torch.int32 and words.shape[dim] == packing.packed_length(count, bits)
    assert (words.T if dim == 0 else words).tolist() == [pack_slowly(line, bits) for line in lines]
    assert torch.equal(packing.unpack_codes(words, bits, count, dim), codes)


def test_codes_out_of_range_and_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.7 for 3 bits, got 0\.\.8"):
        packing.pack_codes(torch.tensor([0, 8]), 3)
    with pytest.raises(ValueError, match="take 2 words"):
        packing.unpack_codes(torch.zeros(1, dtype=torch.int32), 4, 9)
