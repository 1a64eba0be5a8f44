"""The plan: what it counts against what is really written, and every mistake that headers can show."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, MixtralConfig, PhiConfig, PretrainedConfig

from compress.errors import UserError
from compress.methods import rtn
from compress.plan import Plan, make_plan, plan
from compress.plan_cost import count_active
from compress.plan_inputs import default_output, find_device, parse_size, pick_dtype
from compress.plan_memory import GRAM_COPIES, BlockShape, Workload, block_terms, group_layers, peak_bytes
from compress.plan_select import divisors, suggest_group_sizes
from compress.plan_time import measure_rate, statistic_flops
from compress.recipe import Recipe, Step
from compress.storage.checkpoint import Checkpoint
from compress.storage.formats.base import QuantSpec, load_format
from compress.types import LayerSpec, LayerState
from compress.walk.skeleton import Skeleton

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LAYERS_PER_BLOCK = 7


def save(folder: Path, config: PretrainedConfig, tokenizer: bool = True) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    if tokenizer:
        (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("llama"), LlamaConfig(**SIZES, tie_word_embeddings=False))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every side a multiple of 32, which the gptq format wants."""
    return save(tmp_path_factory.mktemp("wide"), LlamaConfig(**{**SIZES, "hidden_size": 64, "intermediate_size": 96}))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("tied"), LlamaConfig(**SIZES, tie_word_embeddings=True), tokenizer=False)


def make(
    folder: Path, *steps: dict[str, Any], output: Path | None = None, limit: str | None = None, **rest: Any
) -> Plan:
    rest = {"eval": None, "calibration": {"tokens": 64, "samples": 3}, **rest}
    recipe = Recipe.from_dict({"steps": list(steps or [{"method": "rtn", "group_size": 16}]), **rest})
    checkpoint = Checkpoint(folder)
    skeleton = Skeleton.from_checkpoint(checkpoint, pick_dtype(recipe, checkpoint))
    target = output or folder.parent / "out"
    return make_plan(recipe, skeleton, checkpoint, name="tiny", output=target, device="cpu", max_memory=limit)


def mistake(folder: Path, *steps: dict[str, Any], **rest: Any) -> str:
    with pytest.raises(UserError) as caught:
        make(folder, *steps, **rest)
    return str(caught.value)


