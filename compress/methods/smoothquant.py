"""SmoothQuant (arXiv 2211.10438): moves the range of inputs into the weights, so that both can be rounded to 8 bits.

Channel ``j`` of what a norm makes is divided by ``s_j = max|x_j|^alpha / max|w_j|^(1 - alpha)`` (equation 4), by the
norm's own weight, and the columns ``j`` of all layers that read it are multiplied by it: the model computes the same.
Beyond the paper, from layer to layer too: ``v -> o`` and ``up -> down``. A step of this method comes before the one
that quantizes; by itself it only rescales.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from compress.methods.base import MethodConfig

KIND = "block"


class Config(MethodConfig):
    """What a recipe may say of ``smoothquant``."""

    alpha: float = Field(
        0.5, ge=0, le=1, description="share of the range that goes into the weights; 0.8 to 0.85 suits Llama models"
    )
    inner: bool = Field(True, description="also from v to o and from up to down, where that is exact")
    powers_of_two: bool = Field(
        False, description="factors rounded to powers of two: no weight is rounded by the rescaling"
    )


def needs(config: Config) -> frozenset[str]:
    """The largest magnitude of each channel, which the driver measures in a pass of its own."""
    return frozenset({"absmax"})


def find_factors(inputs: Tensor, weights: Tensor, config: Config) -> Tensor:
    """Factors ``(n,)`` float32 from the largest magnitudes ``(n,)`` of inputs and of weight columns.

    Channels that are never used, and columns of zeros, keep 1. Factors stay within 1e-5 and 1e5 (METHODS 10.1).
    """
    usable = (inputs > 0) & (weights > 0)
    x, w = (torch.where(usable, one, torch.ones_like(one)).float() for one in (inputs, weights))
    factors = (x.pow(config.alpha) / w.pow(1 - config.alpha)).clamp(1e-5, 1e5)
    if config.powers_of_two:
        factors = torch.exp2(factors.log2().round())
    return torch.where(usable, factors, torch.ones_like(factors))
