"""What a format file offers, and what is the same for all of them.

A format file has: ``NAME``; ``PREFIX`` of its shard names; ``LOADS_WITH``, the packages that a stock load needs beside
Transformers; ``scale_dtype``; ``carries`` (one layer) and ``conflict`` (the model as a whole), None or the reason why
not; ``encode`` and ``decode``, an exact round trip; ``nbytes``; ``quantization_config``; ``list_layers``. A format of
integer codes also has ``unpack``: the codes, scales and zeros as the file holds them, which kernels multiply with. One
whose stock load rounds the inputs of layers in its own way has ``round_inputs`` (``numerics.activations.round_rows``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from compress.errors import UserError
from compress.numerics.activations import round_rows
from compress.storage.files import TensorHeader
from compress.types import ActivationRule, Grid, LayerSpec, LayerState, Outliers


@dataclass(frozen=True)
class QuantSpec:
    """How a layer's codes are laid out, known before any weight is: what ``plan`` asks formats about."""

    bits: int
    group_size: int  # inputs per group; -1 for one group per row
    symmetric: bool
    float_zero: bool = False
    activations: ActivationRule | None = None  # how the input is rounded at run time
    outliers: int = 0  # columns that are kept in high precision, at most

    @classmethod
    def of(cls, grid: Grid) -> QuantSpec:
        return cls(grid.bits, grid.group_size, grid.symmetric, grid.float_zero)

    def inputs_per_group(self, spec: LayerSpec) -> int:
        return spec.shape[1] if self.group_size == -1 else self.group_size

    def groups(self, spec: LayerSpec) -> int:
        """Groups per row of ``spec``."""
        return -(-spec.shape[1] // self.inputs_per_group(spec))


@dataclass(frozen=True)
class CodedWeight:
    """What a file holds of one layer, unpacked: ``weight[o, i] = scale[o, g] * (codes[o, i] - zero[o, g])``.

    ``g = i // group_size``, or ``groups[i]`` where inputs are not in the order of their groups (act-order).
    """

    codes: Tensor  # (O, I) uint8
    scale: Tensor  # (O, G) in the dtype of the file
    zero: Tensor | None  # (O, G) uint8 or floating; None for 2**(bits - 1) everywhere
    bits: int
    group_size: int  # inputs per group, I for one group per row
    groups: Tensor | None = None  # (I,) int64
    activations: ActivationRule | None = None  # how the input is rounded at run time
    outliers: Outliers | None = None  # columns that stand in place of what the codes say
    input_groups: Tensor | None = None  # (I,) uint8, where activations.groups > 1

    def dequantize(self) -> Tensor:
        """``(O, I)`` float32, outlier columns included."""
        zero = torch.full(self.scale.shape, float(2 ** (self.bits - 1))) if self.zero is None else self.zero
        if self.groups is None:
            weight = dequantize(self.codes, self.scale, zero, self.group_size)
        else:
            weight = (self.codes.float() - zero.float()[:, self.groups]) * self.scale.float()[:, self.groups]
        if self.outliers is not None:
            weight[:, self.outliers.index] = self.outliers.weight
        return weight


Layers = Sequence[tuple[LayerSpec, QuantSpec]]
# Input (..., I), rule, features that stay as they are, group of each feature -> what the layer reads.
RoundInputs = Callable[[Tensor, ActivationRule, Tensor | None, Tensor | None], Tensor]


class Format(Protocol):
    """The type of a format file (a module)."""

    @property
    def NAME(self) -> str: ...
    @property
    def PREFIX(self) -> str: ...
    @property
    def LOADS_WITH(self) -> tuple[str, ...]: ...

    def scale_dtype(self, model_dtype: torch.dtype) -> torch.dtype: ...
    def carries(self, spec: LayerSpec, quant: QuantSpec | None, arch: str) -> str | None: ...
    def conflict(self, layers: Layers, untouched: Sequence[LayerSpec]) -> str | None: ...
    def encode(self, spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor]: ...
    def decode(self, spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor: ...
    def unpack(
        self, spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
    ) -> CodedWeight: ...  # formats of integer codes
    def nbytes(self, spec: LayerSpec, quant: QuantSpec | None) -> int: ...
    def quantization_config(self, layers: Layers, untouched: Sequence[LayerSpec]) -> dict[str, Any] | None: ...
    def list_layers(
        self, headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
    ) -> list[tuple[LayerSpec, tuple[str, ...]]]: ...


def load_format(word: str) -> Format:
    """The format file that a recipe's ``format`` names; ``-`` and ``_`` are the same."""
    return cast(Format, importlib.import_module(f"compress.storage.formats.{word.replace('-', '_')}"))


def find_rounding(fmt: Format) -> RoundInputs:
    """How a stock load of ``fmt`` rounds the inputs of layers with an activation rule."""
    found: RoundInputs = getattr(fmt, "round_inputs", round_rows)
    return found


def encode_layer(fmt: Format, spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor] | None:
    """What takes the place of the layer's parameter in the file; None where the parameter itself is written."""
    return None if state.grid is None or fmt.NAME == "dense" else fmt.encode(spec, state, model_dtype)


def assemble_unit(
    tensors: Mapping[str, Tensor], encoded: Sequence[tuple[LayerSpec, Mapping[str, Tensor]]]
) -> dict[str, Tensor]:
    """What the file of one unit holds.

    ``tensors``: the unit's state dict under full names, compressed layers already holding their new weights.
    ``encoded``: layers that are written in another form, in place of their parameter; of a fused parameter
    ``(E, O, I)`` that is encoded only in part, the other slices are written one by one as ``<parameter>.<index>``.
    """
    written: dict[str, Tensor] = {}
    slices: dict[str, set[int]] = {}
    replaced: set[str] = set()
    for spec, form in encoded:
        written.update(form)
        replaced.add(spec.parameter)
        if spec.index is not None:
            slices.setdefault(spec.parameter, set()).add(spec.index)
    for name, tensor in tensors.items():
        if name not in replaced:
            written[name] = tensor
        for index in range(tensor.shape[0]) if name in slices else ():
            if index not in slices[name]:
                written[f"{name}.{index}"] = tensor[index]
    return written


def encode_unit(
    fmt: Format,
    tensors: Mapping[str, Tensor],
    layers: Sequence[tuple[LayerSpec, LayerState]],
    model_dtype: torch.dtype,
) -> dict[str, Tensor]:
    """``assemble_unit`` of layers that are all at hand."""
    forms = [(spec, encode_layer(fmt, spec, state, model_dtype)) for spec, state in layers]
    return assemble_unit(tensors, [(spec, form) for spec, form in forms if form is not None])


def refuse_head(spec: LayerSpec, name: str) -> str | None:
    """Why a stock format does not carry the embedding or the output head, where ``spec`` is one of them."""
    what = {"embedding": "the embedding", "head": "the output head"}.get(spec.kind)
    return what and f"{name} leaves {what} as it is; format native carries it"


def refuse_activations(quant: QuantSpec, name: str) -> str | None:
    """Why a format for weights alone does not carry int8 activations, where ``quant`` has them."""
    if quant.activations is None:
        return None
    return f"{name} leaves inputs as they are, and the layer's are rounded to {quant.activations.bits} bits at run time"


def refuse_indivisible(spec: LayerSpec, quant: QuantSpec) -> str | None:
    """Why groups do not fit the row, if they don't."""
    if spec.shape[1] % quant.inputs_per_group(spec):
        return f"{spec.shape[1]} input features are not a multiple of group_size {quant.group_size}"
    return None


def take(
    spec: LayerSpec, tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype | None, shape: tuple[int, ...]
) -> Tensor:
    """``tensors[name]``, or a UserError that says what is wrong with it; ``dtype`` None means any floating point."""
    if name not in tensors:
        raise UserError(f"{spec.name}: tensor {name} is missing from the checkpoint")
    tensor = tensors[name]
    fits = tensor.is_floating_point() if dtype is None else tensor.dtype == dtype
    if not fits or tuple(tensor.shape) != shape:
        wanted = "floating point" if dtype is None else str(dtype)
        raise UserError(
            f"{name}: got {tensor.dtype} {list(tensor.shape)}, wanted {wanted} {list(shape)} for a layer of shape "
            f"{list(spec.shape)}; configuration and weights do not belong together"
        )
    return tensor


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """``scale * (code - zero)``, ``(O, I)`` float32, from codes ``(O, I)``, scale and zero ``(O, G)``."""
    rows, columns = codes.shape
    groups = codes.to(torch.float32).reshape(rows, columns // group_size, group_size)
    return groups.sub_(zero.float().unsqueeze(-1)).mul_(scale.float().unsqueeze(-1)).reshape(rows, columns)


def store_exactly(spec: LayerSpec, values: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """``values`` in ``dtype``; they must already be representable there, or what was computed is not what loads."""
    stored = values.to(dtype)
    assert torch.equal(stored.float(), values.float()), f"{spec.name}: {what} was not rounded to {dtype} before use"
    return stored.contiguous()


def read_setting(config: Mapping[str, Any], key: str, kind: type, where: str) -> Any:
    """A value of a quantization_config, checked: UserError if it is missing or of another type."""
    value = config.get(key)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(
            f"{where}: {key} is {value!r}, wanted {kind.__name__}; config.json is damaged or of another format"
        )
    return value


def describe(quant: QuantSpec) -> str:
    """A scheme in words."""
    zeros = "symmetric" if quant.symmetric else "asymmetric"
    rounded = "" if quant.activations is None else f", {quant.activations.bits}-bit activations"
    return f"{quant.bits} bits, group_size {quant.group_size}, {zeros}{rounded}"
