"""Where a block's channels can be scaled without changing what it computes: edges from what makes them to what reads.

An edge is divided by a factor per channel on the making side and multiplied on the reading side: a norm and the layers
behind it (``norm -> q, k, v``), or a layer and the one that reads its output channel by channel (``v -> o``,
``up -> down``). Candidates come from identity of tensors in a short forward and from shapes. An edge is accepted only
if scaling it by random powers of two, which floating point carries exactly, leaves the block's output as it was: so a
reader that nobody thought of, a GELU in between, or a norm that is no scaling rule themselves out, whatever the
architecture.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from compress.types import LayerSpec
from compress.walk.experts import holds_experts
from compress.walk.groups import Hooked, find_groups, is_same_input
from compress.walk.hidden import Hidden
from compress.walk.residual import list_norms
from compress.walk.stream import Call, run_block

TOLERANCE = 1e-12  # of what the block adds to its input; powers of two change nothing at all where the edge is right


@dataclass(frozen=True)
class Link:
    """Channels ``(n,)`` from one maker to its readers."""

    maker: nn.Module  # a norm, or a layer of which ``rows`` (n,) are the channels
    readers: tuple[nn.Module, ...]
    layers: tuple[str, ...]  # the readers that are layers of the walk, by name
    rows: Tensor | None = None  # None: the maker is a norm
    columns: Tensor | None = None  # (I,) the channel that each input of a reader is; None: one by one
    plus_one: bool = False  # the norm multiplies with 1 + weight (Gemma)

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Divide the making side by ``factors`` ``(n,)`` float32 and multiply the reading side."""
        if self.rows is None:
            weight = self.maker.get_parameter("weight").data
            shift = 1.0 if self.plus_one else 0.0
            weight.copy_((weight.to(_wide(weight)) + shift) / factors - shift)
            own: slice | Tensor = slice(None)
        else:
            own = self.rows
            weight = view_rows(self.maker)
            weight[own] = (weight[own].to(_wide(weight)) / factors[:, None]).to(weight.dtype)
        bias = getattr(self.maker, "bias", None)
        if isinstance(bias, Tensor):
            bias.data[own] = (bias.data[own].to(_wide(bias)) / factors).to(bias.dtype)
        spread = factors if self.columns is None else factors[self.columns]
        for reader in self.readers:
            view = view_columns(reader)
            assert view is not None
            view.copy_(view.to(_wide(view)) * spread)

    def gather(self, values: Tensor) -> Tensor:
        """The largest of ``values`` ``(I,)`` over the reader's inputs that are one channel, ``(n,)``."""
        if self.columns is None:
            return values
        count = int(self.columns.max()) + 1
        return torch.zeros(count, dtype=values.dtype, device=values.device).scatter_reduce_(
            0, self.columns.to(values.device), values, "amax"
        )


@dataclass(frozen=True)
class Edge:
    """Links that are accepted or refused as one: a norm's, a pair of layers', or those of all experts of a layer."""

    name: str  # of the maker, and of the readers
    links: tuple[Link, ...]


@dataclass
class Edges:
    """Edges that may be scaled, and of norms in front of layers those that may not: layer name -> why."""

    found: list[Edge] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def find_edges(hooked: Hooked, specs: Sequence[LayerSpec], hidden: Tensor, call: Call, inner: bool) -> Edges:
    """The edges whose readers are among ``specs``; ``inner``: also those from layer to layer.

    ``hidden`` ``(1, T, D)``: real hidden states of a few tokens. The block is left as it was, bit for bit.
    """
    result = Edges()
    before = run_block(hooked.block, hidden, call)
    layers = {id(hooked.modules[spec.name]): spec.name for spec in specs}
    behind: set[str] = set()
    for path, edge in _norm_edges(hooked, layers, specs, hidden, call):
        names = edge.links[0].layers
        behind.update(names)
        reason = _refuse(edge, hooked, before, hidden, call)
        if reason is None:
            result.found.append(edge)
        else:
            result.refused.update(dict.fromkeys(names, f"{path}: {reason}"))
    if inner:
        groups = find_groups(hooked, specs, hidden, call)
        place = {spec.name: i for i, group in enumerate(groups) for spec in group.specs}
        readers = [spec for spec in specs if spec.name not in behind]
        for candidates in _inner_edges(hooked, readers, specs, place):
            fitting = (edge for edge in candidates if _refuse(edge, hooked, before, hidden, call) is None)
            result.found += [edge for edge in [next(fitting, None)] if edge is not None]
    return result


def view_rows(module: nn.Module) -> Tensor:
    """The weight of a linear layer as ``(O, I)``, to be changed in place."""
    weight = module.get_parameter("weight").data
    return weight.t() if isinstance(module, Conv1D) else weight


