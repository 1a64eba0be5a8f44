"""Reading folders: against the safetensors library, and every way a folder can be broken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import UserError
from compress.storage.checkpoint import Checkpoint, check_finite
from compress.storage.files import DTYPES, write_safetensors

TENSORS = {
    "a.weight": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4),
    "b.codes": torch.arange(7, dtype=torch.uint8),
    "c": torch.tensor(2.5),
    "d.empty": torch.zeros(0, 3),
    "e.words": torch.arange(-3, 3, dtype=torch.int32),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two shards with an index."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    names = list(TENSORS)
    weight_map = {}
    for number, part in enumerate((names[:3], names[3:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: TENSORS[name] for name in part}, tmp_path / shard)
        weight_map.update(dict.fromkeys(part, shard))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return tmp_path


def test_reads_what_the_library_wrote(folder: Path) -> None:
    checkpoint = Checkpoint(folder)
    checkpoint.check()
    assert set(checkpoint.headers) == set(TENSORS)
    assert checkpoint.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    read = checkpoint.read(["e.words", "a.weight", "d.empty", "c", "b.codes"])
    assert list(read) == ["e.words", "a.weight", "d.empty", "c", "b.codes"]
    for name, tensor in read.items():
        header = checkpoint.headers[name]
        assert (header.dtype, header.shape, header.nbytes) == (tensor.dtype, tuple(tensor.shape), tensor.nbytes)
        assert torch.equal(tensor, TENSORS[name])
    read["a.weight"].zero_()
    assert torch.equal(checkpoint.read(["a.weight"])["a.weight"], TENSORS["a.weight"])


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_the_library_reads_what_we_write(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"x": torch.arange(6).reshape(2, 3).t().to(dtype), "odd": torch.arange(3, dtype=torch.uint8)}
    size = write_safetensors(tmp_path / "f.safetensors", tensors)
    assert size == (tmp_path / "f.safetensors").stat().st_size
    read = load_file(tmp_path / "f.safetensors")
    assert all(
        torch.equal(read[name].float(), tensors[name].float()) and read[name].dtype == t.dtype
        for name, t in tensors.items()
    )
    write_safetensors(tmp_path / "again.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "f.safetensors").read_bytes()


def test_digest_follows_the_model(folder: Path) -> None:
    before = Checkpoint(folder).digest()
    assert Checkpoint(folder).digest() == before
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 3}')
    changed = Checkpoint(folder).digest()
    save_file({name: TENSORS[name] + 1 for name in ("d.empty", "e.words")}, folder / "model-00002-of-00002.safetensors")
    assert len({before, changed, Checkpoint(folder).digest()}) == 3


def expect(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match):
        Checkpoint(folder).check()


def test_missing_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()
    expect(folder, r"1 of 2 weight files are missing: model-00002-of-00002\.safetensors")


def test_truncated_shard(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    data = shard.read_bytes()
    for keep, match in ((len(data) - 5, "truncated, 5 bytes are missing"), (40, "header of"), (3, "not a whole")):
        shard.write_bytes(data[:keep])
        expect(folder, match)
    shard.write_bytes(data + b"x")
    expect(folder, "1 bytes too long")
    shard.write_bytes(data[:8] + b"?" + data[9:])
    expect(folder, "header can't be read")


def test_header_that_contradicts_itself(folder: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"[3,4]", b"[3,5]"))
    expect(folder, "BF16.*takes 30 bytes, the header gives it 24")


def test_index_that_is_wrong(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**weight_map, "z": "model-00001-of-00002.safetensors"}}))
    expect(folder, "names 1 tensors that their files do not hold: z")
    index.write_text(json.dumps({"weight_map": {**weight_map, "z": "../elsewhere.safetensors"}}))
    expect(folder, "outside the folder")
    index.write_text('{"weight_map": ')
    expect(folder, "not readable as JSON")
    index.write_text("{}")
    expect(folder, "no weight_map")


def test_folders_without_weights(tmp_path: Path) -> None:
    expect(tmp_path / "absent", "no such folder")
    (tmp_path / "config.json").write_text("{}")
    expect(tmp_path, "no weights: wanted model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    expect(tmp_path, "only pytorch_model.bin, a pickle")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    expect(tmp_path, "no model_type")
    (tmp_path / "config.json").unlink()
    expect(tmp_path, "config.json: missing")


def test_unknown_tensor(folder: Path) -> None:
    with pytest.raises(UserError, match="there is no tensor nope"):
        Checkpoint(folder).read(["a.weight", "nope"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2])
def test_values_that_are_not_finite_are_counted(dtype: torch.dtype) -> None:
    tensor = torch.ones(5, 5)
    check_finite("w", tensor.to(dtype))
    check_finite("w", torch.ones(3, dtype=torch.int32))
    tensor[1, 2], tensor[3, 3], tensor[4, 4] = float("nan"), float("inf"), float("-inf")
    with pytest.raises(UserError, match="w: 3 of 25 values are NaN or infinite"):
        check_finite("w", tensor.to(dtype))
