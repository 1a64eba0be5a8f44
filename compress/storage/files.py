"""Files that are whole or absent: atomic writes, safetensors headers read and written without the library's copies."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compress.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


@dataclass(frozen=True)
class TensorHeader:
    """Where one tensor lies; ``start`` is its first byte counted from the beginning of ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str  # name inside the folder
    start: int
    nbytes: int


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file from its header alone: ``u64`` length, JSON, then the data.

    Raises UserError for a missing, truncated or malformed file, and for a header that contradicts itself.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
                raise UserError(
                    f"{path}: not a whole safetensors file: {size} bytes, header of {length} bytes announced; "
                    "download it again"
                )
            entries = json.loads(file.read(length))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; download the model again") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: header can't be read ({error}); download it again") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: header is not a JSON object; download it again")
    entries.pop("__metadata__", None)
    headers = {name: _parse_entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    end = max((header.start + header.nbytes for header in headers.values()), default=8 + length)
    if end != size:
        what = f"truncated, {end - size} bytes are missing" if end > size else f"{size - end} bytes too long"
        raise UserError(f"{path}: {what}: the header announces {end} bytes, the file has {size}; download it again")
    return headers


def _parse_entry(path: Path, name: str, entry: Any, base: int) -> TensorHeader:
    try:
        word, shape, (begin, end) = entry["dtype"], tuple(int(n) for n in entry["shape"]), entry["data_offsets"]
        begin, end = int(begin), int(end)
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: tensor {name}: malformed header entry {entry!r}; download it again") from None
    if word not in DTYPES:
        raise UserError(f"{path}: tensor {name}: dtype {word} is not supported; wanted one of {', '.join(DTYPES)}")
    nbytes = DTYPES[word].itemsize
    for n in shape:
        nbytes *= n
    if begin < 0 or end - begin != nbytes or any(n < 0 for n in shape):
        raise UserError(
            f"{path}: tensor {name}: {word} {list(shape)} takes {nbytes} bytes, the header gives it {end - begin}; "
            "download it again"
        )
    return TensorHeader(DTYPES[word], shape, path.name, base + begin, nbytes)


def read_tensor(file: BinaryIO, header: TensorHeader) -> Tensor:
    """One tensor as a copy of its own: no memory map outlives the call, so resident memory is what is in use."""
    raw = torch.empty(header.nbytes, dtype=torch.uint8)
    if header.nbytes:
        file.seek(header.start)
        got = file.readinto(raw.numpy().data)  # type: ignore[attr-defined]
        if got != header.nbytes:
            raise UserError(f"{file.name}: truncated: wanted {header.nbytes} bytes at {header.start}, got {got}")
    return raw.view(header.dtype).reshape(header.shape)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> int:
    """Write ``tensors`` to ``path`` atomically, one at a time (no copy of the whole); returns the file's bytes.

    The bytes depend on names and values alone: largest alignment first, then by name, as the safetensors library does.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.dtype.itemsize
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        entries[name] = entry
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = 8 + len(text) + offset
    with write_atomic(path, total) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            flat = tensors[name].detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
    return total


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with write_atomic(path, len(text)) as file:
        file.write(text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from ``path``; UserError when it is missing or malformed."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: missing; wanted a folder written by save_pretrained or downloaded whole") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: not readable as JSON ({error}); download it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: wanted a JSON object, got {type(value).__name__}")
    return value


@contextmanager
def write_atomic(path: Path, nbytes: int = 0) -> Iterator[BinaryIO]:
    """A file that appears under its name only when it is whole and on disk: temporary name, fsync, rename, fsync.

    ``nbytes``: what will be written, for the message when the disk is full.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with explain_full_disk(path, nbytes):
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
            sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def explain_full_disk(path: Path, nbytes: int) -> Iterator[None]:
    """Turn "no space left" into a UserError that says how much is needed and how much there is."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"{path}: the disk is full: {nbytes} bytes needed, {free_bytes(path.parent)} free; free some space and run "
            "the same command again, it goes on where it stopped"
        ) from error


def free_bytes(folder: Path) -> int:
    """Bytes that may still be written where ``folder`` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def sync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` survive a power cut (not needed and not possible on Windows)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
