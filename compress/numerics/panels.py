"""Weights as the kernels want them: panels of 16 out features side by side, one per 32-bit lane of a wide register.

``codes`` int32 ``(P, I * bits / 32, 16)``: word ``k`` of panel ``p`` and lane ``r`` belongs to row ``16 p + r``. A run
of 32 inputs takes ``bits`` words; their low halves hold the codes of its first 16 inputs, their high halves those of
the other 16, each as one string of bits, lowest first. So inputs ``j`` and ``j + 16`` of a run lie in one lane at the
same place: what a pair of 16-bit products wants. ``scale`` and ``zero`` ``(P, G, 16)``. Example, 4 bits, one row: the
codes ``0, 1, .. 15, 0, 1, .. 15`` of a run are the words 0x32103210, 0x76547654, 0xba98ba98, 0xfedcfedc.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from compress.numerics.packing import pack_codes, unpack_codes

LANES = 16  # rows of a panel
RUN = 32  # inputs that are packed together
BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


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
    if shape[0] < 1 or shape[1] < 1:
        return f"there are no weights in {shape[0]} x {shape[1]}"
    if shape[1] % RUN:
        return f"the kernels take inputs in runs of {RUN}, and {shape[1]} is not a multiple of it"
    if group_size % RUN or group_size <= 0 or shape[1] % group_size:
        return f"the kernels take groups that are multiples of {RUN} and divide {shape[1]} inputs, got {group_size}"
    return None


def count_panels(rows: int) -> int:
    return -(-rows // LANES)


def pack_panels(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Panels:
    """Codes ``(O, I)`` ``0 .. 2**bits - 1``, scale and zero ``(O, G)`` -> panels. ValueError if they do not fit.

    ``zero``: None, integers 0..255 of any integer type (stored as uint8), or floats of the scale's dtype.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes must be (O, I), got {tuple(codes.shape)}")
    shape = (codes.shape[0], codes.shape[1])
    reason = why_not_panels(shape, bits, group_size)
    if reason is None and scale.dtype not in SCALE_DTYPES:
        reason = f"scale must be float32, bfloat16 or float16, got {scale.dtype}"
    if reason is None and tuple(scale.shape) != (shape[0], shape[1] // group_size):
        reason = f"scale is {list(scale.shape)}, wanted {[shape[0], shape[1] // group_size]}"
    if reason is None and zero is not None:
        reason = _why_not_zero(zero, scale)
    if reason is not None:
        raise ValueError(f"{shape[0]} x {shape[1]} codes of {bits} bits: {reason}")
    words = _pair_halves(pack_codes(codes, bits), bits)
    if zero is not None:
        zero = stack_rows(zero.to(scale.dtype if zero.is_floating_point() else torch.uint8))
    return Panels(stack_rows(words), stack_rows(scale), zero, bits, group_size, shape)


def unpack_panels(panels: Panels) -> tuple[Tensor, Tensor, Tensor | None]:
    """Undoes ``pack_panels``: codes ``(O, I)`` uint8, scale and zero ``(O, G)``."""
    rows, columns = panels.shape
    words = join_halves(unstack_rows(panels.codes, rows), panels.bits)
    zero = None if panels.zero is None else unstack_rows(panels.zero, rows)
    return unpack_codes(words, panels.bits, columns), unstack_rows(panels.scale, rows), zero


def dequantize_panels(panels: Panels) -> Tensor:
    """The weight ``(O, I)`` in float32."""
    codes, scale, zero = unpack_panels(panels)
    rows, columns = panels.shape
    shift = float(2 ** (panels.bits - 1)) if zero is None else zero.float().unsqueeze(-1)
    grouped = codes.view(rows, columns // panels.group_size, panels.group_size).float()
    return (scale.float().unsqueeze(-1) * (grouped - shift)).view(rows, columns)


def compact_zero(zero: Tensor, bits: int, scale_dtype: torch.dtype) -> Tensor | None:
    """A zero ``(O, G)`` in the smallest form that holds it exactly: None (``2**(bits - 1)``), uint8, the scale's dtype.

    Raises ValueError if the scale's dtype would round it.
    """
    if bool((zero == 2 ** (bits - 1)).all()):
        return None
    values = zero.float()
    if bool(((values == values.round()) & (values >= 0) & (values <= 255)).all()):
        return zero.to(torch.uint8)
    stored = zero.to(scale_dtype)
    if not torch.equal(stored.float(), values):
        raise ValueError(f"zeros are fractions that {scale_dtype} rounds; keep the scale in float32")
    return stored


def stack_rows(matrix: Tensor) -> Tensor:
    """``(O, K)`` -> ``(P, K, 16)``, rows beyond O being zero."""
    rows, columns = matrix.shape
    padded = pad(matrix, (0, 0, 0, -rows % LANES))
    return padded.reshape(-1, LANES, columns).transpose(1, 2).contiguous()


def unstack_rows(panels: Tensor, rows: int) -> Tensor:
    """``(P, K, 16)`` -> ``(O, K)``."""
    return panels.transpose(1, 2).reshape(-1, panels.shape[1])[:rows].contiguous()


def _pair_halves(words: Tensor, bits: int) -> Tensor:
    """Words of plainly packed codes ``(O, I * bits / 32)`` -> low halves: first 16 inputs of a run; high: the rest."""
    rows = words.shape[0]
    halves = words.view(torch.int16).reshape(rows, -1, 2, bits)
    return halves.transpose(2, 3).reshape(rows, -1).view(torch.int32)


def join_halves(words: Tensor, bits: int) -> Tensor:
    """Words of one row's codes ``(O, I * bits / 32)`` as ``packing.pack_codes`` has them: undoes the pairing."""
    rows = words.shape[0]
    halves = words.contiguous().view(torch.int16).reshape(rows, -1, bits, 2)
    return halves.transpose(2, 3).reshape(rows, -1).view(torch.int32)


def _why_not_zero(zero: Tensor, scale: Tensor) -> str | None:
    if zero.shape != scale.shape:
        return f"zero is {list(zero.shape)}, wanted {list(scale.shape)}"
    if zero.is_floating_point():
        same = zero.dtype == scale.dtype
        return None if same else f"a float zero must be {scale.dtype} as the scale, got {zero.dtype}"
    low, high = int(zero.min()), int(zero.max())
    return None if low >= 0 and high <= 255 else f"integer zeros must be in 0..255, got {low}..{high}"
