"""The writer: whole or absent, whatever happens, and one run at a time."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.storage.files
from compress.errors import UserError
from compress.storage.checkpoint import Checkpoint
from compress.storage.writer import MARK, Writer, list_companions

UNITS = ("block 0", "block 1", "outside")
CONFIG = {"model_type": "llama"}


def tensors(unit: str, value: float = 1.0) -> dict[str, torch.Tensor]:
    return {f"{unit.replace(' ', '.')}.weight": torch.full((4, 4), value)}


def write_all(output: Path, digest: str = "one", value: float = 1.0, **options: Any) -> Path:
    with Writer(output, UNITS, digest, **options) as writer:
        for unit in UNITS:
            writer.write(unit, tensors(unit, value), {"unit": unit})
        writer.stage(CONFIG)
        return writer.finish({"report.json": {"value": value}})


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("prefix", ["model", "compress"])
def test_a_finished_folder(tmp_path: Path, prefix: str) -> None:
    output = write_all(tmp_path / "out", prefix=prefix)
    shards = [f"{prefix}-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = f"{prefix}.safetensors.index.json"
    assert listing(tmp_path) == {
        "out",
        *(f"out/{name}" for name in (*shards, index, "config.json", "report.json", MARK)),
    }
    assert not any(path.is_symlink() for path in output.iterdir())
    checkpoint = Checkpoint(output)
    checkpoint.check()
    assert json.loads((output / index).read_text())["metadata"]["total_size"] == checkpoint.nbytes == 3 * 64
    assert json.loads((output / "report.json").read_text()) == {"value": 1.0}


def test_an_unfinished_folder_never_loads_and_goes_on(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Writer(output, UNITS, "one") as writer:
        writer.write("block 0", tensors("block 0"), {"seconds": 3})
        assert not output.exists()
    for folder in (output, tmp_path / "out.partial"):
        with pytest.raises(UserError):
            Checkpoint(folder).check()
    with Writer(output, UNITS, "one") as writer:
        assert [writer.has(unit) for unit in UNITS] == [True, False, False]
        assert writer.sidecar("block 0") == {"seconds": 3}
        with pytest.raises(AssertionError, match="not written yet"):
            writer.stage(CONFIG)
        for unit in UNITS[1:]:
            writer.write(unit, tensors(unit), {})
        staged = writer.stage(CONFIG)
        Checkpoint(staged).check()
        assert not (tmp_path / "out.partial" / "config.json").exists()
        writer.finish()
    Checkpoint(output).check()


def test_a_different_run_is_refused_unless_fresh(tmp_path: Path) -> None:
    output = tmp_path / "out"
    with Writer(output, UNITS, "one", about={"bits": 4, "model": "m"}) as writer:
        writer.write("block 0", tensors("block 0"), {})
    with pytest.raises(UserError, match=r"bits: 4 there, 3 here.*--fresh"):
        Writer(output, UNITS, "two", about={"bits": 3, "model": "m"})
    with pytest.raises(UserError, match="another recipe"):
        Writer(output, UNITS[:2], "one")
    with Writer(output, UNITS, "two", fresh=True) as writer:
        assert not any(writer.has(unit) for unit in UNITS)
        assert listing(tmp_path / "out.partial") == {"work", "work/pid", "work/run.json"}


def test_a_previous_result_stays_until_the_end(tmp_path: Path) -> None:
    output = write_all(tmp_path / "out", value=1.0)
    with Writer(output, UNITS, "two") as writer:
        for unit in UNITS:
            writer.write(unit, tensors(unit, 2.0), {})
        writer.stage(CONFIG)
        assert Checkpoint(output).read(["outside.weight"])["outside.weight"][0, 0] == 1
        writer.finish()
    assert Checkpoint(output).read(["outside.weight"])["outside.weight"][0, 0] == 2
    assert listing(tmp_path) == {"out", *(f"out/{path.name}" for path in output.iterdir())}


def test_killed_between_the_two_renames(tmp_path: Path) -> None:
    output = write_all(tmp_path / "out")
    os.replace(output, tmp_path / "out.previous")
    with Writer(output, UNITS, "two"):
        Checkpoint(output).check()
    assert not (tmp_path / "out.previous").exists()
    shutil.copytree(output, tmp_path / "out.previous")  # killed just after them
    with Writer(output, UNITS, "two", fresh=True):
        assert not (tmp_path / "out.previous").exists()


def test_foreign_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="not written by compress"):
        Writer(tmp_path / "mine", UNITS, "one")
    with pytest.raises(UserError, match="not a folder"):
        Writer(tmp_path / "file", UNITS, "one")
    write_all(tmp_path / "empty")
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.txt").write_text("years")
    with pytest.raises(UserError, match="no unfinished run"):
        Writer(tmp_path / "other", UNITS, "one")
    assert (tmp_path / "mine" / "thesis.txt").exists() and (tmp_path / "other.partial" / "thesis.txt").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no folder locks on Windows")
def test_two_runs_at_once(tmp_path: Path) -> None:
    with (
        Writer(tmp_path / "out", UNITS, "one") as writer,
        pytest.raises(UserError, match=f"another run is writing there \\(process {os.getpid()}\\)"),
    ):
        Writer(tmp_path / "out", UNITS, "one", fresh=True)
    writer.close()
    write_all(tmp_path / "out")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = write_all(tmp_path / "out")

    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Writer(output, UNITS, "two") as writer:
        writer.write("block 0", tensors("block 0"), {})
        with monkeypatch.context() as patch:
            patch.setattr(compress.storage.files.os, "fsync", refuse)
            with pytest.raises(UserError, match=r"disk is full: \d+ bytes needed, \d+ free"):
                writer.write("block 1", tensors("block 1"), {})
        assert [writer.has(unit) for unit in UNITS] == [True, False, False]
        assert not list(tmp_path.rglob("*.tmp"))
    Checkpoint(output).check()
    with pytest.raises(UserError, match="too little space: 1000000000000000000 bytes needed"):
        Writer(tmp_path / "big", UNITS, "one", needed_bytes=10**18)
    assert not (tmp_path / "big").exists()


KILLED = """
import os, signal, sys
import torch
import compress.storage.files as files
import compress.storage.writer as module
sys.path.insert(0, sys.argv[1])
import test_writer
calls = 0
replace = os.replace
def count(*args):
    global calls
    calls += 1
    if calls == int(sys.argv[3]):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*args)
