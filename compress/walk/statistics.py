"""Statistics of a group's input, window by window: Gram matrix, cross term with the dense stream, range, tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from compress.numerics.gram import add_cross, add_drift, add_gram, mirror_gram
from compress.types import Statistic
from compress.walk.coroutine import BlockWalk, InputGroup, Rows
from compress.walk.hidden import Hidden


class TokenWeights:
    """A weight ``w_t`` for every token of every window; with it a Gram matrix is ``sum w_t x_t x_t^T``.

    ``residual``: ``w_t = 1 / mean(h_t^2)`` of the block's input hidden state ``h_t``, scaled to mean 1 over the tokens
    of ``windows``: an error counts relative to the residual stream that it is added to, so that the few tokens of huge
    norm (attention sinks) do not rule the Gram matrix. They hold for layers that write to that stream; the inputs of
    all others come out of a norm, and count alike.
    """

    def __init__(self, inputs: Hidden, windows: Sequence[int]) -> None:
        tiny = torch.finfo(torch.float32).tiny
        raw = [1 / inputs.read(n)[0].float().square().mean(dim=1).clamp_min(tiny) for n in range(len(inputs))]
        mean = torch.cat([raw[n] for n in windows]).mean()
        self._weights = [weight / mean for weight in raw]

    def read(self, n: int) -> Tensor:
        """``(T_n,)`` float32."""
        return self._weights[n]


def make_token_weights(
    kind: Literal["uniform", "residual"], inputs: Hidden, held_out: Sequence[int] = ()
) -> TokenWeights | None:
    """Token weights of a block's ``inputs``, normalised over its calibration windows; None for uniform ones."""
    if kind == "uniform":
        return None
    return TokenWeights(inputs, [n for n in range(len(inputs)) if n not in set(held_out)])


class Accumulator:
    """Builds the ``Statistic`` of one group from its rows."""

    def __init__(
        self,
        features: int,
        cross: bool,
        weights: TokenWeights | None,
        device: torch.device,
        gram: bool = True,
        absmax: bool = False,
    ) -> None:
        self._weights = weights
        self._gram = torch.zeros(features, features, device=device) if gram else None
        self._absmax = torch.zeros(features, device=device) if absmax else None
        self._peaks: list[Tensor] = []  # (T,) each
        self._cross = torch.zeros(features, features, device=device) if cross else None
        self._residual: Tensor | None = None  # (O, I)
        self._tokens = 0
        self._cross_tokens = 0

    @torch.no_grad()
    def add(self, rows: Rows) -> None:
        """Add one window: ``gram += sum w x x^T``; with a pair ``cross`` and ``residual`` too; ranges without ``w``."""
        self._tokens += rows.x.shape[0]
        if self._absmax is not None:
            size = rows.x.abs().float()
            torch.maximum(self._absmax, size.amax(0), out=self._absmax)
            self._peaks.append(size.amax(1))
        if self._gram is None:
            return
        root = self._root_weights(rows)
        x = _scale_rows(rows.x, root)
        add_gram(self._gram, x)
        if self._cross is None or rows.dense is None:
            return
        add_cross(self._cross, x, _scale_rows(rows.dense, root))
        self._cross_tokens += x.shape[0]
        if rows.streams is not None:
            now, dense = (_scale_rows(one, root) for one in rows.streams)
            if self._residual is None:
                self._residual = torch.zeros(now.shape[1], x.shape[1], device=x.device)
            add_drift(self._residual, x, now, dense)

    def statistic(self) -> Statistic:
        """What was added so far; the accumulator is done after it."""
        cross = self._cross if self._cross_tokens else None
        gram = torch.zeros(0, 0) if self._gram is None else mirror_gram(self._gram)
        found = Statistic(self._tokens, gram, cross, cross_tokens=self._cross_tokens, residual=self._residual)
        if self._absmax is not None:
            found.absmax = self._absmax
            found.peaks = torch.cat([torch.zeros(0, device=self._absmax.device), *self._peaks])
        return found

    def _root_weights(self, rows: Rows) -> Tensor | None:
        """``sqrt(w)`` of each row ``(T, 1)``."""
        if self._weights is None:
            return None
        weight = self._weights.read(rows.window).to(rows.x.device)
        weight = weight if rows.positions is None else weight[rows.positions]
        return weight.sqrt()[:, None]


def _scale_rows(rows: Tensor, root: Tensor | None) -> Tensor:
    """Each row times its factor ``(T, 1)``, in the rows' dtype."""
    return rows if root is None else (rows * root).to(rows.dtype)


def accumulate(
    group: InputGroup,
    *,
    cross: bool = False,
    weights: TokenWeights | None = None,
    gram: bool = True,
    absmax: bool = False,
) -> Statistic:
    """The statistic of a group that waits, over the calibration windows: the parts of it that are asked for."""
    rows = iter(group.rows())
    first = next(rows, None)
    features = group.specs[0].shape[1]
    if first is None:
        return Accumulator(features, cross, None, torch.device("cpu"), gram, absmax).statistic()
    accumulator = Accumulator(features, cross, weights if group.writes else None, first.x.device, gram, absmax)
    accumulator.add(first)
    for one in rows:
        accumulator.add(one)
    return accumulator.statistic()


def read_held_out(group: InputGroup) -> Tensor:
    """All held-out rows of a group that waits, ``(T, I)`` in the model's dtype; none give ``(0, I)``."""
    rows = [one.x for one in group.rows(held_out=True)]
    return torch.cat(rows) if rows else torch.zeros(0, group.specs[0].shape[1])


def observe(
    walk: BlockWalk,
    *,
    cross: bool = False,
    weights: TokenWeights | None = None,
    gram: bool = True,
    absmax: bool = False,
) -> list[tuple[InputGroup, Statistic, Tensor]]:
    """All groups of a block in one pass with its weights as they are: (group, its statistic, its held-out rows)."""
    device = next(walk.block.parameters()).device
    groups = walk.input_groups()
    calibration = {
        one.index: Accumulator(one.specs[0].shape[1], cross, weights if one.writes else None, device, gram, absmax)
        for one in groups
    }
    held_out = {one.index: [torch.zeros(0, one.specs[0].shape[1], device=device)] for one in groups}

    def visit(group: InputGroup, rows: Rows) -> None:
        if rows.window in walk.held_out:
            held_out[group.index].append(rows.x.clone())
        else:
            calibration[group.index].add(rows)

    walk.observe(visit)
    return [(one, calibration[one.index].statistic(), torch.cat(held_out[one.index])) for one in groups]
