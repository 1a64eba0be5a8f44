"""Weights as plain tensors in the model's dtype: always loads, saves nothing (``<parameter>``, nothing else)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.storage.files import TensorHeader
from compress.storage.formats.base import Layers, QuantSpec, refuse_activations, take
from compress.types import LayerSpec, LayerState

NAME = "dense"
PREFIX = "model"
LOADS_WITH: tuple[str, ...] = ()


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Scales are not stored; float32 is the finest that a method may use."""
    return torch.float32


def carries(spec: LayerSpec, quant: QuantSpec | None, arch: str) -> str | None:
    """Every result whose inputs stay as they are, as plain weights."""
    return None if quant is None else refuse_activations(quant, NAME)


def conflict(layers: Layers, untouched: Sequence[LayerSpec]) -> str | None:
    """Never."""
    return None


def encode(spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor]:
    """The weight where the model keeps it; one slice of a fused parameter is named ``<parameter>.<index>``."""
    weight = state.weight.t() if spec.kind == "conv1d" else state.weight
    return {_name(spec): weight.to(model_dtype).contiguous()}


def decode(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """``(O, I)`` float32."""
    rows, columns = spec.shape
    shape = (columns, rows) if spec.kind == "conv1d" else (rows, columns)
    weight = take(spec, tensors, _name(spec), None, shape).float()
    return weight.t().contiguous() if spec.kind == "conv1d" else weight


def nbytes(spec: LayerSpec, quant: QuantSpec | None) -> int:
    """Bytes of the weight in its own dtype."""
    return spec.numel * spec.dtype.itemsize


def quantization_config(layers: Layers, untouched: Sequence[LayerSpec]) -> dict[str, Any] | None:
    """None: the model is an ordinary one."""
    return None


def list_layers(
    headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[tuple[LayerSpec, tuple[str, ...]]]:
    """Nothing is encoded."""
    return []


def _name(spec: LayerSpec) -> str:
    return f"{spec.parameter}.{spec.index}" if spec.kind == "expert" else spec.parameter
