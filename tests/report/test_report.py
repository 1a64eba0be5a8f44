"""The report: its keys, its arithmetic, no NaN on disk, and the page that is drawn from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from compress.report.build import build_report, list_fallbacks, mean_bits
from compress.report.table import render_text
from compress.report.write import clean, write_json
from compress.types import LayerReport

# What the report must have at least.
KEYS = {"dense", "compressed", "protocol", "untouched_share", "layers", "seconds", "peak_bytes", "versions"}
LAYER_KEYS = {"name", "method", "output_error", "seconds", "fallback"}


def make_layer(name: str, error: float | None, shape: tuple[int, int] = (8, 8), **more: Any) -> LayerReport:
    defaults: dict[str, Any] = {"bits_per_weight": 4.25, "seconds": 1.5}
    return LayerReport(name, shape, "gptq", 0.01, error, **{**defaults, **more})


def make_plan() -> dict[str, Any]:
    return {
        "recipe": {"steps": [{"method": "gptq", "bits": 4}]},
        "recipe_digest": "d" * 64,
        "model": "tiny",
        "untouched_share": 0.25,
        "untouched": [
            {"reason": "embedding", "parameters": 20, "share": 0.2},
            {"reason": "norm", "parameters": 5, "share": 0.05},
        ],
        "layers": [],
        "adjusted": {"model.layers.0.b": "group_size 48 instead of 64"},
        "skipped": {},
        "bytes_after": 90,
    }


def make_evaluation() -> dict[str, Any]:
    protocol = {
        "corpus": "pydoc",
        "part": "test",
        "sha256": "a" * 64,
        "windows": 16,
        "tokens": 2048,
        "stride": 2048,
        "selection": "first",
        "bos": "none",
        "predicted_tokens": 32752,
        "dtype": "bfloat16",
        "device": "cpu",
    }
    return {
        "perplexity": 22.0,
        "kl": 0.05,
        "top1_agreement": 0.9,
        "bytes": 100,
        "parameters": 200,
        "bits_per_weight": 4.0,
        "dense": {"perplexity": 20.0, "bytes": 400},
        "protocol": protocol,
        "loaded_with": "transformers",
        "seconds": 9.0,
    }


def make_report(**changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "plan": make_plan(),
        "layers": [make_layer("model.layers.0.a", 0.001), make_layer("model.layers.0.b", 0.5, fallback="damping 10%")],
        "dense_bytes": 400,
        "compressed_bytes": 100,
        "seconds": 61.4,
        "peak_bytes": 1_100_000_000,
        "evaluation": make_evaluation(),
        "verification": {"passed": True, "relative_rms": 0.004, "tolerance": 0.02, "checked_with": "transformers"},
    }
    return build_report(**{**arguments, **changes})


def test_bits_of_the_blocks_and_of_embedding_and_head_are_told_apart() -> None:
    layers = [make_layer("a", 0.1), make_layer("b", 0.1, (8, 24)), make_layer("embed", 0.1, bits_per_weight=8.5)]
    report = make_report(plan={**make_plan(), "head": {"layers": ["embed"]}}, layers=layers)
    assert report["compressed"]["bits_per_weight"] == 4.25
    assert report["compressed"]["bits_per_weight_head"] == 8.5
    assert "embedding and output head" in render_text(report)
    plain = make_report()
    assert plain["compressed"]["bits_per_weight_head"] is None
    assert "embedding and output head" not in render_text(plain)


def test_the_keys_that_readers_count_on() -> None:
    report = make_report()
    assert set(report) >= KEYS
    assert report["dense"]["perplexity"] == 20.0
    assert report["dense"]["bytes"] == 400
    compressed = report["compressed"]
    got = [compressed[key] for key in ("perplexity", "bytes", "kl", "top1_agreement", "bits_per_weight")]
    assert got == [22.0, 100, 0.05, 0.9, 4.25]
    assert all(set(layer) >= LAYER_KEYS for layer in report["layers"])
    assert report["untouched_share"] == 0.25
    assert report["versions"]["torch"]
    assert report["machine"]["cores"] >= 1
    assert report["digest"] == "d" * 64
    assert "recipe" not in report["plan"]
    assert report["protocol"]["calibration"] is None
    texts = {"calibration": {"corpus": "pydoc"}, "probe": "random tokens"}
    assert make_report(calibration=texts)["protocol"] == {**report["protocol"], **texts}


def test_bits_are_weighed_by_size() -> None:
    rows = [{"shape": (1, 30), "bits_per_weight": 4.0}, {"shape": [2, 5], "bits_per_weight": 8.0}]
    assert mean_bits(rows) == pytest.approx(5.0)
    assert mean_bits([]) is None


def test_every_fallback_is_listed() -> None:
    plan = {**make_plan(), "skipped": {"x": "7 does not divide"}}
    rows = [{"name": "y", "fallback": "damping 10%"}, {"name": "z", "fallback": None}]
    assert list_fallbacks(plan, rows) == [
        {"name": "model.layers.0.b", "fallback": "group_size 48 instead of 64"},
        {"name": "x", "fallback": "left as it is: 7 does not divide"},
        {"name": "y", "fallback": "damping 10%"},
    ]


def test_no_nan_reaches_the_disk(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    layers = [make_layer("a", math.nan, shape := (8, 8), notes={"ladder": (0.01, math.inf)})]
    write_json(path, make_report(layers=layers))
    report = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} in JSON"))
    assert report["layers"][0]["output_error"] is None
    assert report["layers"][0]["notes"] == {"ladder": [0.01, None]}
    assert report["layers"][0]["shape"] == list(shape)
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_what_is_not_plain_data_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError, match="plain data; got object"):
        write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["report.json"]


def test_clean_keeps_what_is_plain() -> None:
    assert clean({1: (True, 2, "x", None), "p": Path("a/b"), "s": {"b", "a"}}) == {
        "1": [True, 2, "x", None],
        "p": "a/b",
        "s": ["a", "b"],
    }


def test_the_page_shows_numbers_with_their_protocol() -> None:
    calibration = {**make_evaluation()["protocol"], "part": "calibration", "selection": "random, seed 3"}
    page = render_text(make_report(calibration={"calibration": calibration}), width=200)
    for words in (
        "perplexity",
        "1.100x",
        "0.250x",
        "pydoc (test part, sha256 aaaaaaaaaaaa), 16 windows of 2048 (first), stride 2048, BOS none",
        "32752 predicted tokens",
        "bfloat16 on cpu",
        "calibration: pydoc (calibration part, sha256 aaaaaaaaaaaa), 16 windows of 2048 (random, seed 3)",
        "untouched: 25.00% of the parameters (20.00% embedding; 5.00% norm)",
        "reload: logits agree to 0.004 relative RMS (at most 0.02); checked with transformers",
        "took 61 s; largest resident memory 1.10 GB",
        "fallbacks (2):",
        "model.layers.0.b: group_size 48 instead of 64",
    ):
        assert words in page, words
    assert page.index("5.00e-01") < page.index("1.00e-03")  # the worst layer first


def test_the_page_of_a_run_that_measured_nothing() -> None:
    layers = [make_layer("[odd] name", None)]
    page = render_text(
        make_report(evaluation=None, verification=None, layers=layers, plan={**make_plan(), "adjusted": {}})
    )
    assert "not measured" in page
    assert "reload: not checked" in page
    assert "fallbacks" not in page
