"""A recipe: what to do with a model, frozen and strict, from YAML or from Python, with a digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, field_validator

from compress import recipe_yaml
from compress.errors import UserError
from compress.methods.base import MethodConfig
from compress.recipe_check import (
    ROOT,
    Problem,
    config_class,
    describe,
    find_problems,
    find_word,
    list_words,
    nearest,
    raise_problems,
)
from compress.recipe_yaml import Document, Path, dotted


class _Part(BaseModel):
    """A part of a recipe. Mistakes raise UserError with the nearest known key, also when it is written in Python."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        raise_problems(find_problems(type(self), data, (), dict), Document(None, type(self).__name__))
        super().__init__(**data)


class Calibration(_Part):
    """The text that methods look at: ``samples`` windows of ``tokens`` tokens from a corpus's calibration part."""

    corpus: str = Field(default="pydoc", min_length=1)  # a name (pydoc, wikitext2) or the path of a text file or folder
    samples: int = Field(default=16, ge=1)
    tokens: int = Field(default=2048, ge=1)
    seed: int | None = Field(default=None, ge=0)  # None: the first windows in order; a number: a random choice


class Eval(_Part):
    """What is measured before and after: ``windows`` windows of ``tokens`` tokens from a corpus's test part."""

    corpus: str = Field(default="pydoc", min_length=1)
    windows: int = Field(default=16, ge=1)
    tokens: int = Field(default=2048, ge=2)


class Head(_Part):
    """The token embedding and the output head, rounded to the nearest point of a grid whose range is searched for.

    Where they are one matrix (tied), it is stored once, for both. Only the native format carries them.
    """

    bits: Literal[2, 3, 4, 8] = 8
    group_size: int = 64  # consecutive features that share a scale and a zero; -1 = a whole row
    symmetric: bool = False  # zero in the middle of the grid instead of a zero per group
    layers: Literal["both", "head", "embedding"] = "both"  # which of the two, where they are two

    @field_validator("group_size")
    @classmethod
    def _check_group_size(cls, value: int) -> int:
        if value < -1 or value == 0:
            raise ValueError("a positive number of features, or -1 for a whole row")
        return value


class Step(_Part):
    """One method on the layers that match ``include`` and not ``exclude`` (globs over full layer names).

    The fields of the method's ``Config`` are written flat: ``Step(method="gptq", bits=3)``; or pass ``config``.
    """

    method: str
    include: tuple[str, ...] = Field(default=("*",), min_length=1)
    exclude: tuple[str, ...] = ()
    config: SerializeAsAny[MethodConfig]

    def __init__(self, **data: Any) -> None:
        fields, problems = _check_step(data, ())
        raise_problems(problems, Document(None, "Step"))
        BaseModel.__init__(self, **fields)

    def to_dict(self) -> dict[str, Any]:
        """Flat, as in YAML, every field written out."""
        own = {"method": self.method, "include": list(self.include), "exclude": list(self.exclude)}
        return {**own, **self.config.model_dump(mode="json")}


class Recipe(_Part):
    """Steps, calibration, format, evaluation. Immutable; ``digest()`` names what decides the written weights."""

    name: str | None = None  # what the recipe is called; a file's name unless it says otherwise
    model: str | None = None  # hub id, folder, GGUF file or demo name; the command line may give it instead
    steps: tuple[Step, ...] = Field(min_length=1)
    head: Head | None = None  # None: embedding and output head stay as they are
    calibration: Calibration = Calibration()
    eval: Eval | None = Eval()
    format: str = "compressed-tensors"  # a file of compress/storage/formats, or "auto": the first that can carry it
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    output: str | None = None
    seed: int = Field(default=0, ge=0)

    def __init__(self, **data: Any) -> None:
        fields, problems = _check_recipe(data)
        raise_problems(problems, Document(None, "Recipe"))
        BaseModel.__init__(self, **fields)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], overrides: Iterable[str] = ()) -> Recipe:
        """A recipe from plain data, as YAML or JSON give it."""
        return _make(Document(dict(data), "recipe"), overrides)

    @classmethod
    def load(cls, path_or_name: str | FilePath, overrides: Iterable[str] = ()) -> Recipe:
        """See ``load`` below."""
        return load(path_or_name, overrides)

    def to_dict(self) -> dict[str, Any]:
        """Plain data with every default written out; ``from_dict`` gives the same recipe back."""
        data = self.model_dump(mode="json", exclude={"steps"})
        data["steps"] = [step.to_dict() for step in self.steps]
        return {key: data[key] for key in Recipe.model_fields}

    def to_yaml(self) -> str:
        return recipe_yaml.write(self.to_dict())

    def digest(self) -> str:
        """SHA-256 (hex) of what decides the written weights: all but name, model, output and eval.

        The model has a digest of its own (``Checkpoint.digest``); measuring more must not undo finished work.
        """
        data = {key: value for key, value in self.to_dict().items() if key not in ("name", "model", "output", "eval")}
        data["format"] = self.format.replace("_", "-")
        if self.head is None:
            del data["head"]  # recipes from before there was one keep their digest
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()


