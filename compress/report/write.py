"""JSON on disk, whole or not at all, and never a NaN (which no other JSON reader takes)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compress.storage import files


def write_json(path: Path, content: Any) -> None:
    """Write atomically. Floats that are not finite become null; TypeError for what is not plain data."""
    files.write_json(path, clean(content))


def clean(value: Any) -> Any:
    """The same content with plain dicts and lists, and None for every float that is not finite."""
    if isinstance(value, Mapping):
        return {str(key): clean(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [clean(each) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(clean(each) for each in value)
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"a report holds plain data; got {type(value).__name__}: {value!r}")
