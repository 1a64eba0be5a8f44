"""What is wrong with a recipe, in words: got, wanted, the nearest known key, and where a misplaced key belongs."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from pydantic import BaseModel, ValidationError

from compress.errors import UserError
from compress.methods.base import MethodConfig
from compress.recipe_yaml import Document, Path, dotted

ROOT = FilePath(__file__).parent


@dataclass(frozen=True)
class Problem:
    """One mistake: where in the recipe, and what about it."""

    path: Path
    text: str


def raise_problems(problems: Sequence[Problem], document: Document) -> None:
    """One UserError for all of them, in the order of the file, each line with its place."""
    if not problems:
        return
    ordered = sorted(problems, key=lambda problem: document.order(problem.path))
    raise UserError("\n".join(f"{document.locate(problem.path)}: {problem.text}" for problem in ordered))


def list_words(folder: str) -> list[str]:
    """The words that name a file: the modules of ``compress/<folder>`` without ``base`` and private ones."""
    found = pkgutil.iter_modules([str(ROOT / folder)])
    return sorted(module.name for module in found if module.name != "base" and not module.name.startswith("_"))


def find_word(word: Any, folder: str, also: Iterable[str] = ()) -> str | None:
    """None when ``compress/<folder>/<word>.py`` exists ('-' stands for '_'), else what to say instead."""
    known = [*list_words(folder), *also]
    if not isinstance(word, str):
        return f"got {describe(word)}, wanted one of {', '.join(known)}"
    if word.replace("-", "_") in known:
        return None
    return f"got {word!r}, but there is no compress/{folder}/{word}.py{nearest(word, known)}; known: {', '.join(known)}"


def config_class(method: str) -> type[MethodConfig]:
    """The ``Config`` of ``compress/methods/<method>.py``."""
    module = importlib.import_module(f"compress.methods.{method.replace('-', '_')}")
    found: type[MethodConfig] = module.Config
    return found


def nearest(word: str, known: Iterable[str], lead: str = "; did you mean ") -> str:
    match = difflib.get_close_matches(word.lower().replace("-", "_"), list(known), n=1, cutoff=0.6)
    return f"{lead}{match[0]!r}?" if match else ""


def describe(value: Any) -> str:
    """A value as a user would call it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return f"the list [{', '.join(map(str, value))}]"
    if isinstance(value, str):
        return f"the text {value!r}"
    return f"{value!r}"


def find_problems(
    model: type[BaseModel],
    data: Mapping[str, Any],
    path: Path,
    places: Callable[[], Mapping[str, str]],
    known: Sequence[str] = (),
) -> list[Problem]:
    """What pydantic holds against ``data`` as the fields of ``model``, in our words.

    ``places()`` gives every key that a recipe knows anywhere -> where it belongs; ``known`` are further keys that may
    stand beside the fields of ``model``.
    """
    try:
        BaseModel.__init__(model.__new__(model), **data)
    except ValidationError as error:
        found = error.errors(include_url=False)
    else:
        return []
    problems: list[Problem] = []
    wanted: dict[Path, list[str]] = {}
    for item in found:
        if item["type"] == "extra_forbidden":
            key = str(item["loc"][-1])
            problems.append(Problem((*path, key), explain_key(key, path, [*known, *model.model_fields], places())))
        elif item["type"] == "missing":
            key = str(item["loc"][-1])
            problems.append(Problem(path, f"{dotted((*path, key))} is missing"))
        else:
            inside = _inside(item["loc"], data)
            wanted.setdefault(inside, []).append(_wanted(item["msg"]))
    for inside, words in wanted.items():
        got = describe(_look_up(data, inside))
        name = dotted((*path, *inside))
        text = f"{name}: got {got}, wanted {' or '.join(dict.fromkeys(words))}" if inside else f"{words[0]}"
        problems.append(Problem((*path, *inside), text))
    return problems


def explain_key(key: str, path: Path, known: Sequence[str], places: Mapping[str, str]) -> str:
    """An unknown key: where it belongs when it is known elsewhere, else the nearest, else all that are known here."""
    name = dotted((*path, key))
    here = f"in {dotted(path)}" if path else "at the top level"
    if key in places:
        return f"{name}: {key!r} has no meaning {here}; it belongs {places[key]}"
    near = nearest(key, known)
    if near:
        return f"{name}: unknown key{near}"
    elsewhere = difflib.get_close_matches(key, list(places), n=1, cutoff=0.75)
    if elsewhere:
        word = elsewhere[0]
        return f"{name}: unknown key; did you mean {word!r}, which belongs {places[word]}?"
    return f"{name}: unknown key; known {here}: {', '.join(known)}"


def _inside(loc: tuple[int | str, ...], data: Any) -> Path:
    """The part of pydantic's location that exists in the data; the rest names branches of a union."""
    path: list[int | str] = []
    for part in loc:
        known = isinstance(data, Mapping) and part in data
        listed = isinstance(data, list | tuple) and isinstance(part, int) and part < len(data)
        if not (known or listed):
            break
        data = data[part]
        path.append(part)
    return tuple(path)


def _look_up(data: Any, path: Path) -> Any:
    for part in path:
        data = data[part]
    return data


def _wanted(message: str) -> str:
    """Pydantic's 'Input should be a valid integer' without what a user need not see."""
    text = message.removeprefix("Input should be ").removeprefix("Value error, ")
    if " should have at least " in text:  # "Tuple should have at least 1 item after validation, not 0"
        return "at least " + text.partition(" should have at least ")[2].partition(" after")[0]
    if text.startswith("a valid dictionary"):
        return "a mapping of keys to values"
    return (
        text.replace("a valid string", "text")
        .replace("a valid tuple", "a list")
        .replace("a valid ", "a ")
        .replace("a integer", "an integer")
    )
