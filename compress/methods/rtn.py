"""Round to nearest: each weight goes to the nearest point of its group's grid. Needs no data."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from compress.methods.base import MethodConfig
from compress.numerics import grids
from compress.types import ActivationRule, Grid, LayerState, Statistic

KIND = "layer"
ROWWISE = True


class Config(MethodConfig):
    """What a recipe may say of ``rtn``."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per code")
    group_size: int = Field(64, description="consecutive inputs that share a scale and a zero; -1 = a whole row")
    symmetric: bool = Field(False, description="full-range symmetric grid (zero in the middle) instead of asymmetric")
    clip_search: bool = Field(False, description="choose the range of least squared error instead of min-max")
    activation_bits: Literal[8] | None = Field(
        None, description="8: inputs too are rounded at run time, per token (W8A8); null: they stay as they are"
    )
    on_indivisible: Literal["error", "adjust", "skip"] = Field(
        "error", description="when group_size does not divide a layer's inputs: stop, take a smaller divisor, or skip"
    )


def needs(config: Config) -> frozenset[str]:
    """Nothing: rounding looks at the weights only."""
    return frozenset()


def activation_rule(config: Config) -> ActivationRule | None:
    """How inputs are rounded at run time."""
    return None if config.activation_bits is None else ActivationRule(config.activation_bits)


def compress(state: LayerState, statistic: Statistic | None, config: Config, scale_dtype: torch.dtype) -> LayerState:
    """Quantize ``state.weight`` ``(O, I)``; the result's weight is the dequantization of its codes."""
    weight = state.weight.float()
    group_size = weight.shape[1] if config.group_size == -1 else config.group_size
    rule = grids.FitRule(
        config.bits, config.symmetric, scale_dtype, steps=41 if config.clip_search else 0, polish=2 * config.clip_search
    )
    scale, zero = grids.fit_grid(grids.split_groups(weight, group_size), rule)
    codes = grids.quantize(weight, scale, zero, group_size, rule.max_code)
    grid = Grid(config.bits, group_size, config.symmetric, scale, zero)
    return LayerState(
        grids.dequantize(codes, scale, zero, group_size),
        grid,
        codes,
        activations=activation_rule(config),
        notes=dict(state.notes),
    )