def load(path_or_name: str | FilePath, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file, or the shipped one of that name, with overrides such as ``steps.0.bits=3`` applied.

    Raises UserError for a recipe that is not there (with those that ship) and for every mistake in it, all at once,
    each with its line or its override.
    """
    path = find_file(path_or_name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: can't be read as a recipe: {error}") from None
    document = recipe_yaml.read(text, str(path))
    if isinstance(document.data, dict) and document.data.get("name") is None:
        named = Document({**document.data, "name": path.stem}, document.label, document.where)
        return _make(named, overrides)
    return _make(document, overrides)


def shipped_folder() -> FilePath:
    """Where the recipes of the package are: inside it when installed, beside it in a source tree."""
    inside = ROOT / "recipes"
    return inside if inside.is_dir() else ROOT.parent / "recipes"


def list_shipped() -> list[str]:
    return sorted(path.stem for path in shipped_folder().glob("*.yaml"))


def find_file(path_or_name: str | FilePath) -> FilePath:
    """The file of a recipe: a path that exists, or a shipped name with or without ``.yaml``."""
    path = FilePath(path_or_name)
    if path.is_file():
        return path
    word = str(path_or_name).removesuffix(".yaml")
    known = list_shipped()
    if word in known:
        return shipped_folder() / f"{word}.yaml"
    near = nearest(FilePath(word).name, known)
    raise UserError(
        f"{path_or_name}: no such recipe, neither a file nor one that ships{near}; those that ship: {', '.join(known)}"
    )


def _make(document: Document, overrides: Iterable[str]) -> Recipe:
    if not isinstance(document.data, dict):
        got = describe(document.data)
        raise UserError(f"{document.label}: a recipe is a mapping with at least 'steps'; got {got}")
    for setting in overrides:
        document = recipe_yaml.override(document, setting)
    fields, problems = _check_recipe(document.data)
    raise_problems(problems, document)
    return Recipe(**fields)


def _check_recipe(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[Problem]]:
    """The fields as models, and everything that is wrong; with problems the fields are of no use."""
    fields = dict(data)
    problems: list[Problem] = []
    parts: tuple[tuple[str, type[_Part]], ...] = (("calibration", Calibration), ("eval", Eval), ("head", Head))
    for key, model in parts:
        inner = fields.get(key)
        if isinstance(inner, Mapping):
            found = find_problems(model, inner, (key,), _find_places)
            problems += found
            fields[key] = model() if found else model(**inner)
    if isinstance(fields.get("steps"), list | tuple):
        steps, found = _check_steps(fields["steps"])
        problems += found
        fields["steps"] = steps
    if "format" in fields:
        wrong = find_word(fields["format"], "storage/formats", ("auto",))
        problems += [Problem(("format",), f"format: {wrong}")] if wrong else []
        fields["format"] = "auto" if wrong else fields["format"]
    return fields, problems + find_problems(Recipe, fields, (), _find_places)


def _check_steps(steps: Sequence[Any]) -> tuple[tuple[Step, ...], list[Problem]]:
    result: list[Step] = []
    problems: list[Problem] = []
    for index, step in enumerate(steps):
        if isinstance(step, Step):
            result.append(step)
        elif isinstance(step, Mapping):
            fields, found = _check_step(step, ("steps", index))
            problems += found
            result.append(Step.model_construct() if found else Step(**fields))
        else:
            text = f"steps.{index}: got {describe(step)}, wanted a mapping such as '- method: gptq'"
            problems.append(Problem(("steps", index), text))
            result.append(Step.model_construct())  # stands in, so that the rest of the recipe is checked too
    return tuple(result), problems


def _check_step(data: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], list[Problem]]:
    """A step's flat keys sorted into its own and its method's ``config``."""
    own = {key: value for key, value in data.items() if key in ("method", "include", "exclude")}
    settings = {key: value for key, value in data.items() if key not in own and key != "config"}
    for key in ("include", "exclude"):
        if isinstance(own.get(key), str | list):
            own[key] = (own[key],) if isinstance(own[key], str) else tuple(own[key])
    meant = nearest("method", settings, "; did you write it as ")
    missing = f"is missing: the word that names the method's file, one of {', '.join(list_words('methods'))}{meant}"
    wrong = find_word(own["method"], "methods") if "method" in own else missing
    if wrong:
        return {}, [Problem((*path, "method"), f"{dotted((*path, 'method'))}: {wrong}")]
    own["method"] = own["method"].replace("-", "_")
    config, problems = _check_config(own["method"], settings, data.get("config"), path)
    fields = {**own, "config": config}
    return fields, problems + find_problems(Step, fields, path, _find_places)


def _check_config(
    method: str, settings: Mapping[str, Any], config: Any, path: Path
) -> tuple[MethodConfig, list[Problem]]:
    kind = config_class(method)
    if config is None:
        known = ("method", "include", "exclude")
        problems = find_problems(kind, settings, path, _find_places, known)
        return (MethodConfig() if problems else kind(**settings)), problems
    name = dotted((*path, "config"))
    if not isinstance(config, kind):
        wanted = f"a Config of compress.methods.{method}, or its fields written flat beside 'method'"
        return MethodConfig(), [Problem((*path, "config"), f"{name}: got {describe(config)}, wanted {wanted}")]
    clash = ", ".join(settings)
    problems = [Problem((*path, key), f"{name} is given, so {clash} must be set in it") for key in [*settings][:1]]
    return config, problems


def _find_places() -> dict[str, str]:
    """Every key that a recipe knows -> where it belongs, in words."""
    found: dict[str, list[str]] = {}
    parts: tuple[tuple[str, type[BaseModel]], ...] = (
        ("at the top level", Recipe),
        ("in calibration", Calibration),
        ("in eval", Eval),
    )
    for place, model in parts:
        for key in model.model_fields:
            found.setdefault(key, []).append(place)
    methods = list_words("methods")
    of_method: dict[str, list[str]] = dict.fromkeys(("method", "include", "exclude"), methods)
    for method in methods:
        for key in config_class(method).model_fields:
            of_method.setdefault(key, []).append(method)
    for key, users in of_method.items():
        some = "" if users == methods else f" with method {' or '.join(users)}"
        found.setdefault(key, []).append(f"in a step{some} (steps.0.{key})")
    for key in Head.model_fields:  # most are a step's too, and meant for that where they stand in a wrong place
        found.setdefault(key, ["in head"])
    return {key: " or ".join(places) for key, places in found.items()}
