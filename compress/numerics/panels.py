"""Weights as the kernels want them: panels of 16 out features side by side, one per 32-bit lane of a wide register.

``codes`` int32 ``(P, I * bits / 32, 16)``: word ``k`` of panel ``p`` and lane ``r`` belongs to row ``16 p + r``. A run of
32 inputs takes ``bits`` words; their low halves hold the codes of its first 16 inputs, their high halves those of the
other 16, each as one string of bits, lowest first. So inputs ``j`` and ``j + 16`` of a run lie in one lane at the same
place: what a pair of 16-bit products wants. ``scale`` and ``zero`` ``(P, G, 16)``. Example, 4 bits, one row: the codes
``0, 1, .. 15, 0, 1, .. 15`` of a run are the words 0x32103210, 0x76547654, 0xba98ba98, 0xfedcfedc.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.numerics.packing import pack_codes, unpack_codes

PANEL = 16  # rows of a panel
RUN = 32  # inputs that are packed together
BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Panels:
    """A quantized matrix ``(O, I)`` in kernel layout; ``w[o, i] = scale[o, g] * (code[o, i] - zero[o, g])``."""

    codes: Tensor  # int32 (P, I * bits / 32, 16)
    scale: Tensor  # (P, G, 16) float32, bfloat16 or float16; 0 for rows beyond O
    zero: Tensor | None  # None: 2**(bits - 1); uint8 or the scale's dtype (P, G, 16)
    bits: int
    group_size: int
    shape: tuple[int, int]  # (O, I)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        zero = 0 if self.zero is None else self.zero.nbytes
        return self.codes.nbytes + self.scale.nbytes + zero


def why_not_panels(shape: tuple[int, int], bits: int, group_size: int) -> str | None:
    """Why a matrix ``(O, I)`` does not fit the layout; None if it does."""
    if bits not in BITS:
        return f"the kernels take {', '.join(map(str, BITS))} bits, got {bits}"
    if shape[1] % RUN:
        return f"the kernels take inputs in runs of {RUN}, and {shape[1]} is not a multiple of it"
    if group_size % RUN or group_size <= 0 or shape[1] % group_size:
        return f"the kernels take groups that are multiples of {RUN} and divide {shape[1]} inputs, got {group_size}"
    return None


def pack_panels(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Panels:
    """Codes ``(O, I)`` ``0 .. 2**bits - 1``, scale and zero ``(O, G)`` -> panels. ValueError if they do not fit.

    ``zero``: None, integers (stored as uint8) in any integer type, or floats (stored in the scale's dtype).
    """
    shape = (codes.shape[0], codes.shape[1])
    reason = why_not_panels(shape, bits, group_size)
    if reason is None and tuple(scale.shape) != (shape[0], shape[1] // group_size):
        reason = f"scale is {list(scale.shape)}, wanted {[shape[0], shape[1] // group_size]}"
    if reason is None and zero is not None and zero.shape != scale.shape:
        reason = f"zero is {list(zero.shape)}, wanted {list(scale.shape)}"
    if reason is not None:
        raise ValueError(f"{shape[0]} x {shape[1]} codes of {bits} bits: {reason}")
    words = _pair_halves(pack_codes(codes, bits), bits)
    if zero is not None:
        zero = stack_rows(zero.to(scale.dtype if zero.is_floating_point() else torch.uint8))
    return Panels(stack_rows(words), stack_rows(scale), zero, bits, group_size, shape)


def unpack_panels(panels: Panels) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undoes ``pack_panels``: codes ``(O, I)`` uint8, scale and zero ``(O, G)``."""
    rows, columns = panels.shape
    words = _join_halves(unstack_rows(panels.codes, rows), panels.bits)
    zero = None if panels.zero is None else unstack_rows(panels.zero, rows)
    return unpack_codes(words, panels.bits, columns), unstack_rows(panels.scale, rows), zero


def stack_rows(matrix: Tensor) -> Tensor:
    """``(O, K)`` -> ``(P, K, 16)``, rows beyond O being zero."""
    rows, columns = matrix.shape
    padded = pad(matrix, (0, 0, 0, -rows % PANEL))
    return padded.reshape(-1, PANEL, columns).transpose(1, 2).contiguous()


def unstack_rows(panels: Tensor, rows: int) -> Tensor:
    """``(P, K, 16)`` -> ``(O, K)``."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:rows].contiguous()


def _pair_halves(words: Tensor, bits: int) -> Tensor:
    """Words of plainly packed codes ``(O, I * bits / 32)`` -> low halves: first 16 inputs of a run, high: the others."""
    rows = words.shape[0]
    halves = words.view(torch.int16).reshape(rows, -1, 2, bits)
    return halves.transpose(2, 3).reshape(rows, -1).view(torch.int32)


def _join_halves(words: Tensor, bits: int) -> Tensor:
    """Undoes ``_pair_halves``."""
    rows = words.shape[0]
    halves = words.view(torch.int16).reshape(rows, -1, bits, 2)
    return halves.transpose(2, 3).reshape(rows, -1).view(torch.int32)
