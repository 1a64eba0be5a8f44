"""Into the blocks and out of them: embed the calibration windows, note what each block is called with, and finish.

The model runs with the forward of every block replaced, so that its own code makes the masks, the positions and the
rotary tables of the first block's input, and its own code turns the last hidden states into logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from compress.errors import UserError
from compress.walk.hidden import Hidden
from compress.walk.skeleton import Skeleton

__all__ = ["Call", "Calls", "Hidden", "capture", "finish"]

PROBE_TOKENS = 8  # length of the short window with which a block's input groups are found


@dataclass(frozen=True)
class Call:
    """What a block is called with besides the hidden states; the same for every window of one length."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Call:
        return Call(_move(self.args, device), _move(dict(self.kwargs), device))


Calls = list[dict[int, Call]]  # per block: window length -> Call

Respond = Callable[[int, Tensor, tuple[Any, ...], dict[str, Any]], Tensor]


class _Stop(Exception):
    """Raised inside the model's forward when the rest of it is of no interest."""


class _GotTuple(Exception):
    """A block was handed a tuple: the model wants its blocks to return a tensor."""


@torch.no_grad()
def capture(
    skeleton: Skeleton,
    windows: Sequence[Tensor],
    path: Path | str | None = None,
    device: torch.device | str = "cpu",
    change: Callable[[PreTrainedModel], None] | None = None,
) -> tuple[Hidden, Calls]:
    """Embed ``windows`` (token ids ``(T_n,)``) and note what each block is called with, per window length.

    Returns the input of block 0 (on disk at ``path``, or in memory) and the calls of every block. Only what is outside
    the blocks, without the head, is brought to ``device``; ``change`` may then put other weights there. Raises
    ``UserError`` if the blocks are called with something that depends on the tokens: then they can't be walked one by
    one.
    """
    assert windows, "no windows"
    model = skeleton.load_outside(device, head=False)
    if change is not None:
        change(model)
    calls = record_calls(model, skeleton.blocks, windows)
    hidden: Hidden | None = None
    for n, window in enumerate(windows):
        embedded = _embed(model, skeleton.blocks, window)
        if hidden is None:
            hidden = Hidden.create(path, [len(one) for one in windows], embedded.shape[-1], embedded.dtype)
        hidden.write(n, embedded)
    assert hidden is not None
    hidden.flush()
    return hidden, calls


@torch.no_grad()
def record_calls(model: PreTrainedModel, blocks: Sequence[str], windows: Sequence[Tensor]) -> Calls:
    """What each block is called with, for every distinct length among ``windows`` and for a few tokens."""
    calls: Calls = [{} for _ in blocks]
    short = windows[0][:PROBE_TOKENS]
    for window in [*windows, short]:
        if len(window) in calls[0]:
            continue
        other = next((one for one in windows if len(one) == len(window) and not torch.equal(one, window)), None)
        first = _record(model, blocks, window)
        second = _record(model, blocks, window.flip(0) if other is None else other)
        for i, (one, two) in enumerate(zip(first, second, strict=True)):
            difference = _find_difference(one, two)
            if difference is not None:
                raise UserError(
                    f"{type(model).__name__}: {blocks[i]} is called with {difference}, which depends on the tokens; "
                    "models whose blocks read more than the hidden states can't be compressed block by block"
                )
            calls[i][len(window)] = one
    return calls