os.replace = count
from pathlib import Path
test_writer.write_all(Path(sys.argv[2]), "two", 2.0)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("at", [3, 13, 16, 17])
def test_killed_at_any_rename(tmp_path: Path, at: int) -> None:
    """Before each kind of rename; then either the old result or the new one is whole, and the same run completes."""
    output = write_all(tmp_path / "out", value=1.0)
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(output), str(at)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    standing = output if output.exists() else tmp_path / "out.previous"
    assert Checkpoint(standing).read(["outside.weight"])["outside.weight"][0, 0] == 1
    with Writer(output, UNITS, "two") as writer:
        assert Checkpoint(output).read(["outside.weight"])["outside.weight"][0, 0] == 1
        for unit in UNITS:
            if not writer.has(unit):
                writer.write(unit, tensors(unit, 2.0), {"unit": unit})
        writer.stage(CONFIG)
        writer.finish({"report.json": {"value": 2.0}})
    assert all(tensor[0, 0] == 2 for tensor in Checkpoint(output).read(Checkpoint(output).headers).values())
    once = write_all(tmp_path / "once", "two", 2.0)
    for path in once.iterdir():
        assert (output / path.name).read_bytes() == path.read_bytes()
    assert listing(output) == listing(once)


def test_companions(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    kept = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "merges.txt",
        "LICENSE",
        "generation_config.json",
    ]
    for name in (*kept, "model.safetensors", "config.json", "modeling_x.py", "README.md", "pytorch_model.bin"):
        (source / name).write_text(name)
    assert sorted(path.name for path in list_companions(source)) == sorted(kept)
    assert "modeling_x.py" in [path.name for path in list_companions(source, trust_remote_code=True)]
    with Writer(tmp_path / "out", ["outside"], "one") as writer:
        writer.write("outside", {"x": torch.zeros(1)}, {})
        writer.stage(CONFIG, list_companions(source))
        output = writer.finish()
    assert all((output / name).read_text() == name for name in kept)
