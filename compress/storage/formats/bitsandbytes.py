"""bitsandbytes, int8: LLM.int8() as stock Transformers loads it with the package installed, on CPU and GPU.

Tensors of a layer ``<name>``: ``weight`` int8 ``(O, I)``, for Conv1D too; ``SCB`` float32 ``(O,)``, the largest
magnitude of each row; ``weight_format`` uint8 scalar, 0 for row-major. ``weight_hat = weight * SCB / 127``. The
threshold is one for the whole model and stands in ``config.json``; layers that are left alone are listed there.

bitsandbytes 0.50 multiplies as METHODS of LLM.int8 do, but for this: it looks at inputs as float16, takes a token's
scale after zeroing the outlier elements only (not their whole features), dequantizes the weight columns of outlier
features from int8, and switches decomposition off at threshold 0. ``round_inputs`` does the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.storage.files import TensorHeader
from compress.storage.formats.base import CodedWeight, Layers, QuantSpec, refuse_head, take
from compress.types import ActivationRule, LayerSpec, LayerState

NAME = "bitsandbytes"
PREFIX = "model"
LOADS_WITH: tuple[str, ...] = ("bitsandbytes",)
UNIT = 6.200124e-05  # bitsandbytes' constant for 1 / 127**2, which is 6.200012e-05
ZERO = 128  # our code of 0; a stored code is ours less this
# Linear layers outside what compress walks: output heads, projections around the blocks, routers. bitsandbytes takes
# every nn.Linear that is not listed; a name stands for all modules that end with it.
NEVER = ("lm_head", "embed_out", "project_in", "project_out", "gate", "router")


def scale_dtype(model_dtype: torch.dtype) -> torch.dtype:
    """Always float32."""
    return torch.float32


def carries(spec: LayerSpec, quant: QuantSpec | None, arch: str) -> str | None:
    """8-bit rows under 8-bit activations; on ``nn.Linear`` and Conv1D."""
    if quant is None:
        return None
    if spec.kind in ("embedding", "head"):
        return refuse_head(spec, NAME)
    if spec.kind == "expert":
        return "bitsandbytes quantizes nn.Linear and Conv1D only, not experts fused in one 3-D parameter"
    if quant.bits != 8 or not quant.symmetric or quant.inputs_per_group(spec) != spec.shape[1]:
        return "bitsandbytes carries int8 with one symmetric scale per row here: method llm_int8"
    if quant.activations is None:
        return "bitsandbytes rounds inputs to 8 bits at run time, and the recipe leaves them as they are"
    if quant.activations.bits != 8 or quant.activations.groups != 1:
        return "bitsandbytes rounds inputs to 8 bits with one scale per token"
    if quant.outliers:
        return "bitsandbytes finds outlier features at run time and keeps no columns for them (outliers: dynamic)"
    return None


def conflict(layers: Layers, untouched: Sequence[LayerSpec]) -> str | None:
    """All layers share one threshold."""
    thresholds = {quant.activations.threshold: spec.name for spec, quant in layers if quant.activations is not None}
    if len(thresholds) < 2:
        return None
    (first, one), (second, two), *_ = thresholds.items()
    return f"bitsandbytes has one threshold for the model, but {one} has {first} and {two} has {second}"


def encode(spec: LayerSpec, state: LayerState, model_dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of one layer; a layer without a grid is written as its plain weight."""
    if state.grid is None or state.codes is None:
        weight = state.weight.t() if spec.kind == "conv1d" else state.weight
        return {spec.parameter: weight.to(model_dtype).contiguous()}
    assert state.outliers is None, f"{spec.name}: bitsandbytes keeps no columns in high precision"
    return {
        f"{spec.name}.weight": (state.codes.to(torch.int16) - ZERO).to(torch.int8).contiguous(),
        f"{spec.name}.SCB": _find_absmax(spec, state.grid.scale[:, 0]),
        f"{spec.name}.weight_format": torch.zeros((), dtype=torch.uint8),
    }