@torch.no_grad()
def finish(model: PreTrainedModel, blocks: Sequence[str], hidden: Tensor) -> Tensor:
    """Logits ``(1, T, V)`` from the last block's output ``(1, T, D)``: final norm, head, soft caps as the model does.

    ``model`` is ``skeleton.load_outside(device)`` with its head. Tokens are independent here, so that a long window may
    be given in slices.
    """

    def respond(i: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        return hidden if i == len(blocks) - 1 else states

    tokens = torch.zeros(hidden.shape[1], dtype=torch.long)
    logits: Tensor = _run(model, blocks, tokens, respond).logits
    return logits


@torch.no_grad()
def read_head_inputs(model: PreTrainedModel, blocks: Sequence[str], hidden: Tensor) -> Tensor | None:
    """What the output head is given, ``(T, D)`` float32, for the last block's output ``(1, T, D)``.

    None for a model that makes its logits without calling its head. The head itself may be on meta.
    """
    seen: list[Tensor] = []

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _Stop

    output = model.get_output_embeddings()
    assert output is not None
    handle = output.register_forward_pre_hook(stop)
    try:
        tokens = torch.zeros(hidden.shape[1], dtype=torch.long)
        _run(model, blocks, tokens, lambda i, states, args, kwargs: hidden if i == len(blocks) - 1 else states)
    finally:
        handle.remove()
    return seen[0][0].float() if seen else None


@torch.no_grad()
def observe_head(skeleton: Skeleton, window: Tensor, device: torch.device | str = "cpu") -> Tensor | None:
    """Mean square ``(D,)`` of what the head is given for the tokens ``(T,)``; reads every block once.

    None for a model that makes its logits without calling its head.
    """
    stream, calls = capture(skeleton, [window], None, device)
    hidden = stream.read(0, device)
    for i in range(len(skeleton.blocks)):
        hidden = run_block(skeleton.load_block(i, device), hidden, calls[i][len(window)].to(device))
    inputs = read_head_inputs(skeleton.load_outside(device, head=False), skeleton.blocks, hidden)
    return None if inputs is None else inputs.square().mean(0)


def _embed(model: PreTrainedModel, blocks: Sequence[str], window: Tensor) -> Tensor:
    seen: list[Tensor] = []

    def respond(i: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        seen.append(states)
        raise _Stop

    _run(model, blocks, window, respond)
    return seen[0]


def _record(model: PreTrainedModel, blocks: Sequence[str], window: Tensor) -> list[Call]:
    calls: dict[int, Call] = {}

    def respond(i: int, states: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        calls[i] = Call(args, {name: _without_cache(name, value) for name, value in kwargs.items()})
        if i == len(blocks) - 1:
            raise _Stop
        return states

    _run(model, blocks, window, respond)
    if sorted(calls) != list(range(len(blocks))):
        raise UserError(f"{type(model).__name__}: only blocks {sorted(calls)} of {len(blocks)} run in a forward pass")
    return [calls[i] for i in range(len(blocks))]


def _run(model: PreTrainedModel, blocks: Sequence[str], tokens: Tensor, respond: Respond) -> Any:
    """Run ``model`` with ``respond`` in place of its blocks; None if it stopped the run.

    Some models want a block to return a tensor, some a tuple. A tuple is tried first: a model that wants a tensor hands
    it on to the next block, where it is noticed, or to the final norm, which can't take it.
    """
    ids = tokens[None].to(next(model.get_input_embeddings().parameters()).device)
    try:
        with _replaced_blocks(model, blocks, respond, as_tuple=True):
            return model(input_ids=ids, use_cache=False)
    except _Stop:
        return None
    except (_GotTuple, AttributeError, TypeError):
        pass
    try:
        with _replaced_blocks(model, blocks, respond, as_tuple=False):
            return model(input_ids=ids, use_cache=False)
    except _Stop:
        return None


@contextmanager
def _replaced_blocks(model: PreTrainedModel, blocks: Sequence[str], respond: Respond, as_tuple: bool) -> Iterator[None]:
    """``respond`` in place of the forward of each block; modules, their attributes and their weights stay."""
    modules = [model.get_submodule(prefix) for prefix in blocks]
    saved = [module.__dict__.get("forward") for module in modules]
    for i, module in enumerate(modules):
        module.__dict__["forward"] = _answer(i, respond, as_tuple)
    try:
        yield
    finally:
        for module, forward in zip(modules, saved, strict=True):
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def _answer(i: int, respond: Respond, as_tuple: bool) -> Callable[..., Any]:
    def forward(hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(hidden_states, Tensor):
            raise _GotTuple
        states = respond(i, hidden_states, args, kwargs)
        return (states, None) if as_tuple else states

    return forward


def run_block(block: nn.Module, hidden: Tensor, call: Call) -> Tensor:
    """The block's output hidden states ``(1, T, D)``."""
    output: Tensor | tuple[Tensor, ...] = block(hidden, *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


def _without_cache(name: str, value: Any) -> Any:
    return None if name in ("past_key_value", "past_key_values", "layer_past") else value


def _find_difference(one: Call, two: Call) -> str | None:
    """Name of the argument in which two calls differ; None if they are the same."""
    if len(one.args) != len(two.args) or one.kwargs.keys() != two.kwargs.keys():
        return "different arguments"
    for i, (a, b) in enumerate(zip(one.args, two.args, strict=True)):
        if not _same(a, b):
            return f"argument {i + 1}"
    return next((name for name in one.kwargs if not _same(one.kwargs[name], two.kwargs[name])), None)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, (tuple, list)):
        return isinstance(b, (tuple, list)) and len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    return bool(a is b or a == b)


def _move(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_move(one, device) for one in value)
    if isinstance(value, dict):
        return {key: _move(one, device) for key, one in value.items()}
    return value
