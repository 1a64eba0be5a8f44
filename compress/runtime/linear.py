"""A linear layer whose weight stays packed: ``WeightLinear`` multiplies with it by ``compress::weight_matmul``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels import library
from compress.kernels.weight_matmul import weight_matmul
from compress.numerics.panels import (
    BITS,
    LANES,
    SCALE_DTYPES,
    Panels,
    compact_zero,
    dequantize_panels,
    pack_panels,
    why_not_panels,
)
from compress.storage.formats.base import CodedWeight


class Packed(nn.Module):
    """A quantized matrix ``(O, I)`` as buffers in kernel layout; what its users compute with it is up to them.

    Casting the model (``.to(torch.float16)``) leaves scales and zeros in the type that they were stored in.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None

    def __init__(self, panels: Panels, dtype: torch.dtype) -> None:
        """``dtype``: the model's, in which ``weight`` is given."""
        super().__init__()
        self.bits, self.group_size = panels.bits, panels.group_size
        self.out_features, self.in_features = panels.shape
        self.dtype = dtype
        self.register_buffer("codes", panels.codes)
        self.register_buffer("scale", panels.scale)
        self.register_buffer("zero", panels.zero)

    @property
    def panels(self) -> Panels:
        return Panels(
            self.codes, self.scale, self.zero, self.bits, self.group_size, (self.out_features, self.in_features)
        )

    def dequantize(self) -> Tensor:
        """The matrix ``(O, I)`` in ``dtype``, some panels at a time: unpacking takes more memory than the result."""
        step = max(1, 2**22 // (LANES * self.in_features))
        weight = torch.empty((self.out_features, self.in_features), dtype=self.dtype, device=self.codes.device)
        for first in range(0, self.codes.shape[0], step):
            part, rows = slice(first, first + step), slice(LANES * first, LANES * (first + step))
            zero = None if self.zero is None else self.zero[part]
            shape = (len(weight[rows]), self.in_features)
            weight[rows] = dequantize_panels(
                Panels(self.codes[part], self.scale[part], zero, self.bits, self.group_size, shape)
            )
        return weight

    @property
    def weight(self) -> Tensor:
        """The matrix ``(O, I)``, dequantized at each call: for code that looks at a layer's weight, not for speed."""
        return self.dequantize()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves go through, casts of scales and zeros don't."""
        before = {name: self._buffers.get(name) for name in ("scale", "zero")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        zero = "symmetric" if self.zero is None else f"zero {str(self.zero.dtype).removeprefix('torch.')}"
        return f"{self.in_features} -> {self.out_features}, {self.bits} bits, groups of {self.group_size}, {zero}"


class WeightLinear(Packed):
    """``y = x W^T + bias`` with packed ``W``; ``x (..., I)`` and ``y (..., O)`` in the same floating type.

    ``order``: columns of ``W`` are sorted by group (act-order), so ``x`` is gathered by it first.
    ``reference``: the plain PyTorch body, where the caller asked for it.
    """

    bias: Tensor | None
    order: Tensor | None

    def __init__(
        self,
        panels: Panels,
        bias: Tensor | None = None,
        order: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        reference: bool = False,
    ) -> None:
        super().__init__(panels, dtype)
        self.register_buffer("bias", bias)
        self.register_buffer("order", order)
        self.reference = reference

    def forward(self, x: Tensor) -> Tensor:
        if self.reference:
            with library.mode("reference"):
                return self.multiply(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        buffers: Any = self._buffers  # looked up directly: attributes of a module cost more than the product's checks
        order = buffers["order"]
        if order is not None:
            x = x.index_select(-1, order)
        return weight_matmul(
            x, buffers["codes"], buffers["scale"], buffers["zero"], buffers["bias"],
            self.bits, self.group_size, self.out_features,
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """The matrix ``(O, I)``, its columns in the order of the inputs."""
        weight = self.dequantize()
        return weight if self.order is None else weight[:, self.order.argsort()]

    def extra_repr(self) -> str:
        more = [word for word in ("bias", "order") if getattr(self, word) is not None]
        return ", ".join([super().extra_repr(), *more])


def pack_coded(coded: CodedWeight) -> tuple[Panels, Tensor | None] | str:
    """Panels and the order of inputs (None: as they are); the reason in words where kernels can't take the layer."""
    rows, columns = coded.codes.shape
    bits = next((bits for bits in BITS if bits >= coded.bits), coded.bits)  # other widths take the next one's room
    reason = why_not_panels((rows, columns), bits, coded.group_size)
    if reason is None and coded.scale.dtype not in SCALE_DTYPES:
        reason = f"scales are {coded.scale.dtype}"
    if reason is not None:
        return reason
    zero = torch.full(coded.scale.shape, 2 ** (coded.bits - 1)) if coded.zero is None else coded.zero
    codes, order = coded.codes, None
    if coded.groups is not None:
        counts = torch.bincount(coded.groups, minlength=coded.scale.shape[1])
        if not bool((counts == coded.group_size).all()):
            return f"g_idx has groups of {int(counts.min())} to {int(counts.max())} inputs, not of {coded.group_size}"
        order = coded.groups.argsort(stable=True)
        codes = codes[:, order]
    small = compact_zero(zero, bits, coded.scale.dtype)
    return pack_panels(codes, coded.scale.contiguous(), small, bits, coded.group_size), order
