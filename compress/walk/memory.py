"""How much memory a suspended window holds: estimated from shapes for the plan, measured from the waiting frames."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from compress.types import LayerSpec


def estimate_live_bytes(config: PretrainedConfig, specs: Sequence[LayerSpec], tokens: int, itemsize: int) -> int:
    """Bytes that one window of ``tokens`` holds while it waits in a block with layers ``specs``: the most it ever does.

    In front of a branch's last layer there are the residual, the normed input and that layer's input; in attention also
    queries, keys and values. Fused gate and up projections stay alive as the slices that the product was made of.
    """
    width, eager = _hidden_size(config), _is_eager(config)
    widest = 2 * width
    for parent, layers in _branches(specs).items():
        last = max((spec.shape[1] for spec in layers if spec.shape[0] == width), default=width)
        readers = [spec.shape[0] for spec in layers if spec.shape[1] == width]
        if "attn" in parent or "attention" in parent:
            made = sum(readers) - (width if (width, width) in [spec.shape for spec in layers[-1:]] else 0)
            rotated = 2 * made // 3 if len(readers) - (len(layers) > 1) <= 1 else 0  # slices of a fused projection
            kept = 2 * width + made + last + rotated + (3 * width if eager else 0)
        else:
            kept = 4 * width + last + (2 * last if 2 * last in readers else 0)
        widest = max(widest, kept)
    experts = [spec for spec in specs if spec.kind == "expert"]
    if experts:  # input, residual, normed input, the sum; dispatched rows; the router's scores
        count = 1 + max(spec.index or 0 for spec in experts)
        share = _experts_per_token(config) / count
        rows = share * (width + 3 * max(spec.shape[1] for spec in experts if spec.shape[0] == width))
        widest = max(widest, int(4 * width + rows + 2 * count))
    return tokens * widest * itemsize + (_heads(config) * tokens * tokens * itemsize if eager else 0)


def estimate_running_bytes(config: PretrainedConfig, specs: Sequence[LayerSpec], tokens: int, itemsize: int) -> int:
    """Bytes that the one window that is running takes on top: projections side by side, eager attention's scores."""
    outputs = [sum(spec.shape[0] for spec in layers) for layers in _branches(specs).values()]
    running = 2 * tokens * max(outputs, default=_hidden_size(config)) * itemsize
    return running + (_heads(config) * tokens * tokens * (2 * 4 + itemsize) if _is_eager(config) else 0)


def measure_frames(frame: FrameType | None, block: nn.Module, shared: Sequence[Any]) -> int:
    """Bytes of all tensors in the local variables of a suspended forward: not the block's weights, not ``shared``."""
    seen = {tensor.untyped_storage()._cdata for tensor in [*block.parameters(), *block.buffers(), *_tensors(shared)]}
    total = 0
    while frame is not None:
        for tensor in _tensors(list(frame.f_locals.values())):
            storage = tensor.untyped_storage()
            if storage._cdata not in seen:
                seen.add(storage._cdata)
                total += storage.nbytes()
        frame = frame.f_back
    return total


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.device != torch.device("meta"):
            yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _hidden_size(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).hidden_size)


def _experts_per_token(config: PretrainedConfig) -> int:
    return int(getattr(config.get_text_config(decoder=True), "num_experts_per_tok", 1))


def _branches(specs: Sequence[LayerSpec]) -> dict[str, list[LayerSpec]]:
    """Layers of a block by the module that holds them: attention, feed-forward; experts left out."""
    branches: dict[str, list[LayerSpec]] = {}
    for spec in specs:
        if spec.kind != "expert":
            branches.setdefault(spec.name.rpartition(".")[0], []).append(spec)
    return branches


def _heads(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).num_attention_heads)


def _is_eager(config: PretrainedConfig) -> bool:
    """Whether attention keeps its scores ``(heads, T, T)``."""
    return getattr(config, "_attn_implementation", None) == "eager"
