"""Panels: weight-only codes laid out for kernels that work on 16 rows at once, one per lane of a wide register.

Rows are padded to whole panels of 16 (padding has scale 0, so it is worth 0). Along the inputs each row is packed as
``packing.pack_codes`` has it; word ``k`` of the 16 rows of a panel then lie side by side:
``codes[p, k, r]`` is word ``k`` of row ``16 p + r``, ``scale[p, g, r]`` the scale of its group ``g``.

Letters: O out features, I in features, G groups per row, P panels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress.numerics.packing import pack_codes, unpack_codes

LANES = 16  # rows of a panel
RUN = 32  # inputs that fill whole words at any width
BITS = (2, 3, 4, 8)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Panels:
    """A layer ``w[o, i] = scale[o, g] (code[o, i] - zero[o, g])``, ``g = i // group_size``, in panels."""

    codes: Tensor  # int32 (P, I bits / 32, 16)
    scale: Tensor  # (P, G, 16) float32, bfloat16 or float16
    zero: Tensor | None  # uint8 (P, G, 16), or of the scale's dtype; None: 2**(bits - 1) everywhere
    bits: int
    group_size: int
    shape: tuple[int, int]  # (O, I)


def why_not_panels(shape: tuple[int, int], bits: int, group_size: int) -> str | None:
    """The reason why a layer ``(O, I)`` can't be laid out in panels; None if it can."""
    rows, columns = shape
    if bits not in BITS:
        return f"bits must be one of {', '.join(map(str, BITS))}, got {bits}"
    if rows < 1 or columns < 1:
        return f"there are no weights in {rows} x {columns}"
    if columns % RUN:
        return f"{columns} input features are not a multiple of {RUN}"
    if group_size < 1 or group_size % RUN:
        return f"group_size {group_size} is not a multiple of {RUN}"
    if columns % group_size:
        return f"group_size {group_size} does not divide {columns} input features"
    return None


def count_panels(rows: int) -> int:
    return -(-rows // LANES)


def panel_shapes(shape: tuple[int, int], bits: int, group_size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of ``codes`` and of ``scale`` (and ``zero``) of a layer ``(O, I)``."""
    panels = count_panels(shape[0])
    return (panels, shape[1] * bits // 32, LANES), (panels, shape[1] // group_size, LANES)


def pack_panels(codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int) -> Panels:
    """Panels of a layer with codes ``(O, I)`` in ``0 .. 2**bits - 1``, scale and zero ``(O, G)``.

    The scale keeps its dtype (float32, bfloat16 or float16). An integer zero, 0..255, is kept as uint8; a float one
    must have the scale's dtype. Raises ValueError for what does not fit (see ``why_not_panels``).
    """
    if codes.dim() != 2:
        raise ValueError(f"codes must be (O, I), got {tuple(codes.shape)}")
    rows, columns = codes.shape
    reason = why_not_panels((rows, columns), bits, group_size)
    if reason is not None:
        raise ValueError(reason)
    if scale.dtype not in SCALE_DTYPES:
        raise ValueError(f"scale must be float32, bfloat16 or float16, got {scale.dtype}")
    for name, values in (("scale", scale), ("zero", zero)):
        if values is not None and values.shape != (rows, columns // group_size):
            raise ValueError(f"{name} must be {(rows, columns // group_size)}, got {tuple(values.shape)}")
    if zero is not None:
        zero = _lay_out(_store_zero(zero, scale.dtype))
    return Panels(_lay_out(pack_codes(codes, bits)), _lay_out(scale), zero, bits, group_size, (rows, columns))


def unpack_panels(panels: Panels) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``(O, I)`` uint8, scale and zero ``(O, G)``: exactly what ``pack_panels`` was given (zero: as stored)."""
    rows, columns = panels.shape
    codes = unpack_codes(_take_apart(panels.codes, rows), panels.bits, columns)
    zero = None if panels.zero is None else _take_apart(panels.zero, rows)
    return codes, _take_apart(panels.scale, rows), zero


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


def _store_zero(zero: Tensor, scale_dtype: torch.dtype) -> Tensor:
    if zero.is_floating_point():
        if zero.dtype != scale_dtype:
            raise ValueError(f"a float zero must have the scale's dtype {scale_dtype}, got {zero.dtype}")
        return zero
    if zero.numel() and not (int(zero.min()) >= 0 and int(zero.max()) <= 255):
        raise ValueError(f"integer zeros must be in 0..255, got {int(zero.min())}..{int(zero.max())}")
    return zero.to(torch.uint8)


def _lay_out(rows: Tensor) -> Tensor:
    """``(O, K)`` -> ``(P, K, 16)``, padded with zeros."""
    panels = count_panels(rows.shape[0])
    padded = rows.new_zeros(panels * LANES, rows.shape[1])
    padded[: rows.shape[0]] = rows
    return padded.view(panels, LANES, -1).transpose(1, 2).contiguous()


def _take_apart(panelled: Tensor, rows: int) -> Tensor:
    """``(P, K, 16)`` -> ``(O, K)``."""
    return panelled.transpose(1, 2).reshape(panelled.shape[0] * LANES, -1)[:rows].contiguous()
