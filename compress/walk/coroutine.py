"""A block's forward as a coroutine: every window waits in front of a layer while that layer is being compressed.

Each window runs in a greenlet that is suspended in a pre-hook of the first layer of each group of layers that share an
input. The driver looks at the inputs of all windows, changes the weights, and lets the windows go on through the
changed layers: nothing is computed twice. Where memory does not allow for all windows to wait at once, the same
greenlets are started afresh for each group and dropped after it (``suspend=False``): the same numbers, bit for bit,
for more time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor, nn

from compress.errors import NumericsError, UserError
from compress.types import LayerSpec
from compress.walk.experts import read_positions
from compress.walk.groups import Group, Hooked, find_groups
from compress.walk.hidden import Hidden
from compress.walk.layers import Rounding
from compress.walk.memory import measure_frames
from compress.walk.residual import find_writers, is_stream, list_norms
from compress.walk.stream import PROBE_TOKENS, Call, run_block

if TYPE_CHECKING:
    from typing_extensions import Self


class Rows(NamedTuple):
    """The input that one window gives to a group of layers."""

    x: Tensor  # (T, I) in the model's dtype
    dense: Tensor | None  # (T, I) the same input in the uncompressed model, where the dense stream has this window
    window: int
    positions: Tensor | None  # (T,) the window's token of each row; None: rows are the window's tokens in order
    streams: tuple[Tensor, Tensor] | None = None
    """The residual streams here and in the uncompressed model, ``(T, D)``, where the group's layer adds to them."""


class InputGroup:
    """Layers that read one input, and that input. Valid until the walk goes on to the next group."""

    def __init__(self, walk: BlockWalk, index: int) -> None:
        self._walk = walk
        self.index = index
        self.specs = walk.layout[index].specs
        self.writes = walk.writes(index)  # one layer, whose output is added to the residual stream

    def rows(self, held_out: bool = False) -> Iterator[Rows]:
        """The group's input, window by window: calibration windows, or the held-out ones.

        Experts give only the rows dispatched to them, and no pairs: in the uncompressed model the same token may be
        routed elsewhere. Raises ``NumericsError`` for values that are not finite.
        """
        for n in range(len(self._walk.inputs)):
            if (n in self._walk.held_out) == held_out:
                rows = self._walk.rows_at(self.index, n)
                if rows is not None:
                    yield rows


class _Forward(greenlet):  # type: ignore[misc]  # greenlet has no types of its own
    """One window's way through a block. ``group`` is where it waits, or ``len(layout)`` once ``output`` is there."""

    def __init__(self, block: nn.Module, hidden: Tensor, call: Call, names: Sequence[str]) -> None:
        super().__init__()
        self._block, self._hidden, self._call, self._names = block, hidden, call, names
        self.group = -1
        self.x: Tensor | None = None  # input of the group where it waits
        self.stream: Tensor | None = None  # (1, T, D) the residual stream as it was last read
        self.output: Tensor | None = None

    def run(self) -> None:
        hidden, self._hidden = self._hidden, None  # type: ignore[assignment]
        self.output = run_block(self._block, hidden, self._call)
        self.group, self.x, self.stream = len(self._names), None, None

    def pause(self, group: int, x: Tensor) -> None:
        if group <= self.group:
            raise UserError(
                f"{self._names[group]} runs before {self._names[self.group]} in one window and after it in another; "
                "a block whose order of layers depends on the tokens is not supported: exclude these layers"
            )
        self.group, self.x = group, x
        self.parent.switch()
        self.x = None

    def advance(self, group: int) -> None:
        """Go on until the window waits at ``group`` or behind it."""
        while self.group < group:
            with torch.no_grad():
                self.parent = getcurrent()
                self.switch()

    def drop(self) -> None:
        if not self.dead and self.group >= 0:
            self.parent = getcurrent()
            self.throw(GreenletExit)


