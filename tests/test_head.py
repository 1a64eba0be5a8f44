"""Embedding and output head in a run: what is written and loads, what the report says, and that it can be resumed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PhiConfig, PretrainedConfig

import compress
import compress.head
from compress.block import BlockTask, Streams, compress_block
from compress.eval import corpus
from compress.eval.windows import cut_windows
from compress.head import cut_rows, round_rows
from compress.runtime.load import find_format, load_decoded, load_quantized
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import QuantSpec
from compress.walk.skeleton import Skeleton

NAMES = {True: ["model.embed_tokens"], False: ["lm_head", "model.embed_tokens"]}
LOUD = 5  # features of which the final norm makes ten times as much as of the others


@pytest.fixture
def unverified(monkeypatch: pytest.MonkeyPatch) -> None:
    """No second process that reloads the result: for tests of something else, since it takes seconds."""
    monkeypatch.setattr("compress.finish.verify", lambda *args, **kwargs: {"passed": True, "checked_with": "a test"})


@pytest.fixture(scope="module")
def folders(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """``folders[tied]``: a tiny Llama whose head's input has some loud features, as real ones do."""
    made = {}
    for tied in (True, False):
        config = LlamaConfig.from_pretrained(llama, tie_word_embeddings=tied)
        made[tied] = save_model(tmp_path_factory.mktemp("llama"), config, llama)
    return made


def save_model(folder: Path, config: PretrainedConfig, like: Path) -> Path:
    """A model with random weights, and the tokenizer of the folder ``like``."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    with torch.no_grad():
        if isinstance(config, LlamaConfig):
            model.model.norm.weight[:LOUD] = 10
        if isinstance(config, PhiConfig):
            model.lm_head.bias.normal_()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(like).save_pretrained(folder)
    return folder


def make_recipe(method: str = "rtn", bits: int = 4, format: str = "native", **head: Any) -> dict[str, Any]:
    steps = [{"method": method, "group_size": 32}]
    calibration = {"samples": 3, "tokens": 64}
    return {
        "calibration": calibration, "eval": None, "steps": steps, "format": format,
        "head": {"bits": bits, "group_size": 32, **head},
    }  # fmt: skip


def find_heads(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [layer for layer in report["layers"] if layer["name"] in report["plan"]["head"]["layers"]]


def count_weights(layers: list[dict[str, Any]]) -> int:
    return sum(layer["shape"][0] * layer["shape"][1] for layer in layers)


def dense_model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()


def strip_times(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in layer.items() if key != "seconds"} for layer in layers]


@pytest.mark.parametrize("tied", [True, False])
def test_what_is_written_reloads_as_meant_and_the_report_adds_up(
    tied: bool, folders: dict[bool, Path], tmp_path: Path
) -> None:
    recipe = {**make_recipe("gptq"), "eval": {"windows": 2, "tokens": 64} if tied else None}
    result = compress.run(recipe, folders[tied], output=tmp_path / "out")
    report, headers = result.report, Checkpoint(tmp_path / "out").headers
    assert report["verification"]["passed"]
    assert not tied or report["compressed"]["kl"] > 0
    heads = find_heads(report)
    assert [layer["name"] for layer in heads] == NAMES[tied]
    assert not {"model.embed_tokens.weight", "lm_head.weight"} & set(headers)
    table = Checkpoint(tmp_path / "out").config["quantization_config"]["layers"]
    assert [table[name].get("tied", []) for name in NAMES[tied]] == ([["lm_head.weight"]] if tied else [[], []])
    assert table[NAMES[tied][0]]["kind"] == ("embedding" if tied else "head")
    compressed = report["compressed"]
    for name, layers in (("bits_per_weight_head", heads), ("bits_per_weight", report["layers"][:21])):
        held = sum(
            h.nbytes for layer in layers for key, h in headers.items() if key.startswith(layer["name"] + ".")
        )  # fmt: skip
        assert compressed[name] == pytest.approx(8 * held / count_weights(layers))
    assert result.plan.bytes_after == sum(header.nbytes for header in headers.values())
    total = sum(parameter.numel() for parameter in dense_model(folders[tied]).parameters())
    assert count_weights(report["layers"]) / total + report["untouched_share"] == pytest.approx(1)
    if tied:
        assert compressed["parameters"] == total
        assert compressed["bits_per_weight_model"] == pytest.approx(8 * compressed["bytes"] / total)
    assert {row["reason"] for row in report["untouched"]} == {"norm"}
    model = compress.load(tmp_path / "out")
    assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False).shape == (1, 7)


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 8])
def test_errors_are_those_of_the_model_that_loads(
    tied: bool, bits: int, folders: dict[bool, Path], tmp_path: Path
) -> None:
    """Computed again from the loaded folder: the judge's figures for weights, looked-up rows and logits."""
    out = tmp_path / "out"
    report = compress.run(make_recipe(bits=bits), folders[tied], output=out).report
    loaded = {spec.name: weight for spec, weight in load_quantized(out)}
    dense, tokenizer = dense_model(folders[tied]), AutoTokenizer.from_pretrained(folders[tied])
    (ids,) = cut_windows(corpus.load("pydoc", "test"), tokenizer, tokens=64, count=1).ids
    inputs = head_inputs(out, ids)
    for layer in find_heads(report):
        old = dense.get_parameter(f"{layer['name']}.weight").detach().float()
        lost = old - loaded[layer["name"]]
        assert layer["weight_error"] == pytest.approx(float(lost.square().sum() / old.square().sum()), rel=1e-4)
        lost = old - loaded[layer["name"]].bfloat16().float()  # as the model has it
        seen = (lost[ids], old[ids]) if layer["notes"] == {"kind": "embedding"} else (lost @ inputs.T, old @ inputs.T)
        wanted = float(seen[0].square().sum() / seen[1].square().sum())
        assert layer["output_error"] == pytest.approx(wanted, rel=0.03), "but for bfloat16"


