"""``save_pretrained`` of a loaded model: the same tensors in a new folder, which guards itself as the first did."""

from __future__ import annotations

import os
from pathlib import Path
from types import MethodType
from typing import Any

from torch import Tensor

from compress.errors import UserError
from compress.runtime.stored import Source, stamp
from compress.storage.files import read_header, read_json, read_tensor, write_json

STOCK, OURS = "model", "compress"  # prefixes of shard names


def attach_saving(model: Any, source: Source, guarded: bool) -> None:
    """Give ``model`` a ``save_pretrained`` that keeps our shard names where the format is guarded by them."""
    if guarded:
        model.save_pretrained = MethodType(save_guarded, model)


def save_guarded(model: Any, save_directory: str | os.PathLike[str], **options: Any) -> None:
    """As ``PreTrainedModel.save_pretrained``, but shards are ``compress-*``, so that nobody loads them at random.

    UserError for ``push_to_hub`` (the method of that name does it) and ``variant``.
    """
    for word in ("push_to_hub", "variant"):
        if options.get(word):
            raise UserError(
                f"save_pretrained: {word} is not for compressed models; save to a folder, or call model.push_to_hub"
            )
    folder = Path(save_directory)
    type(model).save_pretrained(model, folder, **options)
    _guard(folder)


def read_encoded(source: Source) -> dict[str, Tensor]:
    """The tensors of encoded layers from the files they came from; UserError where those are gone or have changed."""
    for name, path in source.files.items():
        if not path.is_file() or stamp(path) != source.stamps[name]:
            raise UserError(
                f"{path}: gone or changed since the model was loaded from it, so its packed weights can't be saved "
                "again; load the model anew"
            )
    stems = tuple(f"{stem}." for stem in source.stems)
    found: dict[str, Tensor] = {}
    for name, path in source.files.items():
        with path.open("rb") as file:
            for key, header in source.headers.items():
                if header.file == name and key.startswith(stems):
                    found[key] = read_tensor(file, header)
    return found


def _guard(folder: Path) -> None:
    """Rename the shards just written, then drop those of ours that an earlier save left."""
    index = folder / f"{STOCK}.safetensors.index.json"
    if index.is_file():
        weight_map: dict[str, str] = read_json(index)["weight_map"]
    else:
        weight_map = dict.fromkeys(read_header(folder / f"{STOCK}.safetensors"), f"{STOCK}.safetensors")
    shards = sorted(set(weight_map.values()))
    new = {old: f"{OURS}-{n:05d}-of-{len(shards):05d}.safetensors" for n, old in enumerate(shards, 1)}
    for path in folder.glob(f"{OURS}-*-of-*.safetensors"):
        path.unlink()
    for old in shards:
        os.replace(folder / old, folder / new[old])
    total = sum(header.nbytes for shard in new.values() for header in read_header(folder / shard).values())
    content = {"metadata": {"total_size": total}, "weight_map": {key: new[old] for key, old in weight_map.items()}}
    write_json(folder / f"{OURS}.safetensors.index.json", content)
    index.unlink(missing_ok=True)