def view_columns(module: nn.Module) -> Tensor | None:
    """What multiplies the input of ``module``, ``(..., I)``, to be changed in place; None where it isn't known."""
    if holds_experts(module):
        fused = getattr(module, "gate_up_proj", None)
        return fused.data if isinstance(fused, Tensor) else None
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return view_rows(module)


@torch.no_grad()
def measure_ranges(
    hooked: Hooked, edges: Sequence[Edge], inputs: Hidden, windows: Sequence[int], calls: Mapping[int, Call]
) -> list[list[Tensor]]:
    """Per edge and link the largest ``|x|`` of each channel ``(n,)`` float32 over ``windows`` of ``inputs``."""
    ranges = [[torch.zeros(_count(link), device=_device(link)) for link in edge.links] for edge in edges]
    handles = []
    for edge, found in zip(edges, ranges, strict=True):
        for link, peak in zip(edge.links, found, strict=True):
            if link.rows is None:
                handles.append(link.maker.register_forward_hook(lambda _m, _a, y, peak=peak: _raise(peak, y)))
                continue

            def note(_module: nn.Module, args: tuple[Any, ...], link: Link = link, peak: Tensor = peak) -> None:
                _raise(peak, link.gather(args[0].reshape(-1, args[0].shape[-1]).abs().float().amax(0)))

            handles.append(link.readers[0].register_forward_pre_hook(note))
    try:
        for n in windows:
            run_block(hooked.block, inputs.read(n, _device(edges[0].links[0])), calls[inputs.lengths[n]])
    finally:
        for handle in handles:
            handle.remove()
    return ranges


def measure_weights(link: Link, modules: Sequence[nn.Module]) -> Tensor:
    """The largest ``|w|`` of each channel ``(n,)`` float32 over those readers that are among ``modules``."""
    peaks = []
    for reader in link.readers:
        view = view_columns(reader)
        if view is not None and any(reader is module for module in modules):
            peaks.append(view.reshape(-1, view.shape[-1]).abs().amax(0).float())
    return link.gather(torch.stack(peaks).amax(0))


def _raise(peak: Tensor, values: Tensor) -> None:
    """Let ``peak`` ``(n,)`` hold the largest magnitudes so far; ``values`` ``(..., n)``."""
    found = values if values.dim() == 1 else values.reshape(-1, values.shape[-1]).abs().float().amax(0)
    torch.maximum(peak, found, out=peak)


def _device(link: Link) -> torch.device:
    return next(link.maker.parameters()).device


def _norm_edges(
    hooked: Hooked, layers: Mapping[int, str], specs: Sequence[LayerSpec], hidden: Tensor, call: Call
) -> Iterator[tuple[str, Edge]]:
    """Every norm whose output some layer of the walk reads, with all modules that read it."""
    norms = {id(norm) for norm in list_norms(hooked.block)}
    made: list[tuple[nn.Module, Tensor]] = []
    read: list[tuple[nn.Module, Tensor]] = []

    def note_read(module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor):
            read.append((module, args[0]))

    handles = []
    for module in hooked.block.modules():
        if id(module) in norms:
            handles.append(module.register_forward_hook(lambda m, _args, output: made.append((m, output))))
        elif any(True for _ in module.parameters(recurse=False)):
            handles.append(module.register_forward_pre_hook(note_read))
    try:
        run_block(hooked.block, hidden, call)
    finally:
        for handle in handles:
            handle.remove()
    paths = {id(module): path for path, module in hooked.block.named_modules()}
    for norm, output in made:
        readers = [module for module, x in read if is_same_input(output, x)]
        names = [name for module in readers for name in _names_of(module, layers, hooked, specs)]
        if names:
            link = Link(norm, tuple(readers), tuple(names), plus_one=_adds_one(norm))
            yield paths[id(norm)], Edge(f"{paths[id(norm)]} -> {', '.join(_leaf(name) for name in names)}", (link,))


def _names_of(module: nn.Module, layers: Mapping[int, str], hooked: Hooked, specs: Sequence[LayerSpec]) -> list[str]:
    """The layers of the walk that ``module`` is: one, all experts' first layers, or none (a router)."""
    if id(module) in layers:
        return [layers[id(module)]]
    unfused = hooked.experts.get(id(module))
    if unfused is None:
        return []
    own = {id(linear) for (_, leaf), linear in unfused.linears.items() if leaf == "gate_up_proj"}
    return [spec.name for spec in specs if id(hooked.modules[spec.name]) in own]


