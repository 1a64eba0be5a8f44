"""Places for a folder's tensors in a model on meta: a layer holds them as its file does, until they are packed.

``place`` runs before weights are read (each encoded layer becomes a ``Stored`` with a buffer per tensor of its), and
whoever reads the files fills the buffers by name. ``swap.py`` then turns every ``Stored`` into what computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UserError
from compress.storage.files import TensorHeader, read_header
from compress.storage.formats.base import Format
from compress.types import LayerSpec

Headers = Mapping[str, TensorHeader]


class Stored(nn.Module):
    """The tensors of one layer under their last names, and what is needed to make a layer of them.

    ``stem``: what the tensors' names begin with. ``plain``: the module that the layer takes the place of, on meta.
    ``twin_of``: the layer that this one, without tensors of its own, shares its matrix with.
    """

    plain: nn.Module

    def __init__(self, spec: LayerSpec, stem: str, names: tuple[str, ...], headers: Headers, plain: nn.Module) -> None:
        super().__init__()
        self.spec, self.stem, self.dtype = spec, stem, plain_dtype(plain)
        self.twin_of: str | None = None
        self.__dict__["plain"] = plain  # not a child: its parameters are no longer the model's
        for name in names:
            header = headers[name]
            empty = torch.empty(header.shape, dtype=header.dtype, device="meta")
            self.register_buffer(name.removeprefix(f"{stem}."), empty)
        if "weight" not in self._buffers:  # some models initialise their layers' weights by name
            self.weight = mark_initialized(torch.empty(0, device="meta"))
        mark_initialized(self)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under their full names."""
        return {f"{self.stem}.{name}": tensor for name, tensor in self.named_buffers()}


class StoredExperts(nn.Module):
    """Stands where a fused parameter ``(E, O, I)`` was: a ``Stored`` per encoded expert, a buffer per plain one."""

    def __init__(self, parameter: nn.Parameter) -> None:
        super().__init__()
        self.shape, self.dtype = tuple(parameter.shape), parameter.dtype
        mark_initialized(self)


@dataclass(frozen=True)
class Source:
    """The files that a model came from, as they were then, and which of their tensors belong to encoded layers."""

    headers: Headers
    files: Mapping[str, Path]  # by name
    stamps: Mapping[str, tuple[int, int]]  # by name: bytes, time of change
    stems: tuple[str, ...] = ()  # what the names of encoded layers' tensors begin with

    @classmethod
    def read(cls, files: list[str]) -> Source:
        """From the headers of ``files``; UserError for one that is missing or damaged."""
        headers: dict[str, TensorHeader] = {}
        for file in files:
            if not str(file).endswith(".safetensors"):
                raise UserError(f"{file}: not safetensors; compressed weights are read from safetensors only")
            headers.update(read_header(Path(file)))
        paths = {Path(file).name: Path(file) for file in files}
        return cls(headers, paths, {name: stamp(path) for name, path in paths.items()})


def mark_initialized(value: Any) -> Any:
    """Tell Transformers not to fill a tensor or module at random."""
    value._is_hf_initialized = True
    return value


def stamp(path: Path) -> tuple[int, int]:
    """What changes when a file does."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns


def place(model: nn.Module, form: Format, headers: Headers, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Put a ``Stored`` where each encoded layer is; the stems of their tensors' names.

    Raises UserError for a layer that the model doesn't have, or has in another shape.
    """
    tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
    stems = []
    for spec, names in form.list_layers(headers, config):
        stem = f"{spec.parameter}.{spec.index}" if spec.kind == "expert" else spec.name
        if spec.kind == "expert":
            _place_expert(model, spec, stem, names, headers)
        else:
            _place_layer(model, spec, stem, names, headers)
        stems.append(stem)
        for target in [key for key, value in tied.items() if spec.parameter in (key, value)]:
            other = tied.pop(target)
            _place_tied(model, other if target == spec.parameter else target, spec)
    if hasattr(model, "all_tied_weights_keys"):
        setattr(model, "all_tied_weights_keys", tied)  # noqa: B010  what is left to Transformers to tie
    _place_plain_experts(model, headers)
    return tuple(stems)


