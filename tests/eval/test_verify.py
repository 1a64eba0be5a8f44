"""Verification in a fresh process: passes for the model that was meant, fails with figures for any other."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compress.errors import VerificationError
from compress.eval import loading, stock
from compress.eval.verify import compare_logits, find_tolerance, verify

IDS = torch.arange(64).reshape(2, 32)


@pytest.fixture
def meant(model: Any) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS).logits
    return logits


def change_weight(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the seconds that a fresh process takes: what it does is done here."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder, probe, out, _, dtype, _, _ = command[3:]
        try:
            model, weights = stock.load_model(folder, dtype)
        except Exception as error:  # noqa: BLE001  whatever it is, a script would end with 1 and print it
            return subprocess.CompletedProcess(command, 1, "", str(error))
        stock.write_logits(model, probe, out, {**weights, "versions": {}})
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr("compress.eval.verify.subprocess.run", run)


def test_the_meant_model_passes(folder: Path, meant: torch.Tensor) -> None:
    result = verify(folder, IDS, meant, dtype="float32")
    assert result["passed"]
    assert result["relative_rms"] <= 1e-5
    assert result["top1_agreement"] == 1.0
    assert result["tokens"] == 64
    assert result["checked_with"] == "transformers, in a process without compress"
    assert {"torch", "transformers"} <= set(result["versions"])
    json.dumps(result, allow_nan=False)


@pytest.mark.usefixtures("in_process")
def test_one_wrong_row_of_one_layer_fails(folder: Path, meant: torch.Tensor, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    change_weight(wrong, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"][3].mul_(-1))
    with pytest.raises(
        VerificationError, match=r"relative RMS 0\.\d+, wanted at most 0\.0001; .* KL .* over 64 tokens"
    ):
        verify(wrong, IDS, meant, dtype="float32")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"),
            "finds 1 missing keys: model.layers.0.mlp.up",
        ),
        (lambda tensors: tensors.update(qweight=torch.zeros(1)), "finds 1 unexpected keys: qweight"),
    ],
)
@pytest.mark.usefixtures("in_process")
def test_weights_that_have_no_place_fail(
    folder: Path, meant: torch.Tensor, tmp_path: Path, change: Any, message: str
) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    change_weight(wrong, change)
    with pytest.raises(VerificationError, match=message):
        verify(wrong, IDS, meant, dtype="float32")


@pytest.mark.usefixtures("in_process")
def test_a_folder_that_does_not_load_fails(folder: Path, meant: torch.Tensor, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    (wrong / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(VerificationError, match="stock Transformers can't load it"):
        verify(wrong, IDS, meant, dtype="float32")


@pytest.mark.usefixtures("in_process")
def test_a_nan_fails(folder: Path, meant: torch.Tensor) -> None:
    meant[0, 0, 0] = torch.nan
    with pytest.raises(VerificationError, match="relative RMS nan"):
        verify(folder, IDS, meant, dtype="float32")


def test_figures_by_hand() -> None:
    meant = torch.tensor([[[1.0, -1.0], [3.0, 1.0]]])  # 1 from its mean everywhere
    got = meant + torch.tensor([[[0.3, 0.0], [0.0, 0.4]]])
    figures = compare_logits(got, meant)
    assert figures["relative_rms"] == pytest.approx(0.25)  # sqrt((0.09 + 0.16) / 4)
    assert figures["max_error"] == pytest.approx(0.4)
    assert figures["top1_agreement"] == 1.0
    assert compare_logits(meant + 5, meant)["kl"] == pytest.approx(0, abs=1e-6)
    with pytest.raises(VerificationError, match=r"gives logits \(1, 1, 2\); wanted \(1, 2, 2\)"):
        compare_logits(got[:, :1], meant)


def test_the_stock_script_imports_nothing_of_ours() -> None:
    tree = ast.parse(Path(stock.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [name for name in imported if name.split(".")[0] == "compress"]


def write_config(folder: Path, method: str | None) -> Path:
    config = {} if method is None else {"quantization_config": {"quant_method": method}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_who_can_load_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.why_not_stock(write_config(tmp_path, None)) is None
    assert loading.why_not_stock(write_config(tmp_path, "bitsandbytes")) is None  # not a format of ours
    assert "native format" in str(loading.why_not_stock(write_config(tmp_path, "compress")))
    monkeypatch.setattr(loading, "missing_packages", lambda packages: list(packages))
    assert loading.why_not_stock(write_config(tmp_path, "gptq")) == "optimum and gptqmodel not installed"
    monkeypatch.setattr(loading, "missing_packages", lambda packages: [])
    assert loading.why_not_stock(write_config(tmp_path, "compressed-tensors")) is None


def test_packages_with_kernels_of_their_own_are_given_more_room(tmp_path: Path) -> None:
    assert find_tolerance(write_config(tmp_path, "compressed-tensors"), "bfloat16", stock_loads=True) == 2e-2
    assert find_tolerance(write_config(tmp_path, "gptq"), "bfloat16", stock_loads=False) == 2e-2
    assert find_tolerance(write_config(tmp_path, "gptq"), "bfloat16", stock_loads=True) == 1e-1
    assert find_tolerance(write_config(tmp_path, "bitsandbytes"), "float32", stock_loads=True) == 3e-2
    assert find_tolerance(write_config(tmp_path, "bitsandbytes"), "float32", stock_loads=False) == 1e-4


def test_missing_packages() -> None:
    assert loading.missing_packages(("torch", "compressed-tensors", "no-such-package")) == ["no-such-package"]
