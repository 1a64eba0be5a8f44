"""Which steps a layer gets, and every mistake that names, shapes and a format can show; nothing here reads a weight."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from types import ModuleType

from compress.errors import UserError
from compress.methods.base import MethodConfig
from compress.recipe import Recipe, Step
from compress.recipe_check import list_words
from compress.storage.formats.base import QuantSpec, load_format
from compress.types import LayerSpec

AUTO_ORDER = ("compressed_tensors", "gptq", "bitsandbytes", "native", "dense")  # what `format: auto` tries first


@dataclass(frozen=True)
class PlannedLayer:
    """A layer, the steps that it gets (configured for its shape), the grid that they leave and what it will take."""

    spec: LayerSpec
    steps: tuple[Step, ...]
    quant: QuantSpec | None = None
    nbytes: int = 0  # of everything that the format writes for it

    @property
    def bits_per_weight(self) -> float:
        return 8.0 * self.nbytes / self.spec.numel


@dataclass
class Selection:
    """The layers that steps select, and what was decided on the way."""

    layers: list[PlannedLayer] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # layer name -> why it is left as it is
    adjusted: dict[str, str] = field(default_factory=dict)  # layer name -> what was changed for it


def load_method(word: str) -> ModuleType:
    return importlib.import_module(f"compress.methods.{word}")


def is_quantizing(config: MethodConfig) -> bool:
    return "bits" in type(config).model_fields or hasattr(config, "BITS")


def quant_of(step: Step) -> QuantSpec:
    """The grid that a quantizing step promises: by its fields, or ``BITS`` per row where the method has no choice."""
    config, method = step.config, load_method(step.method)
    values = {"bits": getattr(config, "BITS", None), **config.model_dump()}
    return QuantSpec(
        values["bits"],
        values.get("group_size", -1),
        values.get("symmetric", True),
        values.get("float_zero", False),
        method.activation_rule(config) if hasattr(method, "activation_rule") else None,
        method.count_outliers(config) if hasattr(method, "count_outliers") else 0,
    )


def select_layers(recipe: Recipe, specs: Sequence[LayerSpec], others: dict[str, str]) -> Selection:
    """Steps per layer, in the order of ``specs``. ``others``: modules outside ``specs`` -> why they are not compressed.

    Raises UserError for patterns that match nothing, two quantizing steps on one layer, and group sizes that do not
    divide; all of them at once.
    """
    problems = list(_check_patterns(recipe, specs, others))
    result = Selection()
    indivisible: dict[tuple[int, int, int], list[str]] = {}
    twice: dict[str, list[str]] = {}
    for spec in specs:
        matching = [(i, step) for i, step in enumerate(recipe.steps) if matches(step, spec.name)]
        quantizing = [f"steps.{i} ({step.method})" for i, step in matching if is_quantizing(step.config)]
        if len(quantizing) > 1:
            twice.setdefault(" and ".join(quantizing), []).append(spec.name)
        steps = []
        for i, step in matching:
            fitted = _fit_step(step, spec, result)
            if fitted is None:
                indivisible.setdefault((i, spec.shape[1], step.config.model_dump()["group_size"]), []).append(spec.name)
            elif fitted is not _SKIPPED:
                steps.append(fitted)
        if steps:
            grids = [quant_of(step) for step in steps if is_quantizing(step.config)]
            result.layers.append(PlannedLayer(spec, tuple(steps), grids[-1] if grids else None))
    problems += [_explain_twice(steps, names) for steps, names in twice.items()]
    problems += [_explain_indivisible(key, names) for key, names in indivisible.items()]
    if problems:
        raise UserError("\n".join(problems))
    return result


def matches(step: Step, name: str) -> bool:
    """Whether a step's patterns select the layer ``name``."""
    return any(fnmatchcase(name, p) for p in step.include) and not any(fnmatchcase(name, p) for p in step.exclude)


_SKIPPED = Step.model_construct()  # a step that on_indivisible: skip takes away


def _fit_step(step: Step, spec: LayerSpec, result: Selection) -> Step | None:
    """The step with a group size that divides; ``_SKIPPED``; None where it may not be changed."""
    values = step.config.model_dump()
    group_size = values.get("group_size", -1)
    inputs = spec.shape[1]
    if group_size == -1 or inputs % group_size == 0:
        return step
    what = f"group_size {group_size} does not divide {inputs} inputs"
    choice = values.get("on_indivisible", "error")
    if choice == "skip":
        result.skipped[spec.name] = f"{what} (on_indivisible: skip)"
        return _SKIPPED
    if choice == "error":
        return None
    smaller = max(n for n in divisors(inputs) if n <= group_size)
    result.adjusted[spec.name] = f"{what}: {smaller} is used (on_indivisible: adjust)"
    return step.model_copy(update={"config": step.config.model_copy(update={"group_size": smaller})})


