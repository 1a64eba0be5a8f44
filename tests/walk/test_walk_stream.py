"""Hidden states on disk, what blocks are called with, and the way back to logits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import ARCHITECTURES, OTHERS, FolderReader, build_model, make_windows
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from compress.errors import UserError
from compress.walk.coroutine import BlockWalk
from compress.walk.hidden import Hidden
from compress.walk.layers import get_weight, set_weight
from compress.walk.skeleton import Skeleton
from compress.walk.stream import capture, finish

LENGTHS = [24, 24, 13]


def stream_through(skeleton: Skeleton, windows: list[Tensor], folder: Path) -> list[Tensor]:
    """Logits of every window, through one block after the other, each layer replaced by its own dense copy."""
    hidden, calls = capture(skeleton, windows, folder / "hidden0")
    for i in range(len(skeleton.blocks)):
        block = skeleton.load_block(i)
        following = Hidden.create(folder / f"hidden{i + 1}", hidden.lengths, hidden.width, hidden.dtype)
        with BlockWalk(block, skeleton.block_specs(i), hidden, calls[i]) as walk:
            for group in walk.groups():
                for spec in group.specs:
                    set_weight(block, spec, get_weight(block, spec))
            walk.outputs(following)
        hidden = following
    outside = skeleton.load_outside()
    return [finish(outside, skeleton.blocks, hidden.read(n)) for n in range(len(windows))]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in ARCHITECTURES]
    + [(name, torch.bfloat16) for name in ("llama", "gemma2", "gpt2", "gptj", "mixtral")],
)
def test_streamed_logits_are_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    build_model(name).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, experts_implementation="eager").eval()
    skeleton = Skeleton.from_checkpoint(FolderReader(tmp_path), dtype)
    windows = make_windows(LENGTHS)
    for window, logits in zip(windows, stream_through(skeleton, windows, tmp_path), strict=True):
        with torch.no_grad():
            assert torch.equal(logits, model(window[None], use_cache=False).logits)


@pytest.mark.parametrize("name", OTHERS)
def test_architectures_that_no_line_of_code_names(name: str, tmp_path: Path) -> None:
    model_type, options = OTHERS[name]
    config = AutoConfig.for_model(model_type, **options)
    config._experts_implementation = "eager"
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager").eval()
    skeleton = Skeleton.from_checkpoint(FolderReader(tmp_path), torch.float32)
    rows = skeleton.coverage([])
    assert sum(row.numel for row in rows) == sum(parameter.numel() for parameter in model.parameters())
    windows = make_windows(LENGTHS)
    for window, logits in zip(windows, stream_through(skeleton, windows, tmp_path), strict=True):
        with torch.no_grad():
            assert torch.equal(logits, model(window[None], use_cache=False).logits)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gptj", "mixtral"])
def test_a_model_in_memory_is_walked_in_place_and_left_as_it_was(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    windows = make_windows(LENGTHS)
    with torch.no_grad():
        wanted = [model(window[None], use_cache=False).logits for window in windows]
    modules = {path: (type(module), set(module.__dict__)) for path, module in model.named_modules()}
    skeleton = Skeleton.from_model(model)
    assert skeleton.load_block(1) is model.get_submodule(skeleton.blocks[1])
    for logits, other in zip(stream_through(skeleton, windows, tmp_path), wanted, strict=True):
        assert torch.equal(logits, other)
    assert {path: (type(module), set(module.__dict__)) for path, module in model.named_modules()} == modules
    assert not any(module._forward_pre_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(windows[0][None], use_cache=False).logits, wanted[0])


@pytest.mark.parametrize("name", ["llama", "gptj"])
def test_one_block_is_enough(name: str, tmp_path: Path) -> None:
    config = AutoConfig.for_model(name, **ARCHITECTURES[name].options)
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config).eval()
    windows = make_windows([9])
    (logits,) = stream_through(Skeleton.from_model(model), windows, tmp_path)
    with torch.no_grad():
        assert torch.equal(logits, model(windows[0][None], use_cache=False).logits)


def test_capture_reads_nothing_of_the_blocks_nor_the_head(tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    reader = FolderReader(tmp_path)
    capture(Skeleton.from_checkpoint(reader, torch.float32), make_windows(LENGTHS))
    assert set(reader.reads) == {"model.embed_tokens.weight", "model.norm.weight"}


def test_calls_are_recorded_per_length_and_kind_of_attention() -> None:
    model = build_model("gemma3")
    hidden, calls = capture(Skeleton.from_model(model), make_windows(LENGTHS))
    assert hidden.lengths == tuple(LENGTHS)
    for per_length in calls:
        assert set(per_length) == {24, 13, 8}
        assert all(call.kwargs.get("past_key_values") is None for call in per_length.values())
    masks = [calls[i][24].kwargs["attention_mask"] for i in (0, 1)]
    kinds = model.config.layer_types
    assert (masks[0] is None) == (kinds[0] == "full_attention") or torch.is_tensor(masks[0])


def test_causal_attention_needs_no_dense_mask() -> None:
    _, calls = capture(Skeleton.from_model(build_model("llama")), make_windows(LENGTHS))
    assert all(call.kwargs["attention_mask"] is None for call in calls[0].values())


def test_blocks_that_see_the_tokens_are_refused() -> None:
    model: PreTrainedModel = build_model("llama")
    inner = model.model.rotary_emb

    class Leaky(torch.nn.Module):
        def forward(self, states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
            cos, sin = inner(states, *args, **kwargs)
            return cos + states.mean(), sin

    model.model.rotary_emb = Leaky()
    with pytest.raises(UserError, match=r"model.layers.0 is called with position_embeddings.*depends on the tokens"):
        capture(Skeleton.from_model(model), make_windows(LENGTHS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("on_disk", [True, False])
def test_hidden_keeps_every_bit(dtype: torch.dtype, on_disk: bool, tmp_path: Path) -> None:
    path = tmp_path / "hidden" if on_disk else None
    windows = [torch.randn(length, 6).to(dtype) for length in (5, 1, 7)]
    windows[1][0, 0] = float("nan")
    hidden = Hidden.create(path, [5, 1, 7], 6, dtype)
    for n in (2, 0, 1):
        hidden.write(n, windows[n][None])
    hidden.flush()
    if path is not None:
        hidden.close()
        assert path.stat().st_size == 13 * 6 * dtype.itemsize
        hidden = Hidden.open(path)
        assert (hidden.lengths, hidden.width, hidden.dtype) == ((5, 1, 7), 6, dtype)
    integer = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    for n, window in enumerate(windows):
        assert torch.equal(hidden.read(n)[0].view(integer), window.view(integer))
    first = hidden.read(0)
    first.zero_()
    assert torch.equal(hidden.read(0)[0], windows[0]), "what is read is a copy"


def test_truncated_hidden_file_is_refused(tmp_path: Path) -> None:
    Hidden.create(tmp_path / "hidden", [4, 4], 3, torch.float32).close()
    (tmp_path / "hidden").write_bytes(b"\0" * 40)
    with pytest.raises(UserError, match="40 bytes, wanted 96"):
        Hidden.open(tmp_path / "hidden")
    with pytest.raises(UserError, match="are gone"):
        Hidden.open(tmp_path / "other")
