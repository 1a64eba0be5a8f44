"""``Int8Linear``: int8 weights under inputs that are rounded to int8 token by token (LLM.int8 and W8A8)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.kernels import library
from compress.kernels.int8 import int8_linear
from compress.numerics.int8_panels import Int8Panels, pack_int8_panels, pack_outlier_weight, unpack_int8_panels
from compress.storage.formats.base import CodedWeight

KEPT = ("scale", "outlier_weight")  # buffers whose type is not the model's


class Int8Linear(nn.Module):
    """``y = x W^T + bias``: products of integers, features with outliers in high precision.

    ``threshold``: a feature in which some token reaches it is left out of the rounding; 0 for none. ``outlier_index``
    ``(n,)`` and ``outlier_weight`` ``(n, 16 P)``: features that always are, with their weights.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor
    bias: Tensor | None
    outlier_index: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        panels: Int8Panels,
        threshold: float = 0.0,
        bias: Tensor | None = None,
        outlier_index: Tensor | None = None,
        outlier_weight: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        reference: bool = False,
    ) -> None:
        """``dtype``: the model's, in which ``weight`` is given. ``reference``: the plain PyTorch body."""
        super().__init__()
        self.out_features, self.in_features = panels.shape
        self.threshold, self.dtype, self.reference = threshold, dtype, reference
        self.register_buffer("codes", panels.codes)
        self.register_buffer("scale", panels.scale)
        self.register_buffer("sums", panels.sums)
        self.register_buffer("bias", bias)
        self.register_buffer("outlier_index", outlier_index)
        self.register_buffer("outlier_weight", outlier_weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.reference:
            with library.mode("reference"):
                return self.multiply(x)
        return self.multiply(x)

    def multiply(self, x: Tensor) -> Tensor:
        buffers: Any = self._buffers
        return int8_linear(
            x, buffers["codes"], buffers["scale"], buffers["sums"], buffers["bias"], self.threshold,
            buffers["outlier_index"], buffers["outlier_weight"], self.out_features,
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """The matrix ``(O, I)`` with its high-precision columns, dequantized at each call."""
        panels = Int8Panels(self.codes, self.scale, self.sums, (self.out_features, self.in_features))
        codes, scale = unpack_int8_panels(panels)
        weight = codes.float() * scale.unsqueeze(1)
        if self.outlier_index is not None and self.outlier_weight is not None:
            weight[:, self.outlier_index] = self.outlier_weight[:, : self.out_features].t().float()
        return weight.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Moves go through, casts of scales and outlier columns don't."""
        before = {name: self._buffers[name] for name in KEPT}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def extra_repr(self) -> str:
        kept = 0 if self.outlier_index is None else len(self.outlier_index)
        return f"{self.in_features} -> {self.out_features}, int8, threshold {self.threshold:g}, {kept} features kept"


def make_int8_linear(
    coded: CodedWeight, bias: Tensor | None, dtype: torch.dtype, reference: bool = False
) -> Int8Linear | str:
    """The layer of a weight whose input is rounded; the reason in words where the int8 kernels can't take it."""
    rule = coded.activations
    if rule is None:
        return "columns in high precision without int8 inputs have no kernel"
    if rule.bits != 8 or rule.groups != 1:
        return f"inputs of {rule.bits} bits in {rule.groups} groups have no kernel"
    if coded.zero is not None or coded.groups is not None or coded.group_size != coded.codes.shape[1]:
        return "int8 products want one symmetric scale per row"
    codes = (coded.codes.to(torch.int16) - 2 ** (coded.bits - 1)).to(torch.int8)
    if int(codes.min()) < -127:
        return "int8 products want codes from -127 to 127, and there is a -128"
    index = weight = None
    if coded.outliers is not None and len(coded.outliers.index):
        index = coded.outliers.index
        codes[:, index] = 0
        columns = torch.zeros(codes.shape, dtype=dtype)
        columns[:, index] = coded.outliers.weight.to(dtype)
        weight = pack_outlier_weight(columns, index)
    panels = pack_int8_panels(codes, coded.scale[:, 0])
    return Int8Linear(panels, rule.threshold, bias, index, weight, dtype, reference)
