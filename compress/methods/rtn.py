"""Round to nearest: each weight goes to the nearest point of its group's grid. Needs no data."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from compress.methods.base import MethodConfig, check_groups
from compress.numerics import grids
from compress.numerics.activations import group_inputs, rounding_rule
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
    activation_groups: int = Field(
        1, ge=1, le=256, description="groups of input features of like range, each with a scale of its own per token"
    )
    on_indivisible: Literal["error", "adjust", "skip"] = Field(
        "error", description="when group_size does not divide a layer's inputs: stop, take a smaller divisor, or skip"
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Config:
        return check_groups(self, self.activation_bits, self.activation_groups)


def needs(config: Config) -> frozenset[str]:
    """Nothing: rounding looks at the weights only; for groups of inputs the largest magnitude of each feature."""
    return frozenset({"absmax"}) if config.activation_groups > 1 else frozenset()


def activation_rule(config: Config) -> ActivationRule | None:
    """How inputs are rounded at run time."""
    return rounding_rule(config.activation_bits, config.activation_groups)


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
        input_groups=group_inputs(statistic, weight.shape[1], config.activation_groups),
        notes=dict(state.notes),
    )
