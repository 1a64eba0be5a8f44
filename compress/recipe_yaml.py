"""YAML with line numbers: a recipe file as plain data, the place of every value, and overrides of single values."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from compress.errors import UserError

Path = tuple[str | int, ...]  # ("steps", 0, "bits")


@dataclass(frozen=True)
class Document:
    """Plain data (dicts, lists, scalars) and the place of every key: ``gptq4.yaml:7`` or ``--set steps.0.bits=3``."""

    data: Any
    label: str  # what to call the whole: a file's path, or "recipe" for data that came from Python
    where: Mapping[Path, str] = field(default_factory=dict)

    def locate(self, path: Path) -> str:
        """The place of ``path``, or of the nearest thing around it that has one."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.where:
                return self.where[path[:end]]
        return self.label

    def order(self, path: Path) -> int:
        """Where ``path`` comes in the file; overrides come last."""
        known = list(self.where)
        places = [known.index(path[:end]) for end in range(len(path), -1, -1) if path[:end] in self.where]
        return places[0] if places else -1


def dotted(path: Path) -> str:
    return ".".join(str(part) for part in path)


def read(text: str, label: str) -> Document:
    """Parses one YAML document. Raises UserError with ``label:line`` for bad syntax and keys that stand twice."""
    yaml = YAML(typ="safe", pure=True)
    where: dict[Path, str] = {}
    try:
        root = yaml.compose(io.StringIO(text))
        data = None if root is None else _build(yaml, root, (), label, where, ())
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{label}:{mark.line + 1}" if mark is not None else label
        raise UserError(f"{place}: not valid YAML: {error.problem or error.context}") from None
    except YAMLError as error:  # e.g. characters that YAML does not allow
        raise UserError(f"{label}: not valid YAML: {' '.join(str(error).split())}") from None
    return Document(data, label, where)


def _build(yaml: YAML, node: Node, path: Path, label: str, where: dict[Path, str], around: tuple[Node, ...]) -> Any:
    where.setdefault(path, f"{label}:{node.start_mark.line + 1}")
    if any(node is outer for outer in around):
        raise UserError(f"{where[path]}: {dotted(path)} holds itself; write the value out")
    around = (*around, node)
    if isinstance(node, SequenceNode):
        return [_build(yaml, item, (*path, i), label, where, around) for i, item in enumerate(node.value)]
    if not isinstance(node, MappingNode):
        return yaml.constructor.construct_object(node)
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        place = f"{label}:{key_node.start_mark.line + 1}"
        key = yaml.constructor.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise UserError(f"{place}: got {key!r} for a key; keys are words")
        if key in result:
            raise UserError(f"{place}: {dotted((*path, key))} stands here for the second time; keep one of the two")
        inner: Path = (*path, key)
        where[inner] = place
        result[key] = _build(yaml, value_node, inner, label, where, around)
    return result


def override(document: Document, setting: str) -> Document:
    """``steps.0.bits=3``: the document with that one value replaced; the value is read as YAML.

    Raises UserError that names the setting. Whether the key is known is for the recipe to say.
    """
    place = f"--set {setting}"
    name, equals, text = setting.partition("=")
    parts: Path = tuple(int(part) if part.isdecimal() else part for part in name.strip().split("."))
    if not equals or "" in parts:
        raise UserError(f"{place}: wanted KEY=VALUE, for example steps.0.bits=3 or calibration.corpus=notes.txt")
    data = copy.deepcopy(document.data)
    parent = data
    for end, part in enumerate(parts[:-1], start=1):
        if isinstance(parent, dict) and parent.get(str(part)) is None:
            parent[str(part)] = {}
        parent = _child(parent, part, parts[: end - 1], place)
    last = parts[-1]
    if not isinstance(parent, dict):
        _child(parent, last, parts[:-1], place)
    parent[last if isinstance(parent, list) else str(last)] = _value(text)
    inside = len(parts)
    where = {path: found for path, found in document.where.items() if path[:inside] != parts}
    return Document(data, document.label, {**where, parts: place})


def _value(text: str) -> Any:
    """A YAML value; text that is not valid YAML, such as the pattern ``*mlp*``, stands for itself."""
    try:
        return YAML(typ="safe", pure=True).load(text)
    except YAMLError:
        return text


def _child(parent: Any, part: str | int, path: Path, place: str) -> Any:
    if isinstance(parent, dict):
        return parent[str(part)]
    name = dotted(path) or "the recipe"
    if not isinstance(parent, list):
        raise UserError(f"{place}: {name} is {parent!r}, which has nothing inside to set")
    if not isinstance(part, int):
        raise UserError(f"{place}: {name} is a list: give a number, such as {name}.0, in place of {part!r}")
    if part >= len(parent):
        raise UserError(f"{place}: {name} has {len(parent)} entries, counted from 0; there is no {name}.{part}")
    return parent[part]


def write(data: Mapping[str, Any]) -> str:
    """Plain data as YAML text, keys in the order given, short lists on one line."""
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    stream = io.StringIO()
    yaml.dump(_plain(data), stream)
    return stream.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value
