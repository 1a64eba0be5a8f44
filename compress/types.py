"""The values that flow from the recipe to the written file: frozen dataclasses with their invariants.

Dimension letters used everywhere: O out features, I in features, G groups per row, T tokens, D hidden size,
N windows (calibration sequences), E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerSpec:
    """One linear layer of a block as the methods see it: a matrix ``(O, I)``, wherever it really lives.

    ``kind`` tells how the parameter is stored: ``linear`` ``(O, I)``; ``conv1d`` ``(I, O)``, transposed (GPT-2);
    ``expert`` slice ``index`` of a fused 3-D tensor ``(E, O, I)``. Outside the blocks, ``(vocabulary, D)`` both:
    ``embedding``, what tokens become, and with ``tied`` what logits are made with too; ``head``, an output head of its
    own.
    """

    name: str  # full name in the model, e.g. "model.layers.0.self_attn.q_proj"
    shape: tuple[int, int]  # (O, I)
    dtype: torch.dtype
    kind: Literal["linear", "conv1d", "expert", "embedding", "head"] = "linear"
    parameter: str = ""  # full name of the parameter that holds it, e.g. "model.layers.0.mlp.experts.down_proj"
    index: int | None = None  # which expert, for kind "expert"
    tied: tuple[str, ...] = ()  # further parameters that are the same matrix, e.g. ("lm_head.weight",)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class Grid:
    """An affine grid, one scale and zero per row and group of ``group_size`` consecutive inputs.

    ``w_hat[o, i] = scale[o, g] * (code[o, i] - zero[o, g])``, ``g = i // group_size``, codes ``0 .. 2**bits - 1``.
    Symmetric means ``zero == 2**(bits - 1)`` everywhere; the scale may then be negative (full-range signed absmax).
    ``zero`` holds integers unless ``float_zero``.
    """

    bits: int
    group_size: int  # inputs per group; I for one group per row
    symmetric: bool
    scale: Tensor  # (O, G) float32, every value representable in the dtype it will be stored in
    zero: Tensor  # (O, G) float32; where float_zero, representable in the dtype of the scale as well
    float_zero: bool = False

    def __post_init__(self) -> None:
        assert self.scale.shape == self.zero.shape and self.scale.dim() == 2, "scale and zero are (O, G)"

    @property
    def max_code(self) -> int:
        return (1 << self.bits) - 1


@dataclass(frozen=True)
class ActivationRule:
    """How a layer's input is rounded when the model runs: per token, symmetric, the scale from the token itself.

    ``threshold``: features in which any token of the forward pass reaches this magnitude stay as they are (LLM.int8);
    0 for none. ``groups``: so many groups of features have a scale of their own in each token, 1 for one scale.
    """

    bits: int = 8
    threshold: float = 0.0
    groups: int = 1


@dataclass(frozen=True)
class Outliers:
    """Features of a layer's input whose weight columns are kept in high precision; the input there is not rounded."""

    index: Tensor  # (n,) int64, sorted, no two alike
    weight: Tensor  # (O, n) float32, every value representable in the model's dtype

    def __post_init__(self) -> None:
        assert self.index.dim() == 1 and self.weight.shape[1] == len(self.index), "one column per outlier feature"
        assert bool((self.index.diff() > 0).all()), "outlier features are sorted, no two alike"


@dataclass(frozen=True)
class LayerState:
    """A layer on its way through the steps: the weight as the model will see it and what steps made of it.

    Invariant: with ``grid`` set, ``weight`` equals the dequantization of ``codes``, plus ``outliers.weight`` in the
    columns ``outliers.index``, whose codes stand for 0.
    """

    weight: Tensor  # (O, I) float32
    grid: Grid | None = None
    codes: Tensor | None = None  # (O, I) uint8, present exactly when grid is
    outliers: Outliers | None = None
    activations: ActivationRule | None = None  # None: the input is left as it is
    input_groups: Tensor | None = None  # (I,) uint8, the group of each feature, where activations.groups > 1
    notes: Mapping[str, Any] = field(default_factory=dict)  # what a method did: damping, fallback, dead columns ...

    def __post_init__(self) -> None:
        assert (self.grid is None) == (self.codes is None), "grid and codes come together"
        several = self.activations is not None and self.activations.groups > 1
        assert several == (self.input_groups is not None), "groups of activations come with each feature's group"

    def with_notes(self, **notes: Any) -> LayerState:
        return replace(self, notes={**self.notes, **notes})


@dataclass
class Statistic:
    """What calibration says of one distinct layer input, over ``tokens`` rows ``x`` of ``I`` features.

    ``gram``: ``sum x x^T`` ``(I, I)`` float32; ``(0, 0)`` where no step wants it. ``cross``: ``sum (x_dense - x) x^T``
    ``(I, I)`` float32, where ``x_dense`` is the same input in the uncompressed model; only where a step wants targets
    from the dense stream.
    ``cache`` keeps what methods derive from it (a Cholesky factor), since q, k and v share one statistic.
    """

    tokens: int
    gram: Tensor
    cross: Tensor | None = None
    cross_tokens: int = 0  # rows that cross was summed over; fewer than tokens if the dense stream has fewer windows
    residual: Tensor | None = None
    """``sum (h_dense - h) x^T`` ``(O, I)`` over the same rows as ``cross``: ``h`` is the residual stream that the
    layer's output is added to, just before the addition. Only for layers that write to the residual stream."""
    absmax: Tensor | None = None  # (I,) float32, the largest |x| of each feature
    peaks: Tensor | None = None  # (tokens,) float32, the largest |x| of each row; comes with absmax
    cache: dict[Any, Any] = field(default_factory=dict)


@dataclass
class LayerReport:
    """What happened to one layer; one entry of ``report.json``'s ``layers``."""

    name: str
    shape: tuple[int, int]
    method: str  # step names joined by "+"
    weight_error: float  # ||W - W_hat||^2 / ||W||^2
    output_error: float | None  # ||(W - W_hat) X||^2 / ||W X||^2 on held-out tokens
    bits_per_weight: float  # counted with scales and zeros, as stored
    seconds: float
    tokens: int | None = None  # calibration rows that this layer's statistic saw
    fallback: str | None = None  # what was done instead of what the recipe asked, and why
    notes: dict[str, Any] = field(default_factory=dict)