def divisors(number: int) -> list[int]:
    low = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return sorted({*low, *(number // n for n in low)})


def suggest_group_sizes(inputs: int, wanted: int) -> str:
    """Divisors worth having, powers of two before others, the nearest to ``wanted``; "32, 64 or 128"."""
    useful = [n for n in divisors(inputs) if 8 <= n <= 1024] or divisors(inputs)
    powers = [n for n in useful if n & (n - 1) == 0 and n >= 16]
    chosen = powers if len(powers) >= 2 else useful
    nearest = sorted(sorted(chosen, key=lambda n: (abs(n - wanted), n))[:3])
    words = [str(n) for n in nearest]
    return " or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0]


def _explain_indivisible(key: tuple[int, int, int], names: Sequence[str]) -> str:
    step, inputs, group_size = key
    return (
        f"{names[0]}{_and_more(names)}: {inputs} input features are not a multiple of group_size {group_size}; "
        f"use {suggest_group_sizes(inputs, group_size)}, -1 for one group per row, or steps.{step}.on_indivisible: "
        "adjust or skip"
    )


def _explain_twice(steps: str, names: Sequence[str]) -> str:
    return (
        f"{names[0]}{_and_more(names)}: {steps} would both quantize it; give them include and exclude patterns that do "
        "not overlap"
    )


def _and_more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def _check_patterns(recipe: Recipe, specs: Sequence[LayerSpec], others: dict[str, str]) -> Iterable[str]:
    names = [spec.name for spec in specs]
    for i, step in enumerate(recipe.steps):
        for pattern in step.include:
            if any(fnmatchcase(name, pattern) for name in names):
                continue
            outside = [name for name in others if fnmatchcase(name, pattern)]
            if outside:
                yield f"steps.{i}.include {pattern!r}: {outside[0]} is never compressed ({others[outside[0]]})"
            else:
                yield f"steps.{i}.include {pattern!r} matches no layer{_nearest_names(pattern, names)}"
        for pattern in step.exclude:
            if not any(fnmatchcase(name, pattern) for name in [*names, *others]):
                yield f"steps.{i}.exclude {pattern!r} matches nothing{_nearest_names(pattern, names)}"
        included = [name for name in names if any(fnmatchcase(name, pattern) for pattern in step.include)]
        if included and not any(matches(step, name) for name in included):
            yield f"steps.{i}.exclude leaves no layer of those that include selects"


def _nearest_names(pattern: str, names: Sequence[str]) -> str:
    """'; did you mean ...' from the ends of names ("q_proj", "mlp.up_proj"), with the pattern's stars put back."""
    bare = pattern.strip("*").strip(".")
    head = "*." if pattern.startswith("*.") else "*" if pattern.startswith("*") else ""
    tail = ".*" if pattern.endswith(".*") else "*" if pattern.endswith("*") else ""
    parts = [name.split(".") for name in names[:200]]  # enough to have every kind of name
    cuts = [(words, start, stop) for words in parts for stop in range(len(words) + 1) for start in range(stop)]
    ends = {".".join(words[start:stop]) for words, start, stop in cuts}
    near = difflib.get_close_matches(bare, sorted(end for end in ends if end), n=3, cutoff=0.6)
    if near and (head or tail):
        return "; did you mean " + " or ".join(repr(f"{head}{end}{tail}") for end in near) + "?"
    full = difflib.get_close_matches(bare, [".".join(words) for words in parts], n=3, cutoff=0.5)
    starred = [f"*{end}" for end in near if f"*{end}" not in full]
    close = full or starred or list(dict.fromkeys(f"*.{'.'.join(words[-2:])}" for words in parts))[:8]
    lead = "; nearest: " if full or starred else "; there are: "
    return lead + ", ".join(close)


def choose_format(word: str, layers: Sequence[PlannedLayer], untouched: Sequence[LayerSpec], arch: str) -> str:
    """The format's file name: the recipe's, or for ``auto`` the first that carries all. UserError with the reason."""
    known = list_words("storage/formats")
    if word == "auto":
        order = [one for one in AUTO_ORDER if one in known] + [one for one in known if one not in AUTO_ORDER]
        for candidate in order:
            if not why_not(candidate, layers, untouched, arch):
                return candidate
        found = [(one, reason) for one in order for reason in why_not(one, layers, untouched, arch)]
        raise UserError("\n".join(f"format {one}: {reason}" for one, reason in found))
    reasons = why_not(word, layers, untouched, arch)
    if reasons:
        able = [one.replace("_", "-") for one in known if not why_not(one, layers, untouched, arch)]
        instead = f"; --set format={' or --set format='.join(able)} can carry it" if able else ""
        raise UserError("\n".join(f"format {word}: {reason}{instead}" for reason in reasons))
    return word.replace("-", "_")


def why_not(word: str, layers: Sequence[PlannedLayer], untouched: Sequence[LayerSpec], arch: str) -> list[str]:
    """Why a format can't carry these layers; each reason once, with the first layer that it holds for."""
    form = load_format(word)
    found: dict[str, list[str]] = {}
    for layer in layers:
        reason = form.carries(layer.spec, layer.quant, arch)
        if reason:
            found.setdefault(reason, []).append(layer.spec.name)
    pairs = [(layer.spec, layer.quant) for layer in layers if layer.quant is not None]
    whole = None if found else form.conflict(pairs, untouched)
    return [f"{names[0]}{_and_more(names)}: {reason}" for reason, names in found.items()] + ([whole] if whole else [])
