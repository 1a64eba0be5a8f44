"""The native format in Transformers: ``from_pretrained``, ``save_pretrained``, pipelines, and who registers when."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import build_model, logits, write_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import compress
from compress.errors import UserError
from compress.kernels import library
from compress.runtime import hook
from compress.runtime.embedding import QuantEmbedding
from compress.runtime.linear import WeightLinear
from compress.storage.checkpoint import Checkpoint
from compress.storage.files import write_json
from compress.storage.formats import native
from compress.storage.formats.base import QuantSpec, encode_layer, load_format

pytestmark = pytest.mark.skipif(not library.available(), reason="the kernels were not built here")


def write_native(folder: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16, bits: int = 4) -> Any:
    model = build_model(name, dtype)
    write_folder(folder, model, load_format("native"), QuantSpec(bits, 32, False))
    return model


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(folder)
    return checkpoint.read(checkpoint.headers)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_saved_and_loaded_again(name: str, tmp_path: Path) -> None:
    write_native(tmp_path / "first", name)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert model.compress_report.on_kernels and model.is_quantized
    for options in ({}, {"max_shard_size": "20KB"}):  # the second over the first
        model.save_pretrained(tmp_path / "second", **options)
        first, second = read_all(tmp_path / "first"), read_all(tmp_path / "second")
        assert set(first) == set(second)
        assert all(torch.equal(first[one], second[one]) and first[one].dtype == second[one].dtype for one in first)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "second")
        assert torch.equal(logits(again), logits(model))
    configs = [Checkpoint(tmp_path / one).config["quantization_config"] for one in ("first", "second")]
    assert configs[0] == configs[1]
    names = {path.name for path in (tmp_path / "second").iterdir()}
    listed = {header.file for header in Checkpoint(tmp_path / "second").headers.values()}
    assert names == listed | {"compress.safetensors.index.json", "config.json", "generation_config.json"}


def test_a_saved_folder_refuses_a_process_without_us(tmp_path: Path) -> None:
    write_native(tmp_path / "first")
    AutoModelForCausalLM.from_pretrained(tmp_path / "first").save_pretrained(tmp_path / "second")
    script = "from transformers import AutoModelForCausalLM as A; import sys; A.from_pretrained(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script, tmp_path / "second"], capture_output=True, text=True, check=False
    )
    assert done.returncode != 0 and "no file named model.safetensors" in done.stderr


ORDERS = {
    "we first": "import compress, transformers",
    "transformers first": "import transformers; from transformers.quantizers import auto; import compress",
    "quantizers last": "import transformers, compress; from transformers.quantizers import auto",
}


@pytest.mark.parametrize("order", ORDERS)
def test_registered_in_any_order(order: str, tmp_path: Path) -> None:
    write_native(tmp_path / "out")
    script = (
        f"import sys; {ORDERS[order]}; model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "print(len(model.compress_report.on_kernels)); "
        "assert not any(type(finder).__module__ == 'compress.runtime.hook' for finder in sys.meta_path)"
    )
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "14"


def test_load_comes_before_any_import_of_transformers(tmp_path: Path) -> None:
    write_native(tmp_path / "out")
    script = "import sys, compress; print(len(compress.load(sys.argv[1]).compress_report.on_kernels))"
    done = subprocess.run([sys.executable, "-c", script, tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "14"


def test_importing_us_imports_nothing_else() -> None:
    script = (
        "import sys; import compress; print(*{'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)); "
        "from compress.runtime import hook; assert any(isinstance(one, hook.Finder) for one in sys.meta_path); "
        "hook.install(); assert sum(isinstance(one, hook.Finder) for one in sys.meta_path) == 1; "
        "hook.remove(); assert not any(isinstance(one, hook.Finder) for one in sys.meta_path)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stdout.strip(), done.stderr + done.stdout


def test_the_finder_finds_nothing_else() -> None:
    assert hook.Finder().find_spec("transformers.quantizers.base") is None


def test_pipeline_and_generate(tmp_path: Path, llama: Path) -> None:
    model = build_model("llama", vocab_size=300)
    write_folder(tmp_path / "out", model, load_format("native"), QuantSpec(4, 32, False))
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "out")
    generator = pipeline("text-generation", model=str(tmp_path / "out"))
    assert isinstance(generator.model.model.layers[0].self_attn.o_proj, WeightLinear)
    text = generator("ab", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    assert text.startswith("ab")
    ids = torch.tensor([[97, 98]])
    got, wanted = (one.generate(ids, max_new_tokens=4, do_sample=False) for one in (generator.model, model))
    assert got.shape == wanted.shape == (1, 6)


def test_saving_says_what_it_can_not_do(tmp_path: Path) -> None:
    write_native(tmp_path / "first")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    with pytest.raises(UserError, match=r"push_to_hub is not for compressed models.*model\.push_to_hub"):
        model.save_pretrained(tmp_path / "second", push_to_hub=True)
    shard = next((tmp_path / "first").glob("compress-*.safetensors"))
    shard.touch()
    with pytest.raises(UserError, match="gone or changed since the model was loaded"):
        model.save_pretrained(tmp_path / "second")


def test_a_model_of_a_stock_format_is_saved_as_that(tmp_path: Path) -> None:
    model = build_model("llama")
    write_folder(tmp_path / "first", model, load_format("gptq"), QuantSpec(4, 32, False))
    loaded = compress.load(tmp_path / "first", kernels="require")
    loaded.save_pretrained(tmp_path / "second")
    assert (tmp_path / "second" / "model.safetensors").is_file()
    first, second = read_all(tmp_path / "first"), read_all(tmp_path / "second")
    assert set(first) == set(second) and all(torch.equal(first[one], second[one]) for one in first)
    assert torch.equal(logits(compress.load(tmp_path / "second")), logits(loaded))


@pytest.mark.parametrize("kernels", ["require", "off"])
@pytest.mark.parametrize(("name", "tied"), [("llama", True), ("llama", False), ("gemma", True), ("gemma3_text", True)])
def test_quantized_embedding_and_head(name: str, tied: bool, kernels: Any, tmp_path: Path) -> None:
    """Tied, both ends share one matrix in the file and in memory; not tied, each has its own."""
    model = write_with_head(tmp_path / "out", name, tied)
    loaded = compress.load(tmp_path / "out", kernels=kernels)
    limit = 1e-5 * float(logits(model).abs().max())
    assert float((logits(loaded) - logits(model)).abs().max()) <= limit
    if kernels == "require":
        embedding, head = loaded.model.embed_tokens, loaded.lm_head
        assert isinstance(embedding, QuantEmbedding) and isinstance(head, WeightLinear)
        assert (embedding.codes.data_ptr() == head.codes.data_ptr()) == tied
        loaded.save_pretrained(tmp_path / "second")
        first, second = read_all(tmp_path / "out"), read_all(tmp_path / "second")
        assert set(first) == set(second) and all(torch.equal(first[one], second[one]) for one in first)
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "second")), logits(loaded))


def write_with_head(folder: Path, name: str, tied: bool) -> Any:
    """A native folder whose embedding and head are encoded and nothing else; the model that it must equal."""
    from folders import LLAMA, MODELS, random_state

    from compress.storage.files import write_safetensors
    from compress.types import LayerSpec

    MODELS.setdefault("gemma3_text", {**LLAMA, "query_pre_attn_scalar": 16, "sliding_window": 8})
    model = build_model(name, torch.float32, tie_word_embeddings=tied)
    quant = QuantSpec(4, 32, False)
    shape = tuple(model.lm_head.weight.shape)
    place = ("model.embed_tokens.weight", None, ("lm_head.weight",) if tied else ())
    specs = [LayerSpec("model.embed_tokens", shape, torch.float32, "embedding", *place)]
    if not tied:
        specs.append(LayerSpec("lm_head", shape, torch.float32, "head", "lm_head.weight"))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for seed, spec in enumerate(specs):
        layer = random_state(spec, quant, torch.float32, seed)
        model.get_submodule(spec.name).weight.data.copy_(layer.weight)
        state.update(encode_layer(native, spec, layer, torch.float32) or {})
    for parameter in ("model.embed_tokens.weight", "lm_head.weight"):
        del state[parameter]
    folder.mkdir()
    shard = "compress-00001-of-00001.safetensors"
    write_safetensors(folder / shard, state)
    index = {"metadata": {}, "weight_map": dict.fromkeys(state, shard)}
    write_json(folder / "compress.safetensors.index.json", index)
    config = {**model.config.to_diff_dict(), "architectures": [type(model).__name__], "dtype": "float32"}
    config["tie_word_embeddings"] = tied
    config["quantization_config"] = native.quantization_config([(spec, quant) for spec in specs], [])
    write_json(folder / "config.json", config)
    return model


def test_copies_and_threads(tmp_path: Path) -> None:
    write_native(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    wanted = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), wanted)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(logits(model))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and all(torch.equal(one, wanted) for one in found)
    assert torch.equal(logits(model), wanted)
