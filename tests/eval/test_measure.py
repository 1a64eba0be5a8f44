"""compress.evaluate on folders and objects, in this process and in a fresh one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.errors import NumericsError, UserError
from compress.eval import worker
from compress.eval.measure import evaluate
from compress.eval.process import evaluate_folder, measure_resident, run_worker

SHORT: dict[str, Any] = {"windows": 2, "tokens": 32}


def test_a_folder_against_another(folder: Path, other_folder: Path, text_file: Path) -> None:
    result = evaluate(other_folder, text_file, against=folder, **SHORT)
    alone = evaluate(folder, text_file, **SHORT)
    assert result["dense"] == {"perplexity": alone["perplexity"], "bytes": alone["bytes"]}
    assert alone["dense"] is alone["kl"] is alone["top1_agreement"] is None
    assert result["kl"] > 0.1
    assert 0 <= result["top1_agreement"] < 0.9
    assert result["bytes"] == (other_folder / "model.safetensors").stat().st_size
    assert result["bits_per_weight"] == 8 * result["bytes"] / result["parameters"]
    assert result["loaded_with"] == "transformers"
    protocol = result["protocol"]
    assert (protocol["corpus"], protocol["part"], protocol["bos"]) == (str(text_file), "test", "none")
    assert (protocol["tokens"], protocol["stride"], protocol["predicted_tokens"]) == (32, 32, 62)
    assert (protocol["dtype"], protocol["device"]) == ("float32", "cpu")
    json.dumps(result, allow_nan=False)


def test_objects_in_memory_give_the_same(
    folder: Path, model: Any, other: Any, other_folder: Path, tokenizer: Any, text_file: Path
) -> None:
    other.train()
    result = evaluate(other, text_file, against=model, tokenizer=tokenizer, **SHORT)
    assert other.training  # left as it was found
    other.eval()
    on_disk = evaluate(other_folder, text_file, against=folder, **SHORT)
    for key in ("perplexity", "kl", "top1_agreement", "parameters"):
        assert result[key] == on_disk[key], key
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert result["bytes"] == 4 * result["parameters"] + sum(4 * buffer.numel() for buffer in other.buffers())


def test_dtype_is_the_forwards(folder: Path, text_file: Path) -> None:
    assert evaluate(folder, text_file, dtype="bfloat16", **SHORT)["protocol"]["dtype"] == "bfloat16"


def test_pydoc_is_the_default(folder: Path) -> None:
    assert evaluate(folder, windows=1, tokens=16)["protocol"]["corpus"] == "pydoc"


def test_mistakes_are_told(folder: Path, model: Any, text_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no tokenizer with it"):
        evaluate(model, text_file, **SHORT)
    with pytest.raises(UserError, match="windows of 512 tokens are longer than the 256 that the model takes"):
        evaluate(folder, text_file, windows=1, tokens=512)
    with pytest.raises(UserError, match=r"config\.json: can't be read"):
        evaluate(tmp_path, text_file, tokenizer=object_tokenizer(folder), **SHORT)
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare / name)
    with pytest.raises(UserError, match=r"no tokenizer can be loaded from it"):
        evaluate(bare, text_file, **SHORT)


def object_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_folder_that_lacks_weights_is_not_measured(folder: Path, text_file: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 weights of the model are not in its files: model\.layers\.1\.mlp\.up_proj"):
        evaluate(broken, text_file, **SHORT)


def test_a_fresh_process_gives_the_same_and_tells_progress(folder: Path, other_folder: Path, text_file: Path) -> None:
    seen: list[dict[str, Any]] = []
    result = evaluate_folder(other_folder, seen.append, corpus=str(text_file), against=str(folder), **SHORT)
    here = evaluate(other_folder, text_file, against=folder, **SHORT)
    del result["seconds"], here["seconds"]
    assert result == here
    assert [(line["done"], line["total"]) for line in seen] == [(1, 2), (2, 2)]


def test_resident_memory_of_a_loaded_folder(folder: Path) -> None:
    assert 0 < measure_resident(folder) < 2**30


@pytest.mark.parametrize("kind", [UserError, NumericsError])
def test_a_worker_writes_its_error(tmp_path: Path, kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> dict[str, Any]:
        raise kind("the reason")

    monkeypatch.setitem(worker.TASKS, "evaluate", fail)
    request, result = tmp_path / "request.json", tmp_path / "result.json"
    request.write_text(json.dumps({"task": "evaluate", "arguments": {}, "result": str(result)}))
    assert worker.main(str(request)) == 0
    assert json.loads(result.read_text()) == {"error": kind.__name__, "message": "the reason"}


def test_errors_come_back_as_they_were(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no weights"):
        run_worker("logits", {"folder": str(tmp_path), "probe": "", "out": "", "dtype": "auto"})


def test_a_process_without_an_answer_is_an_error() -> None:
    with pytest.raises(
        RuntimeError, match=r"the process for 'no such task' ended with code 1 and no result:\n(?s:.*)KeyError"
    ):
        run_worker("no such task", {})
