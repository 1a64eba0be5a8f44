"""Which checkpoint tensors make which parameter, and how: Transformers' own conversions, applied to one parameter.

Checkpoints on disk rarely hold exactly the module's names: GPT-2 lacks the ``transformer.`` prefix, Mixtral keeps
``block_sparse_moe.experts.3.w1``, experts are stored one by one and stacked at load. ``from_pretrained`` converts the
whole model at once; here the same renaming rules and operations run for one unit, so that memory is bounded by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)

from compress.errors import UserError
from compress.numerics.finite import count_nonfinite

# Causal masks and rotary tables that old checkpoints hold and no model of today reads.
LEGACY_TENSORS = re.compile(r"(\.attn\.(bias|masked_bias)|\.attention\.(bias|masked_bias)|rotary_emb\.inv_freq)$")


class Reader(Protocol):
    """What is needed of ``storage.checkpoint.Checkpoint``."""

    @property
    def folder(self) -> Any: ...
    @property
    def config(self) -> dict[str, Any]: ...
    @property
    def headers(self) -> Any: ...
    def read(self, names: list[str]) -> dict[str, Tensor]: ...


@dataclass
class Conversion:
    """The checkpoint tensors that make one parameter, or several at once where a fused tensor is split at load."""

    targets: tuple[str, ...]  # state-dict names of the model
    sources: list[str] = field(default_factory=list)  # checkpoint names, in the order the operations expect
    patterns: list[str] = field(default_factory=list)  # the rule that each source matched; its own name for a rename
    converter: WeightConverter | None = None  # None: a plain (renamed) copy


@dataclass(frozen=True)
class NameMap:
    """All conversions of a checkpoint, and the names on either side that found no partner."""

    conversions: tuple[Conversion, ...]
    missing: tuple[str, ...]  # parameters and persistent buffers with no source; tied ones are not missing
    unexpected: tuple[str, ...]  # checkpoint tensors that no parameter reads


def map_names(model: PreTrainedModel, names: Iterable[str]) -> NameMap:
    """Pair checkpoint tensor ``names`` with the state dict of ``model`` (on meta); reads nothing."""
    state = model.state_dict()
    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, Conversion] = {}
    unexpected: list[str] = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:  # already the module's name: a rule must not rename it
            target, pattern = name, None
        if target not in state:
            unexpected.append(name)
            continue
        rule = by_pattern[pattern] if pattern is not None else None
        if target not in found:
            targets = (target,) if rule is None else _expand_targets(target, rule)
            found[target] = Conversion(targets, converter=rule)
        found[target].sources.append(name)
        found[target].patterns.append(name if pattern is None else pattern)
    made = {target for conversion in found.values() for target in conversion.targets}
    return NameMap(
        tuple(found.values()),
        missing=tuple(_drop_ignored(_drop_tied(model, set(state) - made, made), model, "missing")),
        unexpected=tuple(_drop_ignored(unexpected, model, "unexpected")),
    )


def _expand_targets(target: str, rule: WeightConverter) -> tuple[str, ...]:
    """All parameters that a rule makes at once, given the first: ``...qkv`` split into q, k and v."""
    first = rule.target_patterns[0]
    return tuple(target.replace(first, other) for other in rule.target_patterns)


def _drop_tied(model: PreTrainedModel, missing: set[str], made: set[str]) -> list[str]:
    """A tied parameter is not missing as long as its partner was found, on whichever side the checkpoint has it."""
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    partners = dict(tied)
    for target, source in tied.items():
        partners.setdefault(source, target)
    return sorted(name for name in missing if partners.get(name) not in made)


def _drop_ignored(names: Iterable[str], model: PreTrainedModel, side: str) -> list[str]:
    patterns = set(getattr(model, f"_keys_to_ignore_on_load_{side}", None) or ())
    regexes = [re.compile(pattern) for pattern in patterns]
    if side == "unexpected":
        regexes.append(LEGACY_TENSORS)
    return [name for name in names if not any(regex.search(name) for regex in regexes)]


def read_conversion(
    conversion: Conversion, reader: Reader, model: PreTrainedModel, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The tensors of one conversion on ``device``: what ``from_pretrained(dtype=dtype)`` would put there.

    Raises ``UserError`` for a shape that does not fit or a value that is not finite, naming the tensor.
    """
    dtype = target_dtype(model, conversion.targets[0], dtype)
    stored = reader.read(list(conversion.sources))
    if conversion.converter is None:
        (source,) = conversion.sources
        made = {conversion.targets[0]: stored.pop(source).to(device=device, dtype=dtype)}
    else:
        transform = deepcopy(conversion.converter)
        for source, pattern in zip(conversion.sources, conversion.patterns, strict=True):
            tensor = stored.pop(source).to(device=device, dtype=dtype)
            transform.add_tensor(conversion.targets[0], source, pattern, tensor)
        converted = transform.convert(conversion.targets[0], model=model, config=model.config)
        made = {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}
    for name, tensor in made.items():
        _check_tensor(name, tensor, conversion, model)
    return made


def target_dtype(model: PreTrainedModel, name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that ``from_pretrained(dtype=dtype)`` gives parameter ``name``: some models keep a few in float32."""
    plan = model._get_dtype_plan(dtype)
    if plan:
        regex, plan_key, _ = build_glob_alternation(list(plan))
        match = regex.search(name)
        if match is not None and match.lastgroup is not None:
            kept: torch.dtype = plan[plan_key[match.lastgroup]]
            return kept
    built: torch.dtype = model.get_parameter_or_buffer(name).dtype
    return built


def _check_tensor(name: str, tensor: Tensor, conversion: Conversion, model: PreTrainedModel) -> None:
    wanted = model.get_parameter_or_buffer(name).shape
    sources = ", ".join(conversion.sources[:3])
    if tensor.shape != wanted:
        raise UserError(
            f"{name}: the checkpoint's {sources} has shape {tuple(tensor.shape)}, but config.json makes the model "
            f"want {tuple(wanted)}; config.json and weights do not belong together"
        )
    count = count_nonfinite(tensor)
    if count:
        raise UserError(
            f"{name}: {count} of {tensor.numel()} weights are NaN or infinite in {tensor.dtype} (from {sources}); "
            "the checkpoint is damaged, or its values overflow this dtype: download it again or choose dtype bfloat16"
        )
