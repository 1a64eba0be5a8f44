"""Text to calibrate on and to measure on: a corpus has two disjoint parts, and a part is cut into windows of tokens.

What a corpus can be:

``pydoc``      the reference topics of Python's own help (``pydoc_data``); works offline. Topics in sorted order go
               to calibration and test in turn; a paragraph that stands in several topics is kept only once.
``wikitext2``  WikiText-2 raw through ``datasets``: calibration is the train split, test the test split, rows joined
               by two newlines.
a folder       its text files (``*.txt``, ``*.raw``) named after their part: a name with the word ``test`` is the test
               part; ``calibration`` or ``calib``, else ``train``, else ``valid`` or ``validation`` is the other. A
               folder without such names is its files joined in sorted order, then cut like one file.
a text file    cut at the line break after 80% of its characters: calibration before it, test after it. A file that is
               named after a part, as in a folder, is that part as a whole, and no other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from compress.errors import UserError

Part = Literal["calibration", "test"]
NAMES = ("pydoc", "wikitext2")
SUFFIXES = (".txt", ".raw")
CALIBRATION_SHARE = 0.8  # of a text file without named parts
# Words in a file's name that say which part it is, the first that any file has wins.
PART_WORDS: dict[str, tuple[tuple[str, ...], ...]] = {
    "test": (("test",),),
    "calibration": (("calibration", "calib"), ("train", "training"), ("valid", "validation")),
}


@dataclass(frozen=True)
class Corpus:
    """One part of a corpus: the text, and what names it in a report."""

    text: str
    name: str  # as the recipe has it: a name or a path
    part: Part
    sha256: str  # of the text in UTF-8, in hex


def load(name_or_path: str | Path, part: Part) -> Corpus:
    """The ``calibration`` or ``test`` part of a corpus; see the top of this file. UserError says what is missing."""
    assert part in get_args(Part), f"part is one of {get_args(Part)}, got {part!r}"
    name = str(name_or_path)
    makers: dict[str, Callable[[Part], str]] = {"pydoc": _read_pydoc, "wikitext2": _read_wikitext2}
    path = Path(name).expanduser()
    if name in makers:
        text = makers[name](part)
    elif path.is_dir():
        text = _read_folder(path, part)
    elif path.is_file():
        text = _read_file(path, part)
    else:
        raise UserError(
            f"corpus {name}: no such corpus, file or folder; wanted one of {', '.join(NAMES)}, "
            "or the path of a text file or of a folder of text files"
        )
    return Corpus(text, name, part, hashlib.sha256(text.encode()).hexdigest())


def _read_pydoc(part: Part) -> str:
    from pydoc_data.topics import topics

    seen: set[str] = set()
    chosen: list[str] = []
    for index, topic in enumerate(sorted(topics)):
        fresh: list[str] = []
        for paragraph in re.split(r"\n[ \t]*\n", topics[topic]):
            key = " ".join(paragraph.split())
            if key and key not in seen:
                seen.add(key)
                fresh.append(paragraph.strip("\n"))
        if fresh and index % 2 == (0 if part == "calibration" else 1):
            chosen.append("\n\n".join(fresh))
    return "\n\n".join(chosen)


def _read_wikitext2(part: Part) -> str:
    import datasets

    split = "train" if part == "calibration" else "test"
    try:
        rows = datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split=split)
    except (OSError, ValueError, RuntimeError) as error:  # no network, offline mode, hub errors: all derive from these
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"corpus wikitext2: can't be fetched from the Hugging Face hub ({reason[0]}); pass the path of a folder "
            "with a test and a calibration file instead, or use the corpus pydoc, which needs no network"
        ) from error
    return "\n\n".join(rows["text"])


def _read_folder(folder: Path, part: Part) -> str:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in SUFFIXES)
    if not files:
        raise UserError(f"corpus {folder}: no text file in this folder; wanted files ending in {' or '.join(SUFFIXES)}")
    parts = {each: _pick(files, each) for each in get_args(Part)}
    if parts[part]:
        return "\n\n".join(_decode(path) for path in parts[part])
    if any(parts.values()):
        words = " or ".join(word for choice in PART_WORDS[part] for word in choice)
        got = ", ".join(path.name for path in files)
        raise UserError(
            f"corpus {folder}: no file of it is named as its {part} part; got {got}; "
            f"wanted a name with the word {words}"
        )
    return _cut("\n\n".join(_decode(path) for path in files), part)


def _read_file(path: Path, part: Part) -> str:
    named = [each for each in get_args(Part) if _pick([path], each)]
    if not named:
        return _cut(_decode(path), part)
    if part not in named:
        raise UserError(
            f"corpus {path}: by its name this is the {named[0]} part of a corpus, and {part} text was asked for; "
            f"pass another file or the folder, or rename the file so that it is cut into two parts"
        )
    return _decode(path)


def _pick(files: Sequence[Path], part: str) -> list[Path]:
    """The files named after ``part``; a name that says both parts is the test part."""
    words = {path: set(re.split(r"[^a-z0-9]+", path.name.lower())) for path in files}
    for choice in PART_WORDS[part]:
        found = [path for path in files if words[path] & set(choice) and (part == "test" or "test" not in words[path])]
        if found:
            return found
    return []


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"corpus {path}: can't be read as UTF-8 text: {error}") from error


def _cut(text: str, part: Part) -> str:
    at = int(len(text) * CALIBRATION_SHARE)
    line_end = text.find("\n", at)
    if 0 <= line_end < len(text) - 1:
        at = line_end + 1
    return text[:at] if part == "calibration" else text[at:]


def describe_tokenizer(tokenizer: Any) -> str:
    """A name for messages: the class and, where it is known, the folder or id that it came from."""
    origin = getattr(tokenizer, "name_or_path", "")
    return f"{type(tokenizer).__name__} of {origin}" if origin else type(tokenizer).__name__
