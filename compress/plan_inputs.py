"""What a user hands over besides the recipe: sizes, devices, folders, calibration text; checked before any work."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from compress.errors import UserError
from compress.recipe import Recipe
from compress.storage.files import free_bytes
from compress.storage.writer import refuse_to_replace

if TYPE_CHECKING:
    from compress.storage.checkpoint import Checkpoint

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def parse_size(text: int | str | None) -> int | None:
    """``6GB`` (powers of ten), ``6GiB`` (powers of two) or a number of bytes -> bytes."""
    if text is None or isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if match is None or match[2] not in UNITS or float(match[1]) == 0:
        raise UserError(f"--max-memory {text}: wanted a size such as 6GB, 1.5GiB or 800MB")
    return int(float(match[1]) * UNITS[match[2]])


def find_device(word: str) -> str:
    """``auto`` -> ``cuda`` where there is one, else ``cpu``; any other device must be there."""
    if word == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(word)
    except RuntimeError:
        raise UserError(f"--device {word}: no such device; wanted auto, cpu or cuda") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        count = torch.cuda.device_count()
        raise UserError(f"--device {word}: this PyTorch ({torch.__version__}) sees {count} GPUs; use --device cpu")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {word}: not supported; wanted auto, cpu or cuda")
    return word


def pick_dtype(recipe: Recipe, checkpoint: Checkpoint) -> torch.dtype:
    """The recipe's dtype; for ``auto`` the one in which most of the checkpoint's bytes are."""
    if recipe.dtype != "auto":
        found: torch.dtype = getattr(torch, recipe.dtype)
        return found
    sizes: dict[torch.dtype, int] = {}
    for header in checkpoint.headers.values():
        if header.dtype in (torch.bfloat16, torch.float16, torch.float32):
            sizes[header.dtype] = sizes.get(header.dtype, 0) + header.nbytes
    if not sizes:
        kinds = ", ".join(sorted({str(header.dtype) for header in checkpoint.headers.values()}))
        raise UserError(f"{checkpoint.folder}: tensors are {kinds}; wanted bfloat16, float16 or float32")
    return max(sizes, key=lambda dtype: sizes[dtype])


def default_output(model: str, recipe: Recipe) -> Path:
    """``out/<model>-<recipe>`` below the current folder."""
    base = Path(model.rstrip("/")).name.removesuffix(".gguf") or "model"
    name = recipe.name or "-".join(step.method for step in recipe.steps)
    return Path("out") / f"{base}-{name}"


def check_calibration(recipe: Recipe, needs: frozenset[str], folder: Path) -> None:
    """A method that wants data, and eval, need a tokenizer beside the model and a corpus that exists."""
    if not needs and recipe.eval is None and recipe.head is None:
        return
    texts = needs or recipe.eval is not None  # for the head alone random tokens do
    if texts and not any((folder / name).is_file() for name in TOKENIZER_FILES):
        who = "the recipe's calibration" if needs else "eval"
        instead = "use rtn with eval: null, which needs no text" if needs else "set eval: null"
        wanted = ", ".join(TOKENIZER_FILES[:3])
        raise UserError(f"{folder}: no tokenizer ({wanted} ...), but {who} needs one; add it or {instead}")
    if needs or recipe.head is not None:
        check_corpus(recipe.calibration.corpus, "calibration.corpus")
    if recipe.eval is not None:
        check_corpus(recipe.eval.corpus, "eval.corpus")


def check_lengths(recipe: Recipe, needs: frozenset[str], config: Any) -> None:
    """Windows that are longer than what the model can read."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    asked = {"calibration.tokens": recipe.calibration.tokens} if needs else {}
    if recipe.eval is not None:
        asked["eval.tokens"] = recipe.eval.tokens
    long = {key: tokens for key, tokens in asked.items() if limit is not None and tokens > limit}
    if long:
        cure = " ".join(f"--set {key}={limit}" for key in long)
        got = " and ".join(f"{key} is {tokens}" for key, tokens in long.items())
        raise UserError(f"{got}, but the model reads at most {limit} tokens at once; use {cure}")


def check_corpus(corpus: str, where: str) -> None:
    """A name that eval/corpus knows, or a path that exists."""
    from compress.eval.corpus import NAMES

    if corpus in NAMES or Path(corpus).exists():
        return
    raise UserError(f"{where}: got {corpus!r}, wanted {', '.join(NAMES)}, or an existing path of a text file or folder")


def check_output(output: Path, nbytes: int, source: Path | None) -> None:
    """The folder that will be written: not the model itself, on a disk with room, where we may write."""
    if source is not None and output.exists() and output.resolve() == source.resolve():
        raise UserError(f"{output}: the output is the model's own folder; choose another")
    refuse_to_replace(output)
    above = output.absolute().parent
    while not above.exists():
        above = above.parent
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{output}: can't be made: {above} is not a folder that may be written to")
    partial = output.with_name(output.name + ".partial")
    done = sum(path.stat().st_size for path in partial.glob("*.safetensors")) if partial.is_dir() else 0
    free = free_bytes(above) + done
    if free < nbytes:
        need = f"{nbytes / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        raise UserError(f"{output}: {need}; free some space or choose another disk")
