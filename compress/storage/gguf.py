"""A GGUF file turned into an ordinary safetensors folder, one tensor at a time.

Names, config and the llama.cpp permutations are undone with Transformers' own tables, so that the folder equals
``from_pretrained(gguf_file=...)`` tensor by tensor; only the loop is ours, because Transformers' keeps all tensors.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import UserError
from compress.storage.files import explain_full_disk, write_json, write_safetensors

SHARD_BYTES = 1 << 30
# What the reader raises on a file that is cut short or is no GGUF at all.
BROKEN = (ValueError, IndexError, KeyError, OSError, OverflowError, MemoryError, struct.error)


def convert(path: Path, folder: Path) -> None:
    """Write the model in the GGUF file ``path`` to the existing empty ``folder``: bfloat16 weights, config, tokenizer.

    Raises UserError for a file that is not a whole GGUF, or an architecture that Transformers can't read from GGUF.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    reader = open_gguf(path)
    try:
        config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (ValueError, NotImplementedError, KeyError) as error:
        raise UserError(f"{path}: Transformers can't read this GGUF: {error}") from error
    model = _build_on_meta(config, path)
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _write_shards(folder, _read_tensors(reader, model, path), wanted, _list_tied(model), path)
    with explain_full_disk(folder, 0):
        tokenizer.save_pretrained(folder)
        GenerationConfig.from_model_config(config).save_pretrained(folder)
    written = config.to_diff_dict()
    written.pop("_model_name_or_path", None)
    write_json(folder / "config.json", {**written, "architectures": [type(model).__name__], "dtype": "bfloat16"})


def open_gguf(path: Path) -> Any:
    """A ``gguf.GGUFReader``; UserError for a file that is cut short, or is something else."""
    from gguf import GGUFReader

    try:
        with path.open("rb") as file:
            magic = file.read(4)
        if magic != b"GGUF":
            raise UserError(f"{path}: not a GGUF file: it starts with {magic!r}, wanted b'GGUF'")
        return GGUFReader(path)
    except UserError:
        raise
    except BROKEN as error:
        raise UserError(f"{path}: damaged or truncated GGUF ({error}); download it again") from error


def _build_on_meta(config: Any, path: Path) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    except ValueError as error:
        raise UserError(
            f"{path}: holds a {config.model_type} model, which is no causal language model: {error}"
        ) from error


def _list_tied(model: Any) -> set[str]:
    """Parameters that are another one under a second name: not stored."""
    return set(getattr(model, "all_tied_weights_keys", None) or {})


def _read_tensors(reader: Any, model: Any, path: Path) -> Iterator[tuple[str, Tensor]]:
    """``(parameter name, bfloat16 tensor)`` in file order; fused experts once all their parts are there."""
    from gguf import dequantize
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    field = reader.fields.get("general.architecture")
    architecture = bytes(field.parts[field.data[0]]).decode() if field is not None else ""
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    names = get_gguf_hf_weights_map(model, processor)
    gathered: dict[str, dict[str, Tensor]] = {"tensors": {}}  # where processors put what they merge
    left = Counter(_block(tensor.name) for tensor in reader.tensors)
    for tensor in reader.tensors:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except BROKEN as error:
            raise UserError(f"{path}: tensor {tensor.name} can't be read ({error}); download the file again") from error
        result = processor.process(
            weights=values, name=tensor.name, tensor_key_mapping=names, parsed_parameters=gathered
        )
        if result.name in names:
            yield names[result.name], torch.from_numpy(result.weights.copy()).to(torch.bfloat16)
        left[_block(tensor.name)] -= 1
        if not left[_block(tensor.name)]:
            for name in list(gathered["tensors"]):
                yield name, gathered["tensors"].pop(name).to(torch.bfloat16)
        _forget_pages(reader)


def _block(name: str) -> str:
    match = re.match(r"blk\.\d+\.", name)
    return match.group() if match else ""


def _forget_pages(reader: Any) -> None:
    """Pages of the memory map that were read would count as ours until the end; the system may drop them now."""
    mapped = getattr(reader.data, "_mmap", None)
    if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def _write_shards(
    folder: Path,
    tensors: Iterator[tuple[str, Tensor]],
    wanted: dict[str, tuple[int, ...]],
    tied: set[str],
    path: Path,
) -> None:
    """Shards of about ``SHARD_BYTES`` and their index; checks that every parameter came, in its shape."""
    weight_map: dict[str, str] = {}
    pending: dict[str, Tensor] = {}
    count = total = 0

    def flush() -> None:
        nonlocal count
        count += 1
        shard = f"model-{count:05d}.safetensors"
        write_safetensors(folder / shard, pending)
        weight_map.update(dict.fromkeys(pending, shard))
        pending.clear()

    for name, tensor in tensors:
        if name in tied or name not in wanted:
            continue
        if tuple(tensor.shape) != wanted[name]:
            raise UserError(f"{path}: {name} has shape {tuple(tensor.shape)}, the model wants {wanted[name]}")
        pending[name] = tensor
        total += tensor.nbytes
        if sum(one.nbytes for one in pending.values()) >= SHARD_BYTES:
            flush()
    if pending:
        flush()
    missing = sorted(set(wanted) - tied - set(weight_map))
    if missing:
        raise UserError(f"{path}: {len(missing)} parameters are not in the file: {', '.join(missing[:5])}")
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / "model.safetensors.index.json", index)