def _inner_edges(
    hooked: Hooked, readers: Sequence[LayerSpec], specs: Sequence[LayerSpec], place: Mapping[str, int]
) -> Iterator[list[Edge]]:
    """For each reader (all experts' together) the edges that its shape and that of layers before it allow.

    ``place``: where each layer's group comes in the forward.
    """
    families: dict[str, list[LayerSpec]] = {}
    named = {(spec.parameter, spec.index): spec.name for spec in specs}
    for spec in readers:
        families.setdefault(spec.parameter if spec.kind == "expert" else spec.name, []).append(spec)
    for family in families.values():
        first = family[0]
        candidates = []
        for maker in specs:
            if place[maker.name] >= place[first.name] or _parent(maker) != _parent(first):
                continue
            for rows, columns in _layouts(maker, first, _head_size(hooked, first)):
                makers = [hooked.modules[named[maker.parameter, spec.index]] for spec in family]
                links = [
                    Link(made, (hooked.modules[spec.name],), (spec.name,), rows, columns)
                    for made, spec in zip(makers, family, strict=True)
                ]
                candidates.append(Edge(f"{_leaf(maker.name)} -> {_leaf(first.name)}", tuple(links)))
        yield candidates


def _layouts(maker: LayerSpec, reader: LayerSpec, head: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """Which rows of ``maker`` may be the channels that ``reader`` reads, and the channel of each of its inputs."""
    made, read = maker.shape[0], reader.shape[1]
    if made in (read, 2 * read, 3 * read):  # a layer of its own, the second of gate and up, the last of q, k and v
        yield torch.arange(made - read, made), torch.arange(read)
    if head is None or read % head:
        return
    if made == 3 * read:  # q, k and v head by head
        yield torch.arange(made).reshape(-1, 3, head)[:, 2].reshape(-1), torch.arange(read)
    for values in (made, (made - read) // 2):  # fewer heads than queries have: v, or the end of q, k and v
        if 0 < values < read and values % head == 0 and (read // head) % (values // head) == 0:
            shared = torch.arange(values).reshape(-1, 1, head).expand(-1, read // values, head)
            yield torch.arange(made - values, made), shared.reshape(-1)


def _head_size(hooked: Hooked, spec: LayerSpec) -> int | None:
    """``head_dim`` of the attention that holds the layer."""
    owner = next((m for m in hooked.block.modules() if hooked.modules[spec.name] in m.children()), None)
    found = getattr(owner, "head_dim", None) or getattr(owner, "head_size", None)
    return found if isinstance(found, int) else None


def _refuse(edge: Edge, hooked: Hooked, before: Tensor, hidden: Tensor, call: Call) -> str | None:
    """Why the edge can't be scaled, if it can't; tried out with powers of two and undone."""
    readers = [reader for link in edge.links for reader in link.readers]
    if any(view_columns(reader) is None for reader in readers):
        return "something reads it whose weights are not known"
    if any(getattr(link.maker, "weight", None) is None for link in edge.links):
        return "it has no weight"
    generator = torch.Generator().manual_seed(0)
    norms = [link.maker.get_parameter("weight").data for link in edge.links if link.rows is None]
    saved = [(weight, weight.clone()) for weight in norms]
    trials = [2.0 ** torch.randint(-1, 2, (_count(link),), generator=generator) for link in edge.links]
    trials = [trial.to(hidden.device, _wide(hidden)) for trial in trials]
    for link, trial in zip(edge.links, trials, strict=True):
        link.scale(trial)
    after = run_block(hooked.block, hidden, call)
    for link, trial in zip(edge.links, trials, strict=True):
        link.scale(1 / trial)
    for weight, kept in saved:  # 1 + weight is not undone exactly
        weight.copy_(kept)
    inexact = any(link.plus_one for link in edge.links)
    eps = torch.finfo(hidden.dtype).eps  # 1 + weight is rounded, to float32 at best; a GPU may add in another order
    limit = max(1e-5, 4 * eps) if inexact else max(TOLERANCE, eps / 8)
    change = (after.double() - before.double()).norm() / (before.double() - hidden.double()).norm()
    return None if float(change) <= limit else "more reads it than the layers that are known"


def _count(link: Link) -> int:
    return len(link.maker.get_parameter("weight") if link.rows is None else link.rows)


@torch.no_grad()
def _adds_one(norm: nn.Module) -> bool:
    """Whether the norm multiplies with ``1 + weight``: without its weight it still lets something through."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, Tensor):
        return False
    bias = getattr(norm, "bias", None)
    kept = weight.data.clone()
    weight.data.zero_()
    probe = torch.linspace(-1, 1, len(kept), dtype=kept.dtype, device=kept.device)[None, None]
    output = norm(probe)
    weight.data.copy_(kept)
    return bool((output - (bias if isinstance(bias, Tensor) else 0)).abs().max() > 0.1)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]


def _parent(spec: LayerSpec) -> str:
    return spec.name.rpartition(".")[0]