class BlockWalk:
    """Walk all windows through one block, group by group, then write the next block's inputs.

    ``inputs``: the block's input hidden states. ``calls``: what the block is called with, per window length
    (``Calls[i]``). ``dense_block`` with ``dense_inputs``: an untouched copy of the block and the uncompressed model's
    hidden states of the windows ``dense_windows`` (default: the first ones). ``held_out``: windows that run along but
    are left out of ``rows()``. Make copies of a block before it is walked; use as a context manager or call ``close``.
    """

    def __init__(
        self,
        block: nn.Module,
        specs: Sequence[LayerSpec],
        inputs: Hidden,
        calls: Mapping[int, Call],
        *,
        dense_block: nn.Module | None = None,
        dense_inputs: Hidden | None = None,
        dense_windows: Sequence[int] | None = None,
        held_out: Sequence[int] = (),
        suspend: bool = True,
    ) -> None:
        assert (dense_block is None) == (dense_inputs is None), "the dense block comes with its inputs"
        self.block, self.specs, self.inputs, self.suspend = block, tuple(specs), inputs, suspend
        self.held_out = frozenset(held_out)
        self.dense_inputs = dense_inputs
        chosen = range(0 if dense_inputs is None else len(dense_inputs)) if dense_windows is None else dense_windows
        self._dense_of = {n: k for k, n in enumerate(chosen)}  # window -> its place in the dense stream
        self._device = next(block.parameters()).device
        self._calls = {length: call.to(self._device) for length, call in calls.items()}
        self._main = Hooked(block, self.specs)
        self._dense = None if dense_block is None else Hooked(dense_block, self.specs)
        self.writers: frozenset[str] = frozenset()  # layers that write to the residual stream
        self._roundings: dict[str, Rounding] = {}
        self.layout = self._find_layout()
        self._hooks = self._install(self._main) + self._install_roundings()
        if self._dense is not None:
            self._hooks += self._install(self._dense)
        self._forwards: dict[int, _Forward] = {}
        self._dense_forwards: dict[int, _Forward] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Drop waiting windows, remove the hooks, give fused experts their forward back."""
        for forward in [*self._forwards.values(), *self._dense_forwards.values()]:
            forward.drop()
        self._forwards, self._dense_forwards = {}, {}
        for handle in self._hooks:
            handle.remove()
        for hooked in (self._main, self._dense):
            if hooked is not None:
                hooked.close()

    def groups(self) -> Iterator[InputGroup]:
        """Each group once, in the order in which the block reaches them; change a group's layers before going on.

        A window that waits has passed through all earlier groups as they are by then.
        """
        for index in range(len(self.layout)):
            if self.suspend:
                for n in range(len(self.inputs)):
                    self._waiting(n, index)
                    self._dense_waiting(n, index)
            yield InputGroup(self, index)

    def round_inputs(self, name: str, rounding: Rounding) -> None:
        """From now on, also for windows that wait in front of it, layer ``name`` reads ``rounding(x)`` for ``x``.

        Rows and statistics stay those of ``x``; the uncompressed model is not touched.
        """
        self._roundings[name] = rounding

    def input_groups(self) -> list[InputGroup]:
        """All groups, without walking to them."""
        return [InputGroup(self, index) for index in range(len(self.layout))]

    def observe(self, visit: Callable[[InputGroup, Rows], None]) -> None:
        """One pass with the weights as they are: ``visit`` each group's rows, one window in memory at a time.

        For methods that are not true-sequential; afterwards change the weights and call ``outputs``.
        """
        for n in range(len(self.inputs)):
            for group in self.input_groups():
                self._waiting(n, group.index)
                self._dense_waiting(n, group.index)
                rows = self.rows_at(group.index, n)
                if rows is not None:
                    visit(group, rows)
            self._drop(n)

    def outputs(self, into: Hidden, dense_into: Hidden | None = None) -> None:
        """Let every window finish and write the block's outputs (and those of the dense block).

        Windows that wait go on from where they are; the others run through the block afresh.
        """
        for n in range(len(self.inputs)):
            forward = self._waiting(n, len(self.layout))
            into.write(n, self._checked(forward.output, n, "output"))
            dense = self._dense_waiting(n, len(self.layout))
            if dense is not None and dense_into is not None:
                dense_into.write(self._dense_of[n], self._checked(dense.output, n, "output of the dense model"))
            self._drop(n)
        into.flush()
        if dense_into is not None:
            dense_into.flush()

    def rows_at(self, index: int, n: int) -> Rows | None:
        """What window ``n`` gives to group ``index``; None if it does not reach it."""
        fresh = n not in self._forwards
        forward, dense = self._waiting(n, index), self._dense_waiting(n, index)
        rows = None
        if forward.group == index:
            x = self._checked(forward.x, n, f"input of {self.layout[index].specs[0].name}")
            pair = None
            if dense is not None and dense.group == index and not self.layout[index].is_expert:
                pair = self._checked(dense.x, n, "input in the dense model").reshape(-1, x.shape[-1])
            assert forward.x is not None
            streams = _pair_streams(forward, dense) if pair is not None and self.writes(index) else None
            rows = Rows(x.reshape(-1, x.shape[-1]), pair, n, read_positions(forward.x), streams)
        if fresh:
            self._drop(n)
        return rows

    def live_bytes(self) -> int:
        """Bytes that the windows that wait now hold, the uncompressed model's included."""
        shared = [[*call.args, *call.kwargs.values()] for call in self._calls.values()]
        main = [measure_frames(one.gr_frame, self.block, shared) for one in self._forwards.values()]
        if self._dense is None:
            return sum(main)
        dense = self._dense.block
        return sum(main) + sum(measure_frames(one.gr_frame, dense, shared) for one in self._dense_forwards.values())

    def _waiting(self, n: int, index: int) -> _Forward:
        """Window ``n``'s forward, brought to group ``index``."""
        if n not in self._forwards:
            self._forwards[n] = self._start(self.block, self.inputs, n)
        self._forwards[n].advance(index)
        return self._forwards[n]

    def _dense_waiting(self, n: int, index: int) -> _Forward | None:
        if self._dense is None or n not in self._dense_of:
            return None
        assert self.dense_inputs is not None
        if n not in self._dense_forwards:
            self._dense_forwards[n] = self._start(self._dense.block, self.dense_inputs, self._dense_of[n])
        self._dense_forwards[n].advance(index)
        return self._dense_forwards[n]

    def _start(self, block: nn.Module, inputs: Hidden, n: int) -> _Forward:
        hidden = inputs.read(n, self._device)
        return _Forward(block, hidden, self._calls[inputs.lengths[n]], [group.specs[0].name for group in self.layout])

    def _drop(self, n: int) -> None:
        for forwards in (self._forwards, self._dense_forwards):
            if n in forwards:
                forwards.pop(n).drop()

    def writes(self, index: int) -> bool:
        """Whether the group is one layer whose output is added to the residual stream."""
        specs = self.layout[index].specs
        return len(specs) == 1 and specs[0].name in self.writers

    def _find_layout(self) -> list[Group]:
        if not self.specs:
            return []
        length = min(PROBE_TOKENS, self.inputs.lengths[0])
        if length not in self._calls:
            length = self.inputs.lengths[0]
        hidden = self.inputs.read(0, self._device)[:, :length]
        self.writers = find_writers(self._main, self.specs, hidden, self._calls[length])
        return find_groups(self._main, self.specs, hidden, self._calls[length])

    def _install(self, hooked: Hooked) -> list[torch.utils.hooks.RemovableHandle]:
        handles = []
        for index, group in enumerate(self.layout):

            def pause(_module: nn.Module, args: tuple[Tensor, ...], index: int = index) -> None:
                current = getcurrent()
                if isinstance(current, _Forward):
                    current.pause(index, args[0])

            handles.append(hooked.modules[group.specs[0].name].register_forward_pre_hook(pause))
        if self.writers and self._dense is not None:
            handles += [norm.register_forward_pre_hook(self._note_stream) for norm in list_norms(hooked.block)]
        return handles

    def _install_roundings(self) -> list[torch.utils.hooks.RemovableHandle]:
        """Hooks that come after the pauses: PyTorch lists a module's hooks before it runs the first of them."""

        def read(name: str, x: Tensor) -> Tensor:
            rounding = self._roundings.get(name)
            return x if rounding is None else rounding(x)

        return [
            self._main.modules[spec.name].register_forward_pre_hook(
                lambda _module, args, name=spec.name: (read(name, args[0]), *args[1:])
            )
            for spec in self.specs
        ]

    def _note_stream(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        current = getcurrent()
        if isinstance(current, _Forward) and args and is_stream(args[0], self.inputs.width):
            current.stream = args[0]

    def _checked(self, x: Tensor | None, n: int, what: str) -> Tensor:
        assert x is not None
        if not bool(torch.isfinite(x.sum())) and not bool(torch.isfinite(x).all()):  # the sum is the quick look
            count = int((~torch.isfinite(x)).sum())
            where = _common_prefix([spec.name for spec in self.specs]) or type(self.block).__name__
            raise NumericsError(
                f"{where}: {count} of {x.numel()} values of the {what} are not finite in window {n} ({x.dtype}); "
                "run in bfloat16 or float32 (dtype), or leave this block out"
            )
        return x


def _common_prefix(names: Sequence[str]) -> str:
    """The parts that all dotted ``names`` begin with: "model.layers.0" for the layers of a block."""
    parts = [name.split(".") for name in names]
    same = 0
    while parts and all(len(one) > same + 1 and one[same] == parts[0][same] for one in parts):
        same += 1
    return ".".join(parts[0][:same]) if parts else ""


def _pair_streams(main: _Forward, dense: _Forward | None) -> tuple[Tensor, Tensor]:
    """The residual streams in front of the layer where both forwards wait."""
    assert dense is not None and dense.stream is not None and main.stream is not None
    width = main.stream.shape[-1]
    return main.stream.reshape(-1, width), dense.stream.reshape(-1, width)
