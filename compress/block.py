"""One block of the model: observe its layer inputs, apply the steps, and send the windows on to the next block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compress.apply import compress_layers, read_inputs
from compress.plan_select import PlannedLayer, load_method
from compress.smooth import Notes, list_block_steps, smooth_block
from compress.storage.formats.base import RoundInputs
from compress.types import LayerReport, LayerSpec, LayerState, Statistic
from compress.walk.coroutine import BlockWalk
from compress.walk.hidden import Hidden
from compress.walk.layers import Rounding, set_weight, view_weight
from compress.walk.skeleton import Skeleton
from compress.walk.statistics import accumulate, make_token_weights, observe, read_held_out
from compress.walk.stream import Call


@dataclass(frozen=True)
class Streams:
    """The hidden states in front of a block.

    ``main``: behind the compressed blocks; the calibration windows and, last, the held-out probe. ``dense``: behind the
    original blocks; the first calibration windows only, or None where no step looks at it.
    """

    main: Hidden
    dense: Hidden | None

    @property
    def probe(self) -> int:
        """Index of the held-out window in ``main``."""
        return len(self.main) - 1

    def open_next(self, folder: Path | None, index: int) -> Streams:
        """Empty streams of the same shape for block ``index``, in ``folder`` (None: in memory)."""

        def create(name: str, like: Hidden) -> Hidden:
            path = None if folder is None else folder / self.file(name, index)
            return Hidden.create(path, like.lengths, like.width, like.dtype)

        return Streams(create("main", self.main), None if self.dense is None else create("dense", self.dense))

    @staticmethod
    def file(name: str, index: int) -> str:
        """Name of the file that holds a stream in front of block ``index``."""
        return f"{name}-{index:05d}.bin"

    @staticmethod
    def delete(folder: Path, index: int) -> None:
        """Remove the files in front of block ``index``, once that block is finished."""
        for path in folder.glob(f"*-{index:05d}.bin*"):
            path.unlink()

    def close(self) -> None:
        """Close the files, if there are any."""
        for one in (self.main, self.dense):
            if one is not None:
                one.close()


@dataclass(frozen=True)
class Needs:
    """What the steps of some layers want to know of their inputs."""

    gram: bool
    absmax: bool
    cross: bool
    true_sequential: bool
    token_weights: Literal["uniform", "residual"]
    dense_windows: int  # how many calibration windows the dense stream has; 0: no dense stream

    @property
    def statistic(self) -> bool:
        """Whether any statistic is wanted."""
        return self.gram or self.absmax

    @classmethod
    def of(cls, layers: Iterable[PlannedLayer], windows: int) -> Needs:
        """The union of what the layers' steps want; ``windows`` is the number of calibration windows."""
        steps = [(load_method(step.method), step.config) for layer in layers for step in layer.steps]
        configs = [(method.needs(config), config) for method, config in steps if method.KIND == "layer"]
        crossed = [config for wanted, config in configs if "cross" in wanted]
        kinds = {getattr(config, "token_weights", "uniform") for wanted, config in configs if "gram" in wanted}
        return cls(
            gram=any("gram" in wanted for wanted, _ in configs),
            absmax=any("absmax" in wanted for wanted, _ in configs),
            cross=bool(crossed),
            true_sequential=all(getattr(config, "true_sequential", True) for _, config in configs),
            token_weights="residual" if "residual" in kinds else "uniform",
            dense_windows=max(
                (min(getattr(config, "dense_windows", None) or windows, windows) for config in crossed), default=0
            ),
        )


@dataclass(frozen=True)
class BlockTask:
    """What ``compress_block`` needs to know of a block besides its weights."""

    index: int
    layers: Mapping[str, PlannedLayer]  # the layers of this block that have steps, by name
    calls: Mapping[int, Call]
    needs: Needs
    scale_dtype: torch.dtype
    suspend: bool  # all windows wait at once (fast), or one at a time (little memory)
    folder: Path | None  # where the next streams go; None: in memory
    encode: Callable[[LayerSpec, LayerState], dict[str, Tensor] | None]  # a layer's written form, None: its weight
    round_inputs: RoundInputs  # as the format has it


