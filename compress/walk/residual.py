"""The residual stream inside a block: which modules read it, and which layers' outputs are added to it.

A norm in front of attention or MLP reads the stream. A layer *writes* to it if what the next reader sees is what the
last reader saw plus the layer's output, checked on the numbers of a few tokens: so ``o_proj`` and ``down_proj`` of
Llama are found, while a branch that goes through a norm of its own first (Gemma 2), or is added together with another
branch (GPT-J), is not, and is treated as not writing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from compress.types import LayerSpec
from compress.walk.groups import Hooked
from compress.walk.stream import Call, run_block

TOLERANCE = 2**-6  # of the stream's norm: the rounding of an addition in bfloat16, with room


def list_norms(block: nn.Module) -> list[nn.Module]:
    """Modules whose class is called a norm; whether one reads the stream is seen from its input."""
    return [module for module in block.modules() if "norm" in type(module).__name__.lower()]


def is_stream(x: Any, width: int) -> bool:
    """Whether a module's input has the shape of the residual stream, ``(1, T, D)`` or ``(T, D)`` (OPT)."""
    return isinstance(x, Tensor) and x.dim() in (2, 3) and x.shape[-1] == width


@torch.no_grad()
def find_writers(hooked: Hooked, specs: Sequence[LayerSpec], hidden: Tensor, call: Call) -> frozenset[str]:
    """Names of the layers that write to the stream, from one forward of ``hidden`` ``(1, T, D)``."""
    width = hidden.shape[-1]
    events: list[tuple[str | None, Tensor]] = []  # (None, what a norm reads) or (layer, its output), in order

    def read(_module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and is_stream(args[0], width):
            events.append((None, args[0].float().reshape(1, -1, width).clone()))

    handles = [norm.register_forward_pre_hook(read) for norm in list_norms(hooked.block)]
    for spec in specs:
        if spec.kind != "expert" and spec.shape[0] == width:

            def note(_module: nn.Module, _args: Any, output: Tensor, name: str = spec.name) -> None:
                events.append((name, output.float().reshape(1, -1, width).clone()))

            handles.append(hooked.modules[spec.name].register_forward_hook(note))
    try:
        events.append((None, run_block(hooked.block, hidden, call).float()))
    finally:
        for handle in handles:
            handle.remove()
    return frozenset(name for at, (name, _) in enumerate(events) if name is not None and _adds(events, at))


def _adds(events: Sequence[tuple[str | None, Tensor]], at: int) -> bool:
    """Whether the reading after event ``at`` is the one before it plus the layer's output."""
    before = next((x for name, x in reversed(events[:at]) if name is None), None)
    after = next((x for name, x in events[at:] if name is None), None)
    output = events[at][1]
    if before is None or after is None or not before.shape == after.shape == output.shape:
        return False
    rest = (after - before - output).norm()
    return bool(rest <= TOLERANCE * after.norm()) and bool(rest < 0.5 * output.norm())
