"""GPTQ (arXiv 2210.17323): rounds column by column, later columns making up for the error of earlier ones.

On top of the paper, each by a field of ``Config``: grids fitted by what an error costs, targets taken from the dense
stream, and, after the sweep, turns of coordinate descent over the codes and least squares over the scales.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from compress.methods import rtn
from compress.methods.base import MethodConfig, check_groups
from compress.numerics import gram as grams
from compress.numerics import grids, obs, order, refine
from compress.numerics.activations import group_inputs, rounding_rule
from compress.types import ActivationRule, Grid, LayerState, Statistic

KIND = "layer"
ROWWISE = True


class Config(MethodConfig):
    """What a recipe may say of ``gptq``."""

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per code")
    group_size: int = Field(64, description="consecutive inputs that share a scale and a zero; -1 = a whole row")
    symmetric: bool = Field(False, description="full-range symmetric grid (zero in the middle) instead of asymmetric")
    float_zero: bool = Field(False, description="fractional zeros; only the native format carries them")
    clip_search: bool = Field(True, description="search the range of least weighted error instead of min-max")
    importance: Literal["none", "diagonal", "compensated"] = Field(
        "compensated", description="what an error costs in the search: 1, diag(H), or 1/U_ii^2 (after compensation)"
    )
    order: Literal["none", "activation", "group_aware"] = Field(
        "group_aware",
        description="columns as they are, by diag(H) with grids fitted first, or by diag(H) within groups",
    )
    token_weights: Literal["uniform", "residual"] = Field(
        "residual",
        description="every token counts alike, or relative to the size of the residual stream that it is added to",
    )
    activation_bits: Literal[8] | None = Field(
        None, description="8: inputs too are rounded at run time, per token (W8A8); null: they stay as they are"
    )
    activation_groups: int = Field(
        1, ge=1, le=256, description="groups of input features of like range, each with a scale of its own per token"
    )
    damping: float = Field(0.1, ge=0, le=10, description="added to diag(H), relative to its mean")
    block_size: int = Field(32, ge=1, description="columns compensated at a time; changes the speed only")
    targets: Literal["layer", "dense", "stream"] = Field(
        "stream",
        description="make up for the layer's own rounding (layer), also for what its input lost before it (dense), "
        "also for what the residual stream that it writes to lost before it (stream)",
    )
    shrinkage: float = Field(0.5, ge=0, le=1, description="share of the correction for earlier losses that is applied")
    correction_damping: float = Field(
        10.0,
        ge=0,
        le=1000,
        description="damping of that correction, relative to mean(diag H) times inputs per calibration token: "
        "the fewer tokens, the less it may fit",
    )
    dense_windows: int | None = Field(
        8, ge=1, description="calibration windows that also run through the dense model for the targets; null = all"
    )
    refinements: int = Field(1, ge=0, description="turns of least squares for scales and descent over codes at the end")
    true_sequential: bool = Field(
        True, description="within a block, later layers see inputs made by the already quantized earlier ones"
    )
    on_indivisible: Literal["error", "adjust", "skip"] = Field(
        "error", description="when group_size does not divide a layer's inputs: stop, take a smaller divisor, or skip"
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Config:
        return check_groups(self, self.activation_bits, self.activation_groups)

    @model_validator(mode="after")
    def _check_zero(self) -> Config:
        if self.symmetric and self.float_zero:
            raise ValueError("float_zero needs an asymmetric grid: set symmetric: false or float_zero: false")
        return self


def needs(config: Config) -> frozenset[str]:
    """The Gram matrix; for targets beyond the layer also the cross matrix with the dense stream, and its residual."""
    ranges = {"absmax"} if config.activation_groups > 1 else set()
    if config.targets == "layer" or config.shrinkage == 0:
        return frozenset({"gram"} | ranges)
    return frozenset({"gram", "cross"} | ({"residual"} if config.targets == "stream" else set()) | ranges)


def activation_rule(config: Config) -> ActivationRule | None:
    """How inputs are rounded at run time."""
    return rounding_rule(config.activation_bits, config.activation_groups)


def compress(state: LayerState, statistic: Statistic | None, config: Config, scale_dtype: torch.dtype) -> LayerState:
    """Quantize ``state.weight`` ``(O, I)`` under ``statistic``; rows are independent of each other.

    Notes: ``damping`` used, ``damping_escalations``, ``dead_columns``, ``targets`` as far as the statistic knew them,
    or ``fallback`` where no token was seen.
    Raises ``NumericsError`` when no damping makes the Gram matrix definite.
    """
    if statistic is None or statistic.tokens == 0:
        return _round_to_nearest(state, config, scale_dtype)
    problem = _prepare(state.weight.float(), statistic, config)
    rule = grids.FitRule(
        config.bits,
        config.symmetric,
        scale_dtype,
        steps=9 if config.clip_search else 0,
        polish=3 * config.clip_search,
        float_zero=config.float_zero,
    )
    rounding = _Rounding(problem, rule)
    obs.sweep_columns(problem.target.T, problem.factor.upper, rounding, problem.block_size)
    back = order.invert_order(problem.permutation)
    codes = rounding.codes[back]
    scale, zero = _refine(codes, rounding.scale, rounding.zero, problem, rule, config)
    notes: dict[str, Any] = {
        "damping": problem.factor.damping,
        "damping_escalations": problem.factor.escalations,
        "dead_columns": problem.dead,
        "targets": _name_targets(statistic, config),
    }
    input_groups = group_inputs(statistic, len(codes), config.activation_groups)
    return _finish(state, codes, scale, zero, problem.group_size, config, input_groups).with_notes(**notes)


@dataclass(frozen=True)
class _Problem:
    """Everything in the order of the visit: ``target`` ``(I, O)``, importance ``(I,)``, group of each column."""

    target: Tensor
    factor: grams.Factor
    importance: Tensor | None
    permutation: Tensor
    group_of: list[int]  # original group of the column visited i-th
    group_size: int
    block_size: int
    dead: int
    whole_groups: bool  # are groups visited as wholes, so that grids can wait for the compensated weights?


def _prepare(weight: Tensor, statistic: Statistic, config: Config) -> _Problem:
    columns = weight.shape[1]
    group_size = columns if config.group_size == -1 else config.group_size
    diagonal = statistic.gram.diagonal()
    if config.order == "activation":
        permutation = order.order_by_activation(diagonal)
    elif config.order == "group_aware":
        permutation = order.order_within_groups(diagonal, group_size)
    else:
        permutation = torch.arange(columns, device=weight.device)
    key = ("factor", config.order, group_size, config.damping)
    if key not in statistic.cache:
        statistic.cache[key] = grams.factor_gram(statistic.gram[permutation][:, permutation], config.damping)
    factor = statistic.cache[key]
    dead = grams.find_dead_columns(statistic.gram)
    target = _correct(weight.masked_fill(dead, 0.0), statistic, config)[:, permutation]
    importance = {
        "none": None,
        "diagonal": factor.gram.diagonal(),
        "compensated": factor.upper.diagonal().square().reciprocal(),
    }[config.importance]
    divides = group_size % config.block_size == 0 or config.block_size % group_size == 0
    return _Problem(
        target.T.contiguous(),
        factor,
        importance,
        permutation,
        (permutation // group_size).tolist(),
        group_size,
        config.block_size if divides else group_size,
        int(dead.sum()),
        config.order != "activation",
    )


def _correct(weight: Tensor, statistic: Statistic, config: Config) -> Tensor:
    """``weight`` ``(O, I)`` moved to make up for losses before the layer, as far as the statistic knows them."""
    wanted = needs(config)
    cross = statistic.cross if "cross" in wanted else None
    residual = statistic.residual if "residual" in wanted else None
    if cross is None and residual is None:
        return weight
    tokens = statistic.cross_tokens or statistic.tokens
    damping = config.correction_damping * len(statistic.gram) / tokens
    key = ("correction", damping)
    if key not in statistic.cache:
        statistic.cache[key] = grams.factor_gram(statistic.gram, damping)
    factor = statistic.cache[key]
    return grams.correct_targets(weight, factor, cross, residual, config.shrinkage * statistic.tokens / tokens)


def _name_targets(statistic: Statistic, config: Config) -> str:
    """What the targets were really taken from: a layer that writes to no residual stream knows only its input."""
    wanted = needs(config)
    if "residual" in wanted and statistic.residual is not None:
        return "stream"
    return "dense" if "cross" in wanted and statistic.cross is not None else "layer"


class _Rounding:
    """The rounder of the OBS loop: fits a grid where a group starts, keeps codes ``(I, O)``, grids ``(G, O)``."""

    def __init__(self, problem: _Problem, rule: grids.FitRule) -> None:
        self.problem, self.rule = problem, rule
        columns, rows = problem.target.shape
        groups = columns // problem.group_size
        self.codes = torch.empty_like(problem.target)
        self.scale = torch.ones((groups, rows), device=problem.target.device)
        self.zero = torch.zeros_like(self.scale)
        self.inverse = torch.ones_like(self.scale)
        if not problem.whole_groups:
            back = order.invert_order(problem.permutation)
            for g in range(groups):
                self._fit(g, problem.target, back[g * problem.group_size : (g + 1) * problem.group_size])

    def __call__(self, i: int, current: Tensor) -> Tensor:
        g = self.problem.group_of[i]
        if self.problem.whole_groups and i % self.problem.group_size == 0:
            self._fit(g, current, torch.arange(i, i + self.problem.group_size, device=current.device))
        codes = torch.addcmul(self.zero[g], current[i], self.inverse[g], out=self.codes[i])
        codes.round_().clamp_(0, self.rule.max_code)
        return torch.sub(codes, self.zero[g]).mul_(self.scale[g])

    def _fit(self, g: int, current: Tensor, columns: Tensor) -> None:
        importance = None if self.problem.importance is None else self.problem.importance[columns]
        self.scale[g], self.zero[g] = grids.fit_grid(current[columns].T.contiguous(), self.rule, importance)
        self.inverse[g] = self.scale[g].reciprocal()


def _refine(
    codes: Tensor, scale: Tensor, zero: Tensor, problem: _Problem, rule: grids.FitRule, config: Config
) -> tuple[Tensor, Tensor]:
    """Turns of least squares for the grids and descent over ``codes`` ``(I, O)`` (in place), in the original order."""
    if config.refinements == 0:
        return scale, zero
    back = order.invert_order(problem.permutation)
    gram, target = problem.factor.gram[back][:, back], problem.target[back]
    for _ in range(config.refinements):
        if rule.float_zero:
            scale, zero = refine.fit_scales_and_zeros(codes, scale, zero, target, gram, rule.scale_dtype)
        else:
            scale = refine.fit_scales(codes, scale, zero, target, gram, rule.scale_dtype)
        refine.descend_codes(codes, scale, zero, target, gram, rule.max_code, config.block_size)
    return scale, zero


def _finish(
    state: LayerState,
    codes: Tensor,
    scale: Tensor,
    zero: Tensor,
    group_size: int,
    config: Config,
    input_groups: Tensor | None,
) -> LayerState:
    """The layer's new state from transposed ``codes`` ``(I, O)`` and grids ``(G, O)``."""
    rows = codes.T.contiguous().to(torch.uint8)
    scale, zero = scale.T.contiguous(), zero.T.contiguous()
    grid = Grid(config.bits, group_size, config.symmetric, scale, zero, config.float_zero)
    weight = grids.dequantize(rows, scale, zero, group_size)
    return LayerState(
        weight, grid, rows, activations=activation_rule(config), input_groups=input_groups, notes=dict(state.notes)
    )


def _round_to_nearest(state: LayerState, config: Config, scale_dtype: torch.dtype) -> LayerState:
    plain = rtn.Config(
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        clip_search=config.clip_search,
        activation_bits=config.activation_bits,
        activation_groups=config.activation_groups,
        on_indivisible=config.on_indivisible,
    )
    return rtn.compress(state, None, plain, scale_dtype).with_notes(fallback="no calibration tokens: round to nearest")