@dataclass(frozen=True)
class CompressedBlock:
    """The module with its new weights, its layers' reports and written forms, the streams behind it.

    ``roundings``: of layers with an activation rule, by name, what becomes of their input.
    """

    block: nn.Module
    reports: list[LayerReport]
    encoded: list[tuple[LayerSpec, dict[str, Tensor]]]
    streams: Streams
    roundings: dict[str, Rounding]


def compress_block(
    skeleton: Skeleton, task: BlockTask, streams: Streams, device: torch.device | str
) -> CompressedBlock:
    """Load, observe, compress, walk on: the loop's body."""
    block = skeleton.load_block(task.index, device)
    smoothed = _smooth(block, skeleton.block_specs(task.index), task, streams)
    dense = None if streams.dense is None else copy.deepcopy(block)
    following = streams.open_next(task.folder, task.index + 1)
    reports: list[LayerReport] = []
    encoded: list[tuple[LayerSpec, dict[str, Tensor]]] = []
    roundings: dict[str, Rounding] = {}
    with BlockWalk(
        block,
        [layer.spec for layer in task.layers.values()],
        streams.main,
        task.calls,
        dense_block=dense,
        dense_inputs=streams.dense,
        held_out=[streams.probe],
        suspend=task.suspend,
    ) as walk:
        for specs, statistic, probe in _observe_groups(walk, task.needs, streams):
            weights = [view_weight(block, spec) for spec in specs]
            layers = [task.layers[spec.name] for spec in specs]
            for outcome in compress_layers(layers, weights, statistic, probe, task.scale_dtype, task.round_inputs):
                set_weight(block, outcome.spec, outcome.state.weight)
                _add_notes(outcome.report, smoothed.get(outcome.spec.name, {}))
                if outcome.state.activations is not None:
                    roundings[outcome.spec.name] = _make_rounding(outcome.state, task.round_inputs)
                    walk.round_inputs(outcome.spec.name, roundings[outcome.spec.name])
                reports.append(outcome.report)
                form = task.encode(outcome.spec, outcome.state)
                if form is not None:
                    encoded.append((outcome.spec, form))
        walk.outputs(following.main, following.dense)
    return CompressedBlock(block, reports, encoded, following, roundings)


def _smooth(block: nn.Module, specs: Sequence[LayerSpec], task: BlockTask, streams: Streams) -> Notes:
    """The steps that see the whole block, before it is copied: a dense copy is rescaled with it."""
    if not list_block_steps(task.layers):
        return {}
    windows = [n for n in range(len(streams.main)) if n != streams.probe]
    return smooth_block(block, specs, task.layers, streams.main, windows, task.calls)


def _add_notes(report: LayerReport, notes: Mapping[str, Any]) -> None:
    rest = {key: value for key, value in notes.items() if key != "fallback"}
    report.notes = {**rest, **report.notes}
    report.fallback = "; ".join(text for text in (notes.get("fallback"), report.fallback) if text) or None


def _make_rounding(state: LayerState, round_inputs: RoundInputs) -> Rounding:
    """What a layer does to its input, without the weights that ``state`` holds on to."""
    kept = state.outliers and replace(state.outliers, weight=torch.zeros(0, len(state.outliers.index)))
    light = replace(state, weight=torch.zeros(0, 0), grid=None, codes=None, outliers=kept)
    return lambda x: read_inputs(light, x, round_inputs)


def _observe_groups(
    walk: BlockWalk, needs: Needs, streams: Streams
) -> Iterator[tuple[tuple[LayerSpec, ...], Statistic | None, Tensor]]:
    """Each group of layers with the statistic of its input (None for methods without data) and its held-out rows."""
    weights = make_token_weights(needs.token_weights, streams.main, [streams.probe]) if needs.gram else None
    if needs.true_sequential:
        for group in walk.groups():
            statistic = None
            if needs.statistic:
                statistic = accumulate(group, cross=needs.cross, weights=weights, gram=needs.gram, absmax=needs.absmax)
            yield group.specs, statistic, read_held_out(group)
    else:
        observed = observe(walk, cross=needs.cross, weights=weights, gram=needs.gram, absmax=needs.absmax)
        for group, statistic, probe in observed:
            yield group.specs, statistic if needs.statistic else None, probe
