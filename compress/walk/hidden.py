"""Hidden states of all calibration windows, on disk or in memory: what streams from block to block."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compress.errors import UserError

if TYPE_CHECKING:
    from typing_extensions import Self


class Hidden:
    """``N`` hidden states of shape ``(T_n, D)``, bit-exact in their dtype; written and read one window at a time.

    On disk it is one raw file, read and written by offset (no mmap, so that resident memory stays one window), beside a
    small ``<path>.json`` that tells its layout. Without ``path`` the windows are kept in memory.
    """

    def __init__(self, lengths: Sequence[int], width: int, dtype: torch.dtype, path: Path | None, mode: str) -> None:
        self.lengths = tuple(lengths)  # T_n
        self.width = width  # D
        self.dtype = dtype
        self.path = path
        self._windows: list[Tensor | None] = [None] * len(self.lengths)
        self._file = None if path is None else FileIO(path, mode)
        row = width * dtype.itemsize
        self._offsets = [row * sum(self.lengths[:n]) for n in range(len(self.lengths) + 1)]

    @classmethod
    def create(cls, path: Path | str | None, lengths: Sequence[int], width: int, dtype: torch.dtype) -> Hidden:
        """A new stream of windows; replaces the file at ``path`` (None: in memory)."""
        if path is None:
            return cls(lengths, width, dtype, None, "")
        path = Path(path)
        header = {"lengths": list(lengths), "width": width, "dtype": str(dtype).removeprefix("torch.")}
        hidden = cls(lengths, width, dtype, path, "w+")
        os.truncate(path, hidden.nbytes)
        _header_path(path).write_text(json.dumps(header))
        return hidden

    @classmethod
    def open(cls, path: Path | str) -> Hidden:
        """An existing stream. Raises ``UserError`` if it is not there or not as long as its header says."""
        path = Path(path)
        if not path.is_file() or not _header_path(path).is_file():
            raise UserError(f"{path}: the hidden states of an unfinished run are gone; run again with --fresh")
        header = json.loads(_header_path(path).read_text())
        hidden = cls(header["lengths"], header["width"], getattr(torch, header["dtype"]), path, "r+")
        size = path.stat().st_size
        if size != hidden.nbytes:
            hidden.close()
            raise UserError(f"{path}: {size} bytes, wanted {hidden.nbytes}; delete it and run again with --fresh")
        return hidden

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def nbytes(self) -> int:
        return self._offsets[-1]

    def read(self, n: int, device: torch.device | str = "cpu") -> Tensor:
        """Window ``n`` as ``(1, T_n, D)``, a tensor of its own."""
        if self._file is None:
            window = self._windows[n]
            assert window is not None, f"window {n} was not written yet"
            return window.to(device, copy=True)[None]
        data = bytearray(self._offsets[n + 1] - self._offsets[n])
        view = memoryview(data)
        self._file.seek(self._offsets[n])
        while view:
            got = self._file.readinto(view)
            assert got, f"{self.path}: file ends before window {n}"
            view = view[got:]
        window = torch.frombuffer(data, dtype=self.dtype).reshape(1, self.lengths[n], self.width)
        return window.to(device)

    def write(self, n: int, hidden: Tensor) -> None:
        """Store ``(1, T_n, D)`` or ``(T_n, D)`` as window ``n``."""
        window = hidden.detach().reshape(self.lengths[n], self.width)
        assert window.dtype == self.dtype, f"window {n} is {window.dtype}, the stream {self.dtype}"
        if self._file is None:
            self._windows[n] = window.to("cpu", copy=True)
            return
        view = memoryview(window.cpu().contiguous().view(torch.uint8).numpy().reshape(-1).data)
        self._file.seek(self._offsets[n])
        while view:
            view = view[self._file.write(view) :]

    def flush(self) -> None:
        """Return only once everything written is on the disk."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def _header_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