def list_stored(model: nn.Module) -> Iterator[tuple[str, Stored]]:
    """Every layer that is still as its file has it."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Stored):
            yield name, module


def plain_dtype(module: nn.Module) -> torch.dtype:
    return next((one.dtype for one in module.parameters() if one.is_floating_point()), torch.float32)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def weight_shape(module: nn.Module) -> tuple[int, ...] | None:
    """``(O, I)`` of a module that multiplies or looks up a matrix; None for any other."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        return None
    return tuple(weight.shape[::-1] if type(module).__name__ == "Conv1D" else weight.shape)


def _place_layer(model: nn.Module, spec: LayerSpec, stem: str, names: tuple[str, ...], headers: Headers) -> None:
    try:
        plain = model.get_submodule(spec.name)
    except AttributeError:
        raise UserError(f"{spec.name}: the model has no such layer; config.json is of another model") from None
    _check_shape(spec, weight_shape(plain))
    bias = f"{stem}.bias"
    if bias in headers:
        names = (*names, bias)
    elif getattr(plain, "bias", None) is not None:
        raise UserError(f"{bias}: not in the files; configuration and weights do not belong together")
    set_module(model, spec.name, Stored(spec, stem, names, headers, plain))


def _place_tied(model: nn.Module, parameter: str, spec: LayerSpec) -> None:
    """The other end of a tied matrix: it becomes a ``Stored`` without tensors, filled from the layer ``spec``."""
    name = parameter.removesuffix(".weight")
    plain = model.get_submodule(name)
    _check_shape(spec, weight_shape(plain))
    twin = Stored(spec, name, (), {}, plain)
    twin.twin_of = spec.name
    set_module(model, name, twin)


def _place_expert(model: nn.Module, spec: LayerSpec, stem: str, names: tuple[str, ...], headers: Headers) -> None:
    owner, _, leaf = spec.parameter.rpartition(".")
    try:
        module = model.get_submodule(owner)
        found = getattr(module, leaf)
    except AttributeError:
        raise UserError(f"{spec.parameter}: the model has no such parameter; config.json is of another model") from None
    if isinstance(found, nn.Parameter):
        delattr(module, leaf)
        mark_initialized(module)
        found = StoredExperts(found)
        setattr(module, leaf, found)
    shape = found.shape[1:] if isinstance(found, StoredExperts) and len(found.shape) == 3 else None
    _check_shape(spec, shape)
    assert spec.index is not None
    if not 0 <= spec.index < found.shape[0]:
        raise UserError(f"{spec.name}: the model has {found.shape[0]} experts; configuration and weights do not fit")
    found.add_module(str(spec.index), Stored(spec, stem, names, headers, found))


def _place_plain_experts(model: nn.Module, headers: Headers) -> None:
    """Buffers for slices of a fused parameter that are not encoded; UserError where a slice is nowhere."""
    for name, module in model.named_modules():
        if not isinstance(module, StoredExperts):
            continue
        for index in range(module.shape[0]):
            key = f"{name}.{index}"
            if str(index) in module._modules:
                continue
            if key not in headers:
                raise UserError(f"{key}: not in the files; configuration and weights do not belong together")
            if headers[key].shape != module.shape[1:]:
                raise UserError(f"{key}: weights are {list(headers[key].shape)}, wanted {list(module.shape[1:])}")
            module.register_buffer(str(index), torch.empty(module.shape[1:], dtype=module.dtype, device="meta"))


def _check_shape(spec: LayerSpec, shape: tuple[int, ...] | None) -> None:
    if shape is None:
        raise UserError(f"{spec.name}: not a layer with one matrix; config.json is of another model")
    if tuple(shape) != spec.shape:
        raise UserError(f"{spec.name}: weights are {list(spec.shape)}, the model's parameter is {list(shape)}")