def load_dense(folder: Path) -> Any:
    """A written folder as the dense model with the weights that it stands for."""
    checkpoint = Checkpoint(folder)
    form = find_format(checkpoint)
    return dense_model(folder) if form is None else load_decoded(checkpoint, form)


def head_inputs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """What the head of a written folder is given, ``(T, D)``."""
    model = load_dense(folder)
    seen: list[torch.Tensor] = []
    model.get_output_embeddings().register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.inference_mode():
        model(input_ids=ids[None], use_cache=False)
    return seen[0][0].float()


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("format", ["native", "dense"])
def test_a_model_in_memory_gets_the_weights_and_the_report_that_a_folder_would(
    tied: bool, format: str, folders: dict[bool, Path], tmp_path: Path
) -> None:
    recipe = make_recipe("gptq", format=format)
    written = compress.run(recipe, folders[tied], output=tmp_path / "out").report
    model = dense_model(folders[tied])
    compress.run(recipe, model, tokenizer=AutoTokenizer.from_pretrained(folders[tied]))
    for name, tensor in load_dense(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    by_name = {layer["name"]: layer for layer in strip_times(model.compress_report["layers"])}
    for layer in strip_times(find_heads(written)):
        assert {**by_name[layer["name"]], "shape": list(by_name[layer["name"]]["shape"])} == layer


def stop(*args: Any) -> Any:
    raise KeyboardInterrupt


def stop_at(block: int) -> Callable[..., Any]:
    def compress_or_stop(skeleton: Skeleton, task: BlockTask, *rest: Any) -> Any:
        return stop() if task.index == block else compress_block(skeleton, task, *rest)

    return compress_or_stop


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("where", "how"),
    [
        ("compress.run.compress_block", stop_at(0)),
        ("compress.run.compress_block", stop_at(1)),
        ("compress.head.Head.finish", stop),
        ("compress.run.probe_logits", stop),
    ],
    ids=["before the blocks", "between blocks", "before the judge", "after it"],
)
def test_stopped_anywhere_the_same_run_goes_on_and_gives_the_same(
    tied: bool, where: str, how: Any, folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("gptq")
    whole = compress.run(recipe, folders[tied], output=tmp_path / "whole").report
    place, _, name = where.rpartition(".")
    home = compress.head.Head if place.endswith("Head") else importlib.import_module(place)
    with monkeypatch.context() as patch:
        patch.setattr(home, name, how)
        with pytest.raises(KeyboardInterrupt):
            compress.run(recipe, folders[tied], output=tmp_path / "out")
    monkeypatch.setattr("compress.head.round_rows", stop)  # nothing is rounded a second time
    again = compress.run(recipe, folders[tied], output=tmp_path / "out").report
    assert strip_times(again["layers"]) == strip_times(whole["layers"])
    assert all(layer["output_error"] is not None for layer in find_heads(again))
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


@pytest.mark.usefixtures("unverified")
def test_a_few_rows_at_a_time_give_the_same_bytes(
    folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cut_rows(20, 64)[-1].stop >= 20
    compress.run(make_recipe(bits=3), folders[False], output=tmp_path / "whole")
    monkeypatch.setattr("compress.head.CHUNK", 30 * 64)
    assert [(cut.start, cut.stop) for cut in cut_rows(50, 64)] == [(0, 24), (24, 48), (48, 72)]
    compress.run(make_recipe(bits=3), folders[False], output=tmp_path / "rows")
    for path in (tmp_path / "whole").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "rows" / path.name).read_bytes()


@pytest.mark.usefixtures("unverified")
@pytest.mark.parametrize("tied", [True, False])
def test_knowing_the_loud_features_saves_logits(
    tied: bool, folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = NAMES[tied][0]
    reports = {}
    for word in ("weighed", "plain"):
        if word == "plain":
            monkeypatch.setattr("compress.head.observe_head", lambda *args: None)
        report = compress.run(make_recipe(bits=3), folders[tied], output=tmp_path / word).report
        reports[word] = next(layer for layer in report["layers"] if layer["name"] == name)
    assert reports["weighed"]["output_error"] < 0.75 * reports["plain"]["output_error"]
    assert reports["weighed"]["weight_error"] > reports["plain"]["weight_error"]
    assert (reports["weighed"]["tokens"], reports["plain"]["tokens"]) == (64, None)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_rows_are_rounded_to_the_nearest_points_of_their_grid(symmetric: bool, group_size: int) -> None:
    weight = torch.randn((24, 32), generator=torch.Generator().manual_seed(0))
    importance = torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.1
    state = round_rows(weight, QuantSpec(3, group_size, symmetric), torch.bfloat16, importance)
    assert state.grid is not None and state.codes is not None
    wide = 32 if group_size == -1 else group_size
    assert torch.equal(state.grid.scale, state.grid.scale.bfloat16().float()) and state.grid.group_size == wide
    for row in range(24):
        for column in range(32):
            scale, zero = state.grid.scale[row, column // wide], state.grid.zero[row, column // wide]
            points = scale * (torch.arange(8) - zero)
            error = (weight[row, column] - state.weight[row, column]).abs()
            assert error == pytest.approx(float((weight[row, column] - points).abs().min()), abs=1e-6)
    plain = round_rows(weight, QuantSpec(3, group_size, symmetric), torch.bfloat16, None)
    costs = [((weight - one.weight).square() * importance).sum() for one in (state, plain)]
    assert costs[0] < costs[1]


def test_blocks_see_the_rounded_embedding_and_the_dense_stream_the_dense_one(
    folders: dict[bool, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    class Seen(Exception):
        pass

    def look(skeleton: Skeleton, task: BlockTask, streams: Streams, device: str) -> None:
        assert streams.dense is not None
        seen.extend([streams.main.read(0)[0], streams.dense.read(0)[0]])
        raise Seen

    monkeypatch.setattr(importlib.import_module("compress.run"), "compress_block", look)
    with pytest.raises(Seen):
        compress.run(make_recipe("gptq", bits=2), folders[True], output=tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(folders[True])
    ids = cut_windows(corpus.load("pydoc", "calibration"), tokenizer, tokens=64, count=3).ids[0]
    dense = dense_model(folders[True]).model.embed_tokens.weight[ids]
    assert torch.equal(seen[1], dense)
    error = (seen[0] - dense).float().norm() / dense.float().norm()
    assert 0.1 < error < 0.6, "2 bits"


def test_a_bias_of_the_head_stays_and_other_embeddings_too(
    make_model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    llama = make_model_folder("llama")
    shape = LlamaConfig.from_pretrained(llama).to_dict()
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = PhiConfig(**{key: shape[key] for key in keys}, bos_token_id=256, eos_token_id=257)
    phi = save_model(tmp_path / "phi", config, llama)
    for folder, kept in ((phi, "lm_head.bias"), (make_model_folder("gpt2"), "transformer.wpe.weight")):
        out = tmp_path / f"out-{folder.name}"
        report = compress.run(make_recipe(), folder, output=out).report
        assert report["verification"]["passed"]
        before, after = (dict(Checkpoint(one).read(Checkpoint(one).headers)) for one in (folder, out))
        assert torch.equal(before[kept], after[kept])


@pytest.mark.usefixtures("unverified")
def test_without_a_tokenizer_random_tokens_show_the_input_of_the_head(llama: Path, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "bare", LlamaConfig.from_pretrained(llama), llama)
    for path in folder.glob("*token*"):
        path.unlink()
    report = compress.run(make_recipe(), folder, output=tmp_path / "out").report
    assert report["protocol"]["head"] == "random tokens"
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