@pytest.mark.parametrize("form", ["compressed-tensors", "dense", "native", "gptq"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_bytes_are_what_the_format_writes(wide: Path, form: str, bits: int) -> None:
    found = make(wide, {"method": "rtn", "bits": bits, "group_size": 32}, format=form)
    module = load_format(form)
    for layer in found.layers.values():
        state = LayerState(torch.randn(layer.spec.shape))
        state = rtn.compress(state, None, layer.steps[0].config, found.scale_dtype)  # type: ignore[arg-type]
        written = module.encode(layer.spec, state, found.dtype)
        assert layer.nbytes == sum(tensor.numel() * tensor.dtype.itemsize for tensor in written.values())
    assert found.bytes_before == sum(tensor.nbytes for tensor in Checkpoint(wide).headers.values())
    rest = sum(one.numel for one in found.untouched) * 2
    assert found.bytes_after == rest + sum(layer.nbytes for layer in found.layers.values())


def test_units_layers_and_coverage_add_up(llama: Path) -> None:
    found = make(llama)
    assert [unit.name for unit in found.units] == ["model.layers.0", "model.layers.1", "outside"]
    assert [len(unit.layers) for unit in found.units] == [LAYERS_PER_BLOCK, LAYERS_PER_BLOCK, 0]
    assert list(found.layers) == [layer.spec.name for unit in found.units for layer in unit.layers]
    total = sum(header.nbytes for header in Checkpoint(llama).headers.values()) // 2
    assert sum(row.numel for row in found.coverage) == total
    assert sum(unit.bytes_before for unit in found.units) == found.bytes_before
    assert {one.reason for one in found.untouched} == {"embedding", "output head", "norm"}
    linear = sum(layer.spec.numel for layer in found.layers.values())
    assert found.untouched_share == pytest.approx(1 - linear / total)
    assert found.bits_per_weight == pytest.approx(8 * sum(x.nbytes for x in found.layers.values()) / linear)


def test_include_exclude_and_two_steps(llama: Path) -> None:
    found = make(
        llama,
        {"method": "rtn", "bits": 8, "group_size": -1, "include": ["*.mlp.*"], "exclude": ["*.1.*"]},
        {"method": "gptq", "bits": 3, "group_size": 8, "include": "*_proj", "exclude": ["*.mlp.*", "lm_head"]},
        format="native",
    )
    got = {name: (layer.steps[0].method, layer.quant and layer.quant.bits) for name, layer in found.layers.items()}
    assert got["model.layers.0.mlp.up_proj"] == ("rtn", 8)
    assert got["model.layers.1.self_attn.q_proj"] == ("gptq", 3)
    assert len(got) == 3 + 8
    assert "no step selects it" in {one.reason for one in found.untouched}
    assert found.needs >= {"gram", "cross"}


def test_a_group_size_that_does_not_divide(llama: Path) -> None:
    lines = mistake(llama, {"method": "rtn", "group_size": 32}).splitlines()
    assert lines == [
        "model.layers.0.mlp.down_proj (and 1 more): 48 input features are not a multiple of group_size 32; use 16, 24 "
        "or 48, -1 for one group per row, or steps.0.on_indivisible: adjust or skip"
    ]


def test_suggestions_divide() -> None:
    assert suggest_group_sizes(1536, 96 + 1) == "32, 64 or 128"
    assert suggest_group_sizes(576, 128) == "16, 32 or 64"
    assert suggest_group_sizes(7, 4) == "1 or 7"
    for inputs in (1536, 11008, 4304, 1, 13, 48):
        words = suggest_group_sizes(inputs, 128).replace(" or ", ", ").split(", ")
        assert all(inputs % int(word) == 0 for word in words)
        assert divisors(inputs) == [n for n in range(1, inputs + 1) if inputs % n == 0]


def test_adjust_takes_the_largest_divisor_below_and_says_so(llama: Path) -> None:
    found = make(llama, {"method": "rtn", "group_size": 31, "symmetric": True, "on_indivisible": "adjust"})
    sizes = {layer.spec.shape[1]: layer.quant.group_size for layer in found.layers.values() if layer.quant}
    assert sizes == {32: 16, 48: 24}
    assert all(
        layer.steps[0].config.model_dump()["group_size"] == sizes[layer.spec.shape[1]]
        for layer in found.layers.values()
    )
    assert set(found.adjusted) == set(found.layers)
    assert "31 does not divide 48 inputs: 24 is used" in found.adjusted["model.layers.1.mlp.down_proj"]
    assert "adjusted model.layers.0.self_attn.q_proj (and 11 more)" in found.render()


def test_skip_leaves_the_layer_and_says_why(llama: Path) -> None:
    found = make(llama, {"method": "rtn", "group_size": 32, "on_indivisible": "skip"})
    assert set(found.skipped) == {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    assert not set(found.skipped) & set(found.layers)
    reasons = {one.reason: one.numel for one in found.untouched}
    assert reasons["group_size 32 does not divide 48 inputs (on_indivisible: skip)"] == 2 * 32 * 48


def test_patterns_that_match_nothing(llama: Path) -> None:
    text = mistake(
        llama, {"method": "rtn", "include": ["*q_porj", "model.layer.0.*"], "exclude": ["*.mpl.*"], "group_size": 16}
    )
    lines = text.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith("steps.0.include '*q_porj' matches no layer; did you mean '*q_proj'")
    assert lines[1].startswith("steps.0.include 'model.layer.0.*' matches no layer; did you mean 'model.layers.0.*'")
    assert lines[2].startswith("steps.0.exclude '*.mpl.*' matches nothing; did you mean '*.mlp.*'")
    assert "steps.0.exclude leaves no layer" in mistake(
        llama, {"method": "rtn", "include": "*.mlp.*", "exclude": ["*mlp*"]}
    )


def test_heads_and_embeddings_are_never_compressed(llama: Path, tied: Path) -> None:
    step = {"method": "rtn", "group_size": 16}
    hint = "the recipe's key head: is for it)"
    text = mistake(llama, {**step, "include": ["lm_head"]})
    assert f"'lm_head': lm_head is never compressed (output head; {hint}" in text
    text = mistake(tied, {**step, "include": ["*", "lm_head"]}, calibration={})
    assert text.startswith("steps.0.include 'lm_head': lm_head is never compressed (tied with model.embed_tokens")
    assert text.endswith(hint)
    assert "never compressed (embedding" in mistake(llama, {**step, "include": ["*embed*"]})
    found = make(tied, step)
    assert {one.reason for one in found.untouched} == {"embedding, tied with lm_head.weight", "norm"}


HEAD = {"bits": 8, "group_size": 16}


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_embedding_and_head_are_counted_as_the_native_format_writes_them(llama: Path, tied: Path, bits: int) -> None:
    for folder, names in ((llama, ["model.embed_tokens", "lm_head"]), (tied, ["model.embed_tokens"])):
        found = make(folder, format="auto", head={**HEAD, "bits": bits})
        assert found.format == "native", "the first that carries them"
        assert [layer.spec.name for layer in found.head.layers] == names
        assert {row.reason for row in found.coverage if row.status == "untouched"} == {"norm"}
        total = sum(header.nbytes for header in Checkpoint(folder).headers.values())
        assert 2 * sum(row.numel for row in found.coverage) == total == sum(one.bytes_before for one in found.units)
        codes, scales, zeros = 97 * 32 * bits // 8, 97 * 2 * 2, -(-97 * 2 * bits // 8)
        assert found.head.bytes_after == len(names) * (codes + scales + zeros)
        assert found.head.bytes_before == len(names) * 97 * 32 * 2
        dense = make(folder, format="native")
        assert dense.bytes_after - found.bytes_after == found.head.bytes_before - found.head.bytes_after
        assert dense.bits_per_weight == found.bits_per_weight, "of the blocks, with and without a head"
        assert f"head     {' and '.join(names)}: {len(names) * 6.2:.1f} kB -> " in found.render()
        assert found.to_dict()["head"]["bits_per_weight"] == pytest.approx(8 * (codes + scales + zeros) / (97 * 32))
        assert dense.to_dict()["head"]["bits_per_weight"] is None


def test_one_of_the_two_where_they_are_two(llama: Path, tied: Path) -> None:
    for word, name, left in (("head", "lm_head", "embedding"), ("embedding", "model.embed_tokens", "output head")):
        found = make(llama, format="native", head={**HEAD, "layers": word})
        assert [layer.spec.name for layer in found.units[-1].layers] == [name]
        assert {one.reason for one in found.untouched} == {left, "norm"}
        text = mistake(tied, format="native", calibration={}, head={**HEAD, "layers": word})
        assert text.startswith(f"head.layers: got {word!r}, but model.embed_tokens and lm_head are one matrix")


def test_a_large_dense_head_is_offered_8_bits(llama: Path, tied: Path) -> None:
    for folder in (llama, tied):
        lines = [line for line in make(folder, format="compressed-tensors").render().split("\n") if line[:4] == "head"]
        assert len(lines) == 1
        assert "--set head.bits=8 --set head.group_size=-1 --set format=native saves " in lines[0]
    found = make(llama, format="native", head={"bits": 8, "group_size": -1})
    saved = make(llama, format="native").bytes_after - found.bytes_after
    assert f"head.group_size=-1 saves {saved / 1000:.1f} kB" in make(llama, format="native").render()
    wide = save(llama.parent / "small-head", LlamaConfig(**{**SIZES, "vocab_size": 8, "num_hidden_layers": 4}))
    assert "\nhead" not in make(wide).render(), "less than 15% of the result"


def test_what_an_embedding_or_a_head_cannot_be(llama: Path, tmp_path: Path) -> None:
    text = mistake(llama, format="native", head={"group_size": 48})
    assert text.startswith("model.embed_tokens: 32 input features are not a multiple of group_size 48; use 16 or 32,")
    assert "lm_head: 32 input features" in text
    text = mistake(llama, format="compressed-tensors", head=HEAD)
    assert "model.embed_tokens: compressed-tensors leaves the embedding as it is; format native carries it" in text
    assert "lm_head: compressed-tensors leaves the output head as it is" in text
    assert "--set format=native" in text
    text = mistake(llama, format="native", head=HEAD, calibration={"corpus": str(tmp_path / "gone.txt")})
    assert text.startswith("calibration.corpus: got "), "it shows what the head's input is like"


def test_only_token_embedding_and_head_are_touched_where_there_are_other_embeddings(tmp_path: Path) -> None:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    found = make(save(tmp_path / "gpt2", GPT2Config(**sizes)), format="native", head=HEAD)
    assert [layer.spec.name for layer in found.head.layers] == ["transformer.wte"]
    assert found.head.layers[0].spec.tied == ("lm_head.weight",)
    assert "embedding" in {one.reason for one in found.untouched}, "positions"
    phi = PhiConfig(**SIZES)
    found = make(save(tmp_path / "phi", phi), format="native", head=HEAD)
    assert [layer.spec.name for layer in found.head.layers] == ["model.embed_tokens", "lm_head"]
    assert [row.reason for row in found.coverage if row.parameter == "lm_head.bias"] == ["bias"]


def test_two_quantizing_steps_on_one_layer(llama: Path) -> None:
    text = mistake(
        llama, {"method": "rtn", "group_size": 16}, {"method": "gptq", "group_size": 16, "include": "*.mlp.*"}
    )
    assert text.startswith("model.layers.0.mlp.gate_proj (and 5 more): steps.0 (rtn) and steps.1 (gptq) would both")


def test_a_format_that_cannot_carry_the_result(tmp_path: Path, llama: Path) -> None:
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    gpt2 = save(tmp_path / "gpt2", GPT2Config(**sizes))
    text = mistake(gpt2)
    assert text.startswith("format compressed-tensors: transformer.h.0.attn.c_attn (and 3 more): ")
    assert "Conv1D" in text
    assert "--set format=native" in text
    assert make(gpt2, format="auto").format in {"gptq", "native"}
    assert make(llama, format="auto").format == "compressed_tensors"
    floats = {"method": "gptq", "group_size": 16, "float_zero": True}
    assert "float zero" in mistake(llama, floats)
    assert make(llama, floats, format="native").layers["model.layers.0.mlp.up_proj"].quant == QuantSpec(
        4, 16, False, True
    )


def test_experts_are_layers_of_their_own(tmp_path: Path) -> None:
    mixtral = save(tmp_path / "mixtral", MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    found = make(mixtral, format="native")
    assert sum(layer.spec.kind == "expert" for layer in found.layers.values()) == 2 * 4 * 2
    assert "router" in {one.reason for one in found.untouched}
    assert "mlp.experts.*" in found.render()


def test_a_calibrated_method_needs_a_tokenizer_and_a_corpus(llama: Path, tied: Path) -> None:
    gptq = {"method": "gptq", "group_size": 16}
    assert "no tokenizer" in mistake(tied, gptq)
    assert "no tokenizer" in mistake(tied, eval={"tokens": 64})
    make(tied)
    text = mistake(llama, gptq, calibration={"corpus": "nowhere.txt", "tokens": 64})
    assert text.startswith("calibration.corpus: got 'nowhere.txt', wanted pydoc, wikitext2")
    assert mistake(llama, eval={"corpus": "x", "tokens": 64}).startswith("eval.corpus: got 'x'")
    text = mistake(llama, gptq, calibration={"tokens": 65}, eval={"tokens": 70})
    assert text == (
        "calibration.tokens is 65 and eval.tokens is 70, but the model reads at most 64 tokens at once; "
        "use --set calibration.tokens=64 --set eval.tokens=64"
    )


def test_output_folder(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "the model's own folder" in mistake(llama, output=llama)
    (tmp_path / "file").write_text("x")
    assert "not a folder" in mistake(llama, output=tmp_path / "file")
    assert "can't be made" in mistake(llama, output=tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    assert "not written by compress" in mistake(llama, output=tmp_path / "full")
    monkeypatch.setattr("compress.plan_inputs.free_bytes", lambda folder: 10)
    assert "GB needed, 0.00 GB free" in mistake(llama, output=tmp_path / "new")


def test_memory_limit(llama: Path) -> None:
    text = mistake(llama, {"method": "gptq", "group_size": 16}, limit="1MB")
    assert text.startswith("--max-memory 1.0 MB is too little: this run needs ")
    assert "fewer calibration.tokens or targets: layer (no dense copy) or method: rtn" in text
    assert "would lower it" not in mistake(llama, limit="1MB")
    assert make(llama, {"method": "gptq", "group_size": 16}, limit="1TB").suspend


def test_less_memory_is_used_where_it_is_short(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compress.plan_memory.measure_base", lambda: 0)
    step = {"method": "gptq", "group_size": 16}
    calibration = {"tokens": 64, "samples": 200}
    generous = make(llama, step, limit="1TB", calibration=calibration)
    tight = make(llama, step, limit=str(generous.peak_bytes - 1), calibration=calibration)
    assert generous.suspend
    assert not tight.suspend
    assert tight.peak_bytes < generous.peak_bytes
    assert "one at a time" in tight.render()


BLOCK = BlockShape(
    weight_bytes=10**6, encoded_bytes=10**5, groups=((100, 300), (400, 50)), live_bytes=1000, running_bytes=77
)
WORK = Workload((BLOCK,), 5 * 10**6, 7 * 10**6, 100, 8, 0, True, 1, False, False, True, False)


def test_memory_terms() -> None:
    terms = block_terms(WORK, BLOCK)
    assert terms["block weights"] == 10**6
    assert terms["dense copy of the block"] == 0
    assert terms["Gram matrices and their factor"] == (1 + GRAM_COPIES) * 400 * 400 * 4
    assert terms["waiting windows"] == 8 * 1000
    cross = block_terms(replace(WORK, cross=True, matrices=2, dense_windows=4), BLOCK)
    assert cross["dense copy of the block"] == 10**6
    assert cross["Gram matrices and their factor"] == (2 + GRAM_COPIES) * 400 * 400 * 4
    assert cross["waiting windows"] == 12 * 1000
    assert block_terms(replace(WORK, suspend=False), BLOCK)["waiting windows"] == 1000
    assert block_terms(replace(WORK, gram=False), BLOCK)["Gram matrices and their factor"] == 0
    memory = peak_bytes(WORK, base=10**9)
    assert memory.peak > 10**9 + sum(terms.values())
    assert max(len(phase) for phase in memory.phases.values()) == len(terms)


def test_layers_that_may_share_an_input() -> None:
    names = {"b.attn.q": (8, 4), "b.attn.k": (2, 4), "b.mlp.up": (16, 4), "b.mlp.down": (4, 16)}
    specs = [LayerSpec(name, shape, torch.float32) for name, shape in names.items()]
    assert sorted(group_layers(specs)) == [(4, 10), (4, 16), (16, 4)]


def test_public_plan_and_its_table(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(steps=[Step(method="rtn", group_size=16)], eval=None, name="small")
    found = plan(recipe, llama, device="cpu")
    assert found.output == Path("out") / f"{found.model}-small"
    data = json.loads(json.dumps(found.to_dict()))
    assert data["bytes_after"] == found.bytes_after
    assert len(data["layers"]) == 2 * LAYERS_PER_BLOCK
    text = found.render()
    for word in ("model.layers.*.self_attn.q_proj", "16", "embedding", "memory", "time", "bits per compressed weight"):
        assert word in text
    with pytest.raises(UserError, match="no model: give --model"):
        plan(recipe)
    assert not list(tmp_path.iterdir())  # planning leaves nothing behind


def test_plan_of_a_model_in_memory() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    found = plan({"steps": [{"method": "rtn", "group_size": 16}], "eval": None}, model)
    assert found.output is None
    assert found.dtype == torch.float32
    assert len(found.layers) == 2 * LAYERS_PER_BLOCK


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("6GB", 6 * 10**9), ("1.5GiB", 1610612736), ("800 mb", 8 * 10**8), ("1000", 1000), ("2T", 2 * 10**12)],
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "lots", "6XB", "-1GB", "0", "6 GB GB"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(UserError, match="wanted a size such as 6GB"):
        parse_size(text)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert find_device("auto") == find_device("cpu") == "cpu"
    for word, said in (("cuda", "use --device cpu"), ("gpu", "no such device"), ("mps", "not supported")):
        with pytest.raises(UserError, match=said):
            find_device(word)


def test_default_output() -> None:
    recipe = Recipe(steps=[Step(method="rtn")], name="rtn4")
    assert default_output("org/model", recipe) == Path("out/model-rtn4")
    assert default_output("/x/model.gguf", Recipe(steps=[Step(method="rtn")])) == Path("out/model-rtn")


def test_counted_operations() -> None:
    dense = LayerSpec("b.mlp.up", (8, 4), torch.float32)
    expert = LayerSpec("b.mlp.experts.0.down_proj", (8, 4), torch.float32, "expert", "b.mlp.experts.down_proj", 0)
    assert count_active([dense, expert], 0.25) == 32 + 8
    sibling = replace(dense, name="b.mlp.gate")
    assert statistic_flops([dense, sibling], 10, 0, 1.0) == 10 * 16
    assert statistic_flops([dense, expert], 10, 5, 0.5) == 10 * 16 + 2 * 5 * 16 + 5 * 16


def test_the_rate_is_measured_and_fast() -> None:
    assert measure_rate(torch.float32, budget=0.01) > 1e8
