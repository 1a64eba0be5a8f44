"""LLM.int8() (arXiv 2208.07339): int8 weights and activations, outlier features of the input in 16 bit.

Weights get one scale per output row, ``max|w| / 127``, and the input one per token; features in which the input reaches
the threshold are multiplied as they are. Which features those are is decided at run time from all tokens of the forward
pass (``outliers: dynamic``, the paper and bitsandbytes), or once from the calibration text (``static``).

Deviation from the paper: with ``dynamic`` the weight columns of outlier features are the dequantized int8 ones, as in
bitsandbytes at inference, since any feature may become one and a second copy of the weight is not stored. With
``static`` they are kept in the model's own dtype, as in the paper.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.methods.base import MethodConfig
from compress.numerics import grids
from compress.types import ActivationRule, Grid, LayerState, Outliers, Statistic

KIND = "layer"
ROWWISE = True
ZERO = 128  # the code that stands for 0; codes go from 1 to 255
LISTED = 32  # outlier features that the report names


class Config(MethodConfig):
    """What a recipe may say of ``llm_int8``."""

    BITS: ClassVar[int] = 8

    threshold: float = Field(6.0, ge=0, description="a feature that reaches this magnitude is an outlier; 0 = none is")
    outliers: Literal["dynamic", "static"] = Field(
        "dynamic", description="found at run time in each forward pass, or once in the calibration text"
    )
    max_outliers: int = Field(
        32, ge=1, description="static: at most so many features per layer, the largest first; their columns are stored"
    )


def needs(config: Config) -> frozenset[str]:
    """The largest magnitude of each feature: for the static list, and for the report in any case."""
    return frozenset({"absmax"})


def activation_rule(config: Config) -> ActivationRule:
    """How inputs are rounded at run time."""
    return ActivationRule(8, config.threshold if config.outliers == "dynamic" else 0.0)


def count_outliers(config: Config) -> int:
    """The most outlier columns that a layer stores."""
    return config.max_outliers if config.outliers == "static" and config.threshold > 0 else 0


def compress(state: LayerState, statistic: Statistic | None, config: Config, scale_dtype: torch.dtype) -> LayerState:
    """Quantize ``state.weight`` ``(O, I)``; the result's weight is what the codes and the kept columns stand for.

    Notes on the calibration text: ``outlier_features`` (how many reach the threshold), ``outlier_index`` (the first 32,
    the largest first), ``largest_input``, ``outlier_tokens`` (share of tokens with one), and with ``static``
    ``kept_features``; ``fallback`` where a static list is wanted and no token was seen.
    """
    weight = state.weight.float()
    kept = _choose(statistic, config)
    inside = weight.index_fill(1, kept, 0.0) if len(kept) else weight
    scale = grids.round_scale(inside.abs().amax(1, keepdim=True) / 127, scale_dtype)
    codes = (inside / scale).round_().clamp_(-127, 127)
    quantized = codes * scale
    outliers = None
    if config.outliers == "static":
        outliers = Outliers(kept, weight[:, kept])
        quantized[:, kept] = outliers.weight
    grid = Grid(8, weight.shape[1], True, scale, torch.full_like(scale, ZERO))
    made = LayerState(
        quantized,
        grid,
        (codes + ZERO).to(torch.uint8),
        outliers if len(kept) else None,
        activation_rule(config),
        notes=dict(state.notes),
    )
    return made.with_notes(**_describe(statistic, config, len(kept)))


def _choose(statistic: Statistic | None, config: Config) -> Tensor:
    """The static list: features that reach the threshold, at most ``max_outliers``; ``(n,)`` sorted."""
    absmax = None if statistic is None else statistic.absmax
    if absmax is None or count_outliers(config) == 0:
        return torch.zeros(0, dtype=torch.int64)
    reach = int((absmax >= config.threshold).sum())
    return absmax.argsort(descending=True, stable=True)[: min(reach, config.max_outliers)].sort().values


def _describe(statistic: Statistic | None, config: Config, kept: int) -> dict[str, Any]:
    """What calibration says of outliers."""
    if statistic is None or statistic.absmax is None or statistic.tokens == 0:
        static = config.outliers == "static"
        return {"fallback": "no calibration tokens: no feature is kept in high precision"} if static else {}
    absmax, peaks = statistic.absmax, statistic.peaks
    order = absmax.argsort(descending=True, stable=True)
    threshold = config.threshold if config.threshold > 0 else float("inf")
    count = int((absmax >= threshold).sum())
    notes: dict[str, Any] = {
        "outlier_features": count,
        "outlier_index": order[: min(count, LISTED)].tolist(),
        "largest_input": float(absmax.max()),
        "outlier_tokens": None if peaks is None else float((peaks >= threshold).float().mean()),
    }
    return {**notes, "kept_features": kept} if config.outliers == "static" else notes
