"""Speed and memory of tiny models: what is timed, what is counted, and ``compress bench`` from folder to JSON."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from compress import bench, cli
from compress.errors import UserError
from compress.eval import speed
from compress.eval.speed import Workload, count_read_bytes, measure_model, time_decode, time_prefill

SMALL = Workload(prefill_tokens=24, prompt_tokens=8, decode_tokens=5, repeats=2)
IDS = torch.arange(40)
SHORT = ("--prefill", "24", "--prompt", "8", "--decode", "5", "--repeats", "1", "--threads", "1")


def watch_calls(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Tokens of each forward and whether it kept a cache; the clock stands still but for 1 s per token and forward."""
    calls: list[tuple[int, bool]] = []
    forward = type(model).forward

    def spy(self: Any, *arguments: Any, input_ids: Any = None, logits_to_keep: Any = 0, **options: Any) -> Any:
        calls.append((input_ids.shape[1], bool(options.get("use_cache"))))
        return forward(self, *arguments, input_ids=input_ids, logits_to_keep=logits_to_keep, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    clock = SimpleNamespace(perf_counter=lambda: float(sum(tokens for tokens, _ in calls)))
    monkeypatch.setattr(speed, "time", clock)
    return calls


def test_decode_times_the_tokens_after_the_first(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(model, monkeypatch)
    assert time_decode(model, IDS[None, :8], 5) == 1.0
    assert [tokens for tokens, _ in calls] == [8, 1, 1, 1, 1, 1]


def test_decode_goes_on_at_the_models_own_last_token(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    always = int(model.generate(IDS[None, :8], max_new_tokens=1, do_sample=False)[0, -1])
    monkeypatch.setattr(model.generation_config, "eos_token_id", always)
    calls = watch_calls(model, monkeypatch)
    time_decode(model, IDS[None, :8], 5)
    assert len(calls) == 6


def test_prefill_is_one_forward_with_the_last_logits(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(model, monkeypatch)
    assert time_prefill(model, IDS[None, :24]) == 24.0
    assert calls == [(24, True)]


def test_figures_are_medians_of_the_repeats(model: Any) -> None:
    found = measure_model(model, IDS, SMALL)
    assert len(found["prefill_seconds"]) == len(found["decode_seconds_per_token"]) == 2
    assert found["prefill_tokens_per_second"] == pytest.approx(24 / (sum(found["prefill_seconds"]) / 2))
    assert found["decode_tokens_per_second"] == pytest.approx(2 / sum(found["decode_seconds_per_token"]))
    assert found["logits"] == "last"


@pytest.mark.parametrize(
    "workload", [Workload(300, 8, 5), Workload(24, 200, 56)], ids=["prefill too long", "decode too long"]
)
def test_longer_than_the_model_takes(workload: Workload) -> None:
    with pytest.raises(UserError, match="the model takes 256 tokens"):
        workload.check_length(256)
    Workload(256, 200, 55).check_length(256)
    workload.check_length(None)


def test_numbers_that_cannot_be() -> None:
    with pytest.raises(UserError, match="decode_tokens must be at least 1, got 0"):
        Workload(decode_tokens=0)


def test_a_token_reads_everything_but_an_untied_embedding(model: Any) -> None:
    parameters = sum(tensor.nbytes for tensor in model.parameters())
    buffers = sum(tensor.nbytes for tensor in {id(one): one for one in model.buffers()}.values())
    tied = count_read_bytes(model)
    assert tied == parameters + buffers
    config = LlamaConfig(**{**model.config.to_dict(), "tie_word_embeddings": False})
    untied = LlamaForCausalLM(config)
    assert count_read_bytes(untied) == tied  # a head more, an embedding less


def test_what_a_token_reads_of_a_mixture_is_not_known() -> None:
    config = MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    assert count_read_bytes(MixtralForCausalLM(config)) is None


def test_bandwidth_is_the_best_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([0.5] * 2 + [0.25, 0.125] + [1.0] * 2)
    monkeypatch.setattr(speed, "_time", lambda call: (call(), next(seconds))[1])
    found = speed.measure_bandwidth(1 << 20, repeats=1)
    assert found["bytes_per_second"] == (1 << 20) / 0.125
    assert found["probe"].startswith("sum of float32, 1048576 bytes")


def test_a_folder_with_what_its_loading_took(folder: Path) -> None:
    found = speed.measure_folder(str(folder), IDS.tolist(), vars(SMALL), "stock")
    assert found["load_seconds"] > 0 and found["resident_bytes"] >= 0
    assert (found["dtype"], found["loaded_with"]) == ("float32", "transformers")
    assert found["threads"] == torch.get_num_threads()
    assert found["weight_bytes"] == found["read_bytes_per_token"]  # tied
    dense = speed.measure_folder(str(folder), IDS.tolist(), vars(SMALL), "random", dtype="bfloat16")
    assert dense["load_seconds"] is None and dense["dtype"] == "bfloat16"
    assert abs(2 * dense["read_bytes_per_token"] - found["read_bytes_per_token"]) < 100  # rotary frequencies stay


@pytest.mark.slow
def test_bench_from_folder_to_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SHORT, "--rounds", "1", "--json"]
    assert cli.main(["bench", str(folder), *words, str(tmp_path / "bench.json")]) == 0
    found = json.loads((tmp_path / "bench.json").read_text())
    for side in ("dense", "compressed"):
        one = found[side]
        assert one["decode_tokens_per_second"] > 0 and one["prefill_tokens_per_second"] > 0
        assert one["resident_bytes"] > 0 and one["bandwidth_share"] > 0
        assert [run["threads"] for run in one["rounds"]] == [1]
    assert found["dense"]["read_bytes_per_token"] == found["compressed"]["read_bytes_per_token"]
    assert found["dense"]["load_seconds"] is None and found["compressed"]["load_seconds"] > 0
    assert "random weights" in found["dense"]["loaded_with"]
    assert found["workload"] == {
        "prefill_tokens": 24, "prompt_tokens": 8, "decode_tokens": 5, "repeats": 1, "rounds": 1, "batch": 1,
    }  # fmt: skip
    printed = capsys.readouterr().out
    assert "decode, tokens/s (5 tokens)" in printed and "pydoc, test part" in printed


def test_bench_tells_mistakes(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert cli.main(["bench", str(tmp_path / "empty")]) == 2
    assert "config.json" in capsys.readouterr().err
    assert cli.main(["bench", str(folder), *SHORT, "--prefill", "300"]) == 2
    assert "the model takes 256 tokens" in capsys.readouterr().err
    with pytest.raises(UserError, match="rounds must be at least 1"):
        bench.bench(folder, rounds=0)


def test_a_folder_without_tokenizer_runs_on_random_tokens(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    ids, text = bench.cut_text(tmp_path, SMALL)
    assert len(ids) == 24 and set(ids) <= set(range(300)) and "no tokenizer" in text


def test_a_side_is_the_median_of_its_rounds() -> None:
    run = dict.fromkeys(bench.FIGURES, 1.0) | {"loaded_with": "x", "dtype": "y", "threads": 1, "logits": "last"}
    runs = [{**run, "decode_tokens_per_second": speed, "read_bytes_per_token": None} for speed in (1.0, 5.0, 2.0)]
    found = bench.summarize(runs, 100.0)
    assert found["decode_tokens_per_second"] == 2.0
    assert found["read_bytes_per_token"] is found["bandwidth_share"] is None
    assert [one["decode_tokens_per_second"] for one in found["rounds"]] == [1.0, 5.0, 2.0]


def test_the_table_says_where_it_is_slower() -> None:
    def side(decode: float, prefill: float) -> dict[str, Any]:
        run = {
            "decode_tokens_per_second": decode, "prefill_tokens_per_second": prefill, "load_seconds": 1.0,
            "resident_bytes": 10, "weight_bytes": 10, "read_bytes_per_token": 10, "loaded_with": "x",
            "dtype": "bfloat16", "threads": 2, "logits": "last",
        }  # fmt: skip
        return bench.summarize([run], 1000.0)

    sides = {"dense": side(10.0, 100.0), "compressed": side(20.0, 90.0)}
    ratio = {name: bench.divide(sides["compressed"][name], sides["dense"][name]) for name in bench.FIGURES}
    work = {**vars(SMALL), "rounds": 1}
    bandwidth = {"bytes_per_second": 1000.0, "probe": "probe"}
    found = {**sides, "ratio": ratio, "workload": work, "text": "text", "bandwidth": bandwidth}
    text = bench.render(found)
    assert sides["compressed"]["bandwidth_share"] == 0.2
    assert "SLOWER than dense: prefill" in text and "2.00x" in text and "0.90x" in text
