"""Bit packing of codes into 32-bit words, lowest bits first.

Along the packed dimension, code ``k`` of width ``b`` occupies bits ``k b .. k b + b - 1`` of one long little-endian
string of bits, cut into words of 32: 2, 4 and 8 bits never straddle a word, 3 bits do (32 codes in 3 words, as the
``gptq`` layout has it). Example, 4 bits: the codes 1, 2, 3, 0, 0, 0, 0, 0 are the word 0x321.
"""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor

_WORD = 32


def packed_length(count: int, bits: int) -> int:
    """Words that hold ``count`` codes of ``bits`` bits; a last word may be partly empty."""
    return -(-count * bits // _WORD)


def pack_codes(codes: Tensor, bits: int, dim: int = -1) -> Tensor:
    """Integer codes ``0 .. 2**bits - 1`` as int32 words along ``dim``; a ragged end is filled with zeros."""
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(
            f"codes must be in 0..{2**bits - 1} for {bits} bits, got {int(codes.min())}..{int(codes.max())}"
        )
    last = codes.movedim(dim, -1)
    per_cycle, words_per_cycle = _cycle(bits)
    count = last.shape[-1]
    cycles = -(-count // per_cycle)
    padded = torch.nn.functional.pad(last, (0, cycles * per_cycle - count)).unflatten(-1, (cycles, per_cycle))
    words = torch.zeros((*padded.shape[:-1], words_per_cycle), dtype=torch.int64, device=codes.device)
    for k in range(per_cycle):
        word, shift = divmod(k * bits, _WORD)
        code = padded[..., k].to(torch.int64)  # one position at a time: the codes themselves stay small
        words[..., word] |= code << shift & 0xFFFFFFFF
        if shift + bits > _WORD:
            words[..., word + 1] |= code >> (_WORD - shift)
    flat = words.flatten(-2)[..., : packed_length(count, bits)]
    signed = torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32)
    return signed.movedim(-1, dim).contiguous()


def unpack_codes(words: Tensor, bits: int, count: int, dim: int = -1) -> Tensor:
    """The first ``count`` codes along ``dim`` as uint8: undoes ``pack_codes``."""
    last = words.movedim(dim, -1).to(torch.int64) & 0xFFFFFFFF
    if last.shape[-1] != packed_length(count, bits):
        wanted = packed_length(count, bits)
        raise ValueError(f"{count} codes of {bits} bits take {wanted} words along dim {dim}, got {last.shape[-1]}")
    per_cycle, words_per_cycle = _cycle(bits)
    cycles = -(-count // per_cycle)
    padded = torch.nn.functional.pad(last, (0, cycles * words_per_cycle - last.shape[-1]))
    padded = padded.unflatten(-1, (cycles, words_per_cycle))
    codes = torch.empty((*padded.shape[:-1], per_cycle), dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for k in range(per_cycle):
        word, shift = divmod(k * bits, _WORD)
        value = padded[..., word] >> shift
        if shift + bits > _WORD:
            value = value | padded[..., word + 1] << (_WORD - shift)
        codes[..., k] = (value & mask).to(torch.uint8)
    return codes.flatten(-2)[..., :count].movedim(-1, dim).contiguous()


def _cycle(bits: int) -> tuple[int, int]:
    """Codes and words after which the pattern repeats: 8 bits 4 and 1, 3 bits 32 and 3."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits must be 1..8, got {bits}")
    shared = gcd(bits, _WORD)
    return _WORD // shared, bits // shared
