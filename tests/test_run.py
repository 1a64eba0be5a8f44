"""The loop from a recipe to a folder: what is written, what a killed run leaves, and what bad input costs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress.errors import NumericsError, UserError, VerificationError
from compress.storage.checkpoint import Checkpoint


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process that reloads the result: for tests of something else, since it takes seconds."""
    monkeypatch.setattr("compress.finish.verify", lambda *args, **kwargs: {"passed": True, "checked_with": "a test"})


SMALL = {"calibration": {"samples": 3, "tokens": 64}, "eval": None}


def make_recipe(method: str = "gptq", format: str = "dense", **settings: Any) -> dict[str, Any]:
    """One step in groups of 32, a little calibration, nothing measured."""
    return {**SMALL, "steps": [{"method": method, "group_size": 32, **settings}], "format": format}


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.headers)


def assert_same_files(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.safetensors"))
    assert names
    assert names == sorted(path.name for path in other.glob("*.safetensors"))
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_gptq_writes_a_folder_that_stock_transformers_loads_and_a_whole_report(llama: Path, tmp_path: Path) -> None:
    recipe = {**make_recipe(format="compressed-tensors"), "eval": {"windows": 2, "tokens": 64}}
    result = compress.run(recipe, llama, output=tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report == result.report
    assert report["verification"]["passed"]
    assert "without compress" in report["verification"]["checked_with"]
    assert report["compressed"]["bytes"] < report["dense"]["bytes"]
    assert report["compressed"]["perplexity"] > 1
    assert report["compressed"]["kl"] > 0
    assert 0 < report["compressed"]["top1_agreement"] <= 1
    assert len(report["layers"]) == 3 * 7
    assert all(layer["tokens"] == 3 * 64 and layer["fallback"] is None for layer in report["layers"])
    assert all(0 < layer["output_error"] < 0.1 for layer in report["layers"])
    assert {"dense", "compressed", "protocol", "untouched_share", "layers", "seconds", "peak_bytes", "versions"} <= set(
        report
    )
    shares = sum(layer["shape"][0] * layer["shape"][1] for layer in report["layers"])
    total = report["compressed"]["parameters"]
    assert report["untouched_share"] == pytest.approx(1 - shares / total)
    model = compress.load(tmp_path / "out")
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.usefixtures("unverified")
def test_bytes_and_bits_are_what_the_files_hold(llama: Path, tmp_path: Path) -> None:
    result = compress.run(make_recipe(format="compressed-tensors", bits=3), llama, output=tmp_path / "out")
    headers = Checkpoint(tmp_path / "out").headers
    names = [layer["name"] for layer in result.report["layers"]]
    held = sum(h.nbytes for key, h in headers.items() if any(key.startswith(name + ".") for name in names))
    weights = sum(layer["shape"][0] * layer["shape"][1] for layer in result.report["layers"])
    assert result.report["compressed"]["bits_per_weight"] == pytest.approx(8 * held / weights)
    assert result.plan.bytes_after == sum(header.nbytes for header in headers.values())


@pytest.mark.usefixtures("unverified")
def test_gptq_loses_less_than_rounding(llama: Path, tmp_path: Path) -> None:
    errors = {}
    for method, settings in (("rtn", {}), ("gptq", {"targets": "layer"})):
        recipe = {**make_recipe(method, bits=3, **settings), "calibration": {"samples": 8, "tokens": 256}}
        report = compress.run(recipe, llama, output=tmp_path / method).report
        errors[method] = sum(layer["output_error"] for layer in report["layers"])
    assert errors["gptq"] < 0.9 * errors["rtn"]


@pytest.mark.usefixtures("unverified")
def test_dense_format_holds_the_dequantized_weights_and_leaves_the_rest(llama: Path, tmp_path: Path) -> None:
    compress.run(make_recipe(), llama, output=tmp_path / "out")
    before, after = read_weights(llama), read_weights(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}


@pytest.mark.usefixtures("unverified")
def test_a_model_in_memory_gets_the_weights_that_a_folder_would(llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    smaller = compress.run(make_recipe(), model, tokenizer=AutoTokenizer.from_pretrained(llama))
    assert smaller is model
    assert len(model.compress_report["layers"]) == 21
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)
    compress.run(make_recipe(), llama, output=tmp_path / "out")
    written = read_weights(tmp_path / "out")
    for name, tensor in model.state_dict().items():
        if name in written:
            assert torch.equal(tensor, written[name]), name


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt2"])
def test_layers_that_stock_formats_do_not_carry_go_through_the_native_one(
    name: str, make_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = make_model_folder(name)
    with pytest.raises(UserError, match="native"):
        compress.run(make_recipe(format="compressed-tensors"), folder, output=tmp_path / "stock")
    result = compress.run(make_recipe(format="native"), folder, output=tmp_path / "out")
    assert result.report["verification"]["passed"]
    if name == "qwen3_moe":
        experts = [layer for layer in result.report["layers"] if ".experts." in layer["name"]]
        gates = [layer["tokens"] for layer in experts if layer["name"].endswith("gate_up_proj")]
        assert sum(gates) == 3 * 3 * 64 * 2, "each token of each block goes to two experts"
    assert compress.load(tmp_path / "out").generate(torch.tensor([[1, 2]]), max_new_tokens=2).shape == (1, 4)


@pytest.mark.usefixtures("unverified")
def test_native_folders_are_refused_by_stock_transformers(llama: Path, tmp_path: Path) -> None:
    compress.run(make_recipe("rtn", "native"), llama, output=tmp_path / "out")
    script = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    command = [sys.executable, "-I", "-c", script, str(tmp_path / "out")]  # a process that does not import us
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "no file named model.safetensors" in done.stderr


@pytest.mark.usefixtures("unverified")
def test_little_memory_gives_the_same_bytes(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from compress.plan import Plan

    compress.run(make_recipe(), llama, output=tmp_path / "suspend")
    monkeypatch.setattr(Plan, "suspend", property(lambda plan: False))
    compress.run(make_recipe(), llama, output=tmp_path / "rerun")
    assert_same_files(tmp_path / "suspend", tmp_path / "rerun")


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_a_layer_compressed_by_rows_is_the_layer_compressed_whole(
    method: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compress.run(make_recipe(method), llama, output=tmp_path / "whole")
    monkeypatch.setattr("compress.apply.CHUNK", 20 * 64)  # also layers that write to the residual stream are cut
    compress.run(make_recipe(method), llama, output=tmp_path / "rows")
    whole, rows = read_weights(tmp_path / "whole"), read_weights(tmp_path / "rows")
    for name, weight in whole.items():
        difference = (weight.float() - rows[name].float()).norm() / weight.float().norm()
        assert difference < (1e-6 if method == "rtn" else 0.05), name  # products of other shapes round differently


KILLED = """
import importlib, os, signal, sys
import compress
from compress.storage import writer
place, model, output = sys.argv[1:]
def die():
    os.kill(os.getpid(), signal.SIGKILL)
original = writer.Writer.write
def write(self, unit, tensors, sidecar):
    if place == "before a shard" and unit == self.units[1]:
        die()
    if place == "inside a shard" and unit == self.units[1]:
        (self.partial / (self.shard(unit) + ".tmp")).write_bytes(b"half")
        writer.write_json(self._sidecar_path(unit), dict(sidecar))
        die()
    size = original(self, unit, tensors, sidecar)
    if place == "after a shard" and unit == self.units[1] or place == "after the last" and unit == self.units[-1]:
        die()
    return size
writer.Writer.write = write
finish = importlib.import_module("compress.finish")
finish.verify = lambda *args, **kwargs: {"passed": True, "checked_with": "a test"}
if place == "before publishing":
    writer.Writer.finish = lambda self, files: die()
if __name__ == "__main__":
    compress.run({recipe!r}, model, output=output)
"""


@pytest.mark.parametrize(
    "place", ["before a shard", "inside a shard", "after a shard", "after the last", "before publishing"]
)
@pytest.mark.usefixtures("unverified")
def test_killed_anywhere_the_same_command_goes_on_and_gives_the_same_bytes(
    place: str, llama: Path, tmp_path: Path
) -> None:
    whole = tmp_path / "whole"
    compress.run(make_recipe(), llama, output=whole)
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{recipe!r}", repr(make_recipe())))
    out = tmp_path / "out"
    done = subprocess.run([sys.executable, script, place, llama, out], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert not (partial / "config.json").exists()
    assert not list(partial.glob("*.index.json"))
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.safetensors")}
    result = compress.run(make_recipe(), llama, output=out)
    assert_same_files(whole, out)
    kept = {path.name for path in out.glob("*.safetensors") if before.get(path.name) == path.stat().st_mtime_ns}
    assert kept == set(before), "finished blocks are not computed again"
    first = json.loads((whole / "report.json").read_text())
    strip = [{key: value for key, value in layer.items() if key != "seconds"} for layer in first["layers"]]
    assert [
        {key: value for key, value in layer.items() if key != "seconds"} for layer in result.report["layers"]
    ] == strip
    assert not partial.exists()


@pytest.mark.usefixtures("unverified")
def test_an_unfinished_run_of_another_recipe_is_not_mixed_in(llama: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.replace("{recipe!r}", repr(make_recipe())))
    subprocess.run([sys.executable, script, "after a shard", llama, tmp_path / "out"], capture_output=True)
    with pytest.raises(UserError, match="--fresh"):
        compress.run(make_recipe(bits=3), llama, output=tmp_path / "out")
    result = compress.run(make_recipe(bits=3), llama, output=tmp_path / "out", fresh=True)
    assert all(layer["bits_per_weight"] > 0 for layer in result.report["layers"])


def copy_model(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def change_tensor(folder: Path, name: str, value: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[3] = value
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(value: float, llama: Path, tmp_path: Path) -> None:
    broken = copy_model(llama, tmp_path / "broken")
    change_tensor(broken, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        compress.run(make_recipe("rtn"), broken, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_truncated_file_is_named_before_anything_is_done(llama: Path, tmp_path: Path) -> None:
    broken = copy_model(llama, tmp_path / "broken")
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        compress.run(make_recipe("rtn"), broken, output=tmp_path / "out")


def test_activations_that_overflow_are_named(llama: Path, tmp_path: Path) -> None:
    broken = copy_model(llama, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"):
        tensors[name].mul_(1e30)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NumericsError, match=r"model\.layers\.1"):
        compress.run(make_recipe(), broken, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_corpus_that_is_too_short_says_what_fits(llama: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("too short\n" * 40)
    recipe = {**make_recipe(), "calibration": {"corpus": str(text), "samples": 4, "tokens": 128}}
    with pytest.raises(UserError, match=r"samples=2"):
        compress.run(recipe, llama, output=tmp_path / "out")


@pytest.mark.usefixtures("unverified")
def test_a_failing_run_loses_nothing_of_an_earlier_result(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "out"
    compress.run(make_recipe("rtn"), llama, output=out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise VerificationError("differs")

    monkeypatch.setattr("compress.finish.verify", refuse)
    with pytest.raises(VerificationError):
        compress.run(make_recipe("rtn", bits=8), llama, output=out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_a_wrong_weight_in_the_written_folder_fails_the_run(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    from compress.storage.formats import compressed_tensors

    encode = compressed_tensors.encode

    def off_by_one(spec: Any, state: Any, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        tensors = encode(spec, state, dtype)
        if spec.name == "model.layers.2.mlp.down_proj":
            tensors["model.layers.2.mlp.down_proj.weight_scale"] *= 1.5
        return tensors

    monkeypatch.setattr(compressed_tensors, "encode", off_by_one)
    with pytest.raises(VerificationError, match="logits"):
        compress.run(make_recipe("rtn", "compressed-tensors"), llama, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_says_that_the_run_can_go_on(llama: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(json.dumps(make_recipe()))
    code = (
        "import sys, compress.run, compress.cli\n"
        "import importlib; run = importlib.import_module('compress.run'); block = run.compress_block\n"
        "def interrupted(skeleton, task, *rest):\n"
        "    if task.index == 1: raise KeyboardInterrupt\n"
        "    return block(skeleton, task, *rest)\n"
        "run.compress_block = interrupted\n"
        "sys.exit(compress.cli.main(sys.argv[1:]))\n"
    )
    command = ["--recipe", str(recipe), "--model", str(llama), "--output", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert done.returncode == 130
    assert "goes on" in done.stderr
    assert "Traceback" not in done.stderr
    again = subprocess.run([sys.executable, "-m", "compress", *command], capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    compress.run(make_recipe(), llama, output=tmp_path / "whole")
    assert_same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.usefixtures("unverified")
def test_a_full_disk_is_said_and_nothing_loads(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    import errno

    from compress.storage import files

    original = os.fsync

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="space"):
        compress.run(make_recipe("rtn"), llama, output=tmp_path / "out")
    monkeypatch.setattr(files.os, "fsync", original)
    assert not (tmp_path / "out").exists()
    compress.run(make_recipe("rtn"), llama, output=tmp_path / "out")