def decode(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Tensor:
    """``(O, I)`` float32. Raises UserError where configuration and tensors contradict each other."""
    return unpack(spec, tensors, config).dequantize()


def unpack(spec: LayerSpec, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> CodedWeight:
    """Codes and scales, and the rule for the input. Same errors as ``decode``."""
    rule = _read_rule(config)
    rows, columns = spec.shape
    codes = take(spec, tensors, f"{spec.name}.weight", torch.int8, (rows, columns))
    absmax = take(spec, tensors, f"{spec.name}.SCB", torch.float32, (rows,))
    layout = tensors.get(f"{spec.name}.weight_format")
    if layout is not None and int(layout) != 0:
        raise UserError(
            f"{spec.name}.weight_format: got {int(layout)}, wanted 0 (row-major); save it with a newer bitsandbytes"
        )
    shifted = (codes.to(torch.int16) + ZERO).to(torch.uint8)
    return CodedWeight(shifted, (absmax / 127)[:, None], None, 8, columns, activations=rule)


def nbytes(spec: LayerSpec, quant: QuantSpec | None) -> int:
    """Bytes of the tensors of one layer."""
    return spec.numel * spec.dtype.itemsize if quant is None else spec.numel + 4 * spec.shape[0] + 1


def quantization_config(layers: Layers, untouched: Sequence[LayerSpec]) -> dict[str, Any] | None:
    """As Transformers writes it for ``BitsAndBytesConfig(load_in_8bit=True)``."""
    reason = conflict(layers, untouched)
    if reason is not None:
        raise UserError(reason)
    rules = [quant.activations for _, quant in layers if quant.activations is not None]
    if not rules:
        return None
    return {
        "quant_method": "bitsandbytes",
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": rules[0].threshold,
        "llm_int8_skip_modules": [*NEVER, *(spec.name for spec in untouched)],
        "llm_int8_has_fp16_weight": False,
        "llm_int8_enable_fp32_cpu_offload": False,
    }


def list_layers(
    headers: Mapping[str, TensorHeader], config: Mapping[str, Any]
) -> list[tuple[LayerSpec, tuple[str, ...]]]:
    """Every encoded layer and the tensors that make it; Conv1D layers too have kind ``linear`` here."""
    _read_rule(config)
    found = []
    for tensor in headers:
        name, _, leaf = tensor.rpartition(".")
        weight = headers.get(f"{name}.weight")
        if leaf != "SCB" or weight is None or len(weight.shape) != 2:
            continue
        spec = LayerSpec(name, (weight.shape[0], weight.shape[1]), torch.bfloat16, "linear", f"{name}.weight")
        names = (f"{name}.weight", tensor, f"{name}.weight_format")
        found.append((spec, tuple(one for one in names if one in headers)))
    return found


def round_inputs(x: Tensor, rule: ActivationRule, kept: Tensor | None = None, groups: Tensor | None = None) -> Tensor:
    """What bitsandbytes multiplies in place of ``x`` ``(..., I)``, in its dtype."""
    assert kept is None and groups is None, "bitsandbytes knows neither a static list nor groups"
    if x.numel() == 0:
        return x
    rows = x.reshape(-1, x.shape[-1])
    half = rows.to(torch.float16)
    outliers = half.abs() >= rule.threshold if rule.threshold > 0 else torch.zeros_like(half, dtype=torch.bool)
    half = half.masked_fill(outliers, 0)
    peak = half.abs().amax(1, keepdim=True).float()
    inverse = torch.where(peak > 0, 127 / peak, torch.zeros_like(peak))
    rounded = (half * inverse).round_().mul_(peak * (127 * UNIT)).to(x.dtype)
    return torch.where(outliers.any(0), rows, rounded).reshape(x.shape)


def _find_absmax(spec: LayerSpec, scale: Tensor) -> Tensor:
    """``SCB`` ``(O,)`` with ``SCB / 127 == scale`` in float32: a 16-bit number, the product, or a neighbour."""
    middle = scale * 127
    found = middle.to(torch.float16).float()
    for candidate in (
        middle.to(torch.bfloat16).float(),
        middle,
        torch.nextafter(middle, middle * 2),
        torch.nextafter(middle, middle / 2),
    ):
        found = torch.where(found / 127 == scale, found, candidate)
    assert torch.equal(found / 127, scale), f"{spec.name}: a scale is not the 127th part of a float32"
    return found.contiguous()


def _read_rule(config: Mapping[str, Any]) -> ActivationRule:
    where = "quantization_config"
    if config.get("load_in_8bit") is not True or config.get("llm_int8_has_fp16_weight"):
        raise UserError(f"{where}: only int8 weights of bitsandbytes are read (load_in_8bit: true), not 4-bit ones")
    threshold = config.get("llm_int8_threshold", 6.0)
    if not isinstance(threshold, float | int) or isinstance(threshold, bool) or not 0 <= threshold < float("inf"):
        raise UserError(f"{where}: llm_int8_threshold is {threshold!r}, wanted a number that is not negative")
    return ActivationRule(8, float(threshold))
