"""A model folder read lazily: every question but ``read`` is answered from the safetensors headers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.numerics.finite import count_nonfinite
from compress.storage.files import TensorHeader, read_header, read_json, read_tensor

PREFIXES = ("model", "compress")  # stock shards, and those of the native format


class Checkpoint:
    """The tensors and configuration of a local folder in the Hugging Face layout.

    One ``<prefix>.safetensors`` or ``<prefix>.safetensors.index.json`` with its shards. Pickled weights are refused.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"{self.folder}: no such folder")

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        return read_json(self.folder / "config.json")

    @cached_property
    def headers(self) -> dict[str, TensorHeader]:
        """All tensors, from the headers. UserError for a missing or damaged shard, or an index that is wrong."""
        path = self.folder / self.entry
        return self._read_index(path) if path.suffix == ".json" else read_header(path)

    @cached_property
    def entry(self) -> str:
        """The file that reading begins with: the index, or the only file of weights. UserError where there is none."""
        for prefix in PREFIXES:
            for name in (f"{prefix}.safetensors.index.json", f"{prefix}.safetensors"):
                if (self.folder / name).is_file():
                    return name
        raise UserError(f"{self.folder}: no weights: {self._describe_what_is_there()}")

    @property
    def files(self) -> list[str]:
        """Names of the weight files."""
        return sorted({header.file for header in self.headers.values()})

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(header.nbytes for header in self.headers.values())

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """The tensors ``names``, in that order, as copies in memory (CPU)."""
        wanted = list(names)
        for name in wanted:
            if name not in self.headers:
                raise UserError(f"{self.folder}: there is no tensor {name}")
        found: dict[str, Tensor] = {}
        for shard in sorted({self.headers[name].file for name in wanted}):
            with (self.folder / shard).open("rb") as file:
                for name in wanted:
                    if self.headers[name].file == shard:
                        found[name] = read_tensor(file, self.headers[name])
        return {name: found[name] for name in wanted}

    def check(self) -> None:
        """Raise UserError for whatever headers and configuration can tell: missing, truncated or empty parts."""
        if not self.headers:
            raise UserError(f"{self.folder}: the weight files hold no tensors")
        if "model_type" not in self.config:
            raise UserError(f"{self.folder / 'config.json'}: no model_type; this is not a Transformers model")

    def digest(self) -> str:
        """SHA-256 (hex) that changes when the model does: configuration, tensor headers, file sizes and times."""
        sha = hashlib.sha256(json.dumps(self.config, sort_keys=True).encode())
        for name, header in sorted(self.headers.items()):
            sha.update(f"{name} {header.dtype} {header.shape} {header.file} {header.start}\n".encode())
        for name in self.files:
            stat = (self.folder / name).stat()
            sha.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
        return sha.hexdigest()

    def _read_index(self, index: Path) -> dict[str, TensorHeader]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
            raise UserError(f"{index}: no weight_map from tensor names to files; download the folder again")
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
        if outside:
            raise UserError(f"{index}: names a file outside the folder: {outside[0]}")
        missing = [shard for shard in shards if not (self.folder / shard).is_file()]
        if missing:
            raise UserError(
                f"{self.folder}: {len(missing)} of {len(shards)} weight files are missing: {_some(missing)}; "
                "download the folder again"
            )
        found = {shard: read_header(self.folder / shard) for shard in shards}
        absent = sorted(name for name, shard in weight_map.items() if name not in found[shard])
        if absent:
            raise UserError(
                f"{index}: names {len(absent)} tensors that their files do not hold: {_some(absent)}; "
                "download the folder again"
            )
        return {name: found[shard][name] for name, shard in weight_map.items()}

    def _describe_what_is_there(self) -> str:
        pickled = [*self.folder.glob("pytorch_model*.bin"), *self.folder.glob("*.pt"), *self.folder.glob("*.pth")]
        if pickled:
            return (
                f"only {_some(sorted(path.name for path in pickled))}, a pickle, which can run code: never opened; "
                "get or convert the model to safetensors (load it with Transformers, then save_pretrained)"
            )
        if any(self.folder.glob("*.gguf")):
            return "the folder holds GGUF files; give the path of one of them as the model"
        return "wanted model.safetensors, or model.safetensors.index.json and its shards; this may be an unfinished run"


def check_finite(name: str, tensor: Tensor) -> None:
    """UserError if ``tensor`` holds NaN or infinite values, with their count."""
    bad = count_nonfinite(tensor)
    if bad:
        raise UserError(
            f"{name}: {bad} of {tensor.numel()} values are NaN or infinite; the file is damaged, download it again"
        )


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (" ..." if len(names) > limit else "")
