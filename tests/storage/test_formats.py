"""Every format: exact round trips, exact sizes, refusals; layouts against slow references and the stock packer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import random_state
from torch import Tensor

import compress.storage.formats
from compress.errors import UserError
from compress.storage.files import TensorHeader
from compress.storage.formats import compressed_tensors, dense, gptq, native
from compress.storage.formats.base import Format, QuantSpec, encode_unit, load_format
from compress.types import LayerSpec, LayerState

NAMES = sorted(path.stem for path in Path(compress.storage.formats.__file__).parent.glob("[!_]*.py"))
FORMATS = [load_format(name) for name in NAMES if name != "base"]


def make_spec(
    shape: tuple[int, int] = (64, 96), kind: Any = "linear", dtype: torch.dtype = torch.bfloat16
) -> LayerSpec:
    name = "model.layers.0.mlp.experts.1.down_proj" if kind == "expert" else "model.layers.0.mlp.up_proj"
    parameter = "model.layers.0.mlp.experts.down_proj" if kind == "expert" else f"{name}.weight"
    return LayerSpec(name, shape, dtype, kind, parameter, 1 if kind == "expert" else None)


def headers_of(tensors: dict[str, Tensor]) -> dict[str, TensorHeader]:
    return {name: TensorHeader(t.dtype, tuple(t.shape), "f", 0, t.nbytes) for name, t in tensors.items()}


@pytest.mark.parametrize("form", FORMATS, ids=lambda form: form.NAME)
@pytest.mark.parametrize("kind", native.KINDS)
@pytest.mark.parametrize("quant", [
    *(QuantSpec(bits, size, symmetric) for bits in range(1, 9) for size in (-1, 16, 12) for symmetric in (True, False)),
    *(QuantSpec(bits, 32, False, True) for bits in (1, 3, 8)),
], ids=str)  # fmt: skip
def test_what_a_format_carries_comes_back_exactly(form: Format, kind: str, quant: QuantSpec) -> None:
    spec = make_spec(kind=kind)
    if form.carries(spec, quant, "llama") is not None:
        return
    state = random_state(spec, quant, form.scale_dtype(spec.dtype))
    tensors = form.encode(spec, state, spec.dtype)
    assert sum(t.nbytes for t in tensors.values()) == form.nbytes(spec, quant)
    config = form.quantization_config([(spec, quant)], [])
    if form.NAME == "dense":
        assert config is None
        assert torch.equal(form.decode(spec, tensors, {}), state.weight.to(spec.dtype).float())
        return
    assert config is not None
    assert torch.equal(form.decode(spec, tensors, config), state.weight)
    ((found, names),) = form.list_layers(headers_of(tensors), config)
    assert (found.name, found.shape, set(names)) == (spec.name, spec.shape, set(tensors))


def test_the_carried_kinds_and_widths_are_these() -> None:
    """So that the test above can't pass by carrying nothing."""

    def widths(form: Format, kind: str, size: int, float_zero: bool = False) -> list[int]:
        spec = make_spec(kind=kind)
        return [b for b in range(1, 10) if form.carries(spec, QuantSpec(b, size, False, float_zero), "llama") is None]

    every = list(range(1, 9))
    for kind in native.KINDS:
        assert widths(native, kind, 12) == widths(native, kind, -1) == widths(native, kind, 16, True) == every
        assert widths(compressed_tensors, kind, 12) == (every if kind == "linear" else [])
        assert widths(gptq, kind, 16) == widths(gptq, kind, -1) == ([2, 3, 4, 8] if kind == "linear" else [])
        assert widths(dense, kind, 12) == [*every, 9]
        assert widths(compressed_tensors, kind, 16, True) == widths(gptq, kind, 16, True) == []
    assert widths(gptq, "linear", 12) == widths(native, "linear", 36) == widths(compressed_tensors, "linear", 36) == []


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 33), (33, 31), (5, 64)])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("form", [native, compressed_tensors], ids=["native", "compressed-tensors"])
def test_odd_shapes_round_trip(form: Format, bits: int, shape: tuple[int, int]) -> None:
    spec = make_spec(shape)
    for quant in (QuantSpec(bits, -1, True), QuantSpec(bits, -1, False)):
        state = random_state(spec, quant, torch.bfloat16)
        tensors = form.encode(spec, state, torch.bfloat16)
        config = form.quantization_config([(spec, quant)], [])
        assert config is not None
        assert torch.equal(form.decode(spec, tensors, config), state.weight)
        assert sum(t.nbytes for t in tensors.values()) == form.nbytes(spec, quant)


@pytest.mark.parametrize("bits", range(1, 9))
def test_native_packs_without_waste(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (37,), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    number = sum(int(code) << (bits * i) for i, code in enumerate(codes))
    wanted = list(number.to_bytes(-(-37 * bits // 8), "little"))
    assert native.pack_bytes(codes, bits).tolist() == wanted


@pytest.mark.parametrize("bits", gptq.BITS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_layout_is_that_of_autogptq(bits: int, symmetric: bool) -> None:
    """Words put together one code at a time, as AutoGPTQ's packer does it."""
    spec = make_spec((32, 64))
    quant = QuantSpec(bits, 32, symmetric)
    state = random_state(spec, quant, torch.float16)
    assert state.codes is not None and state.grid is not None
    tensors = gptq.encode(spec, state, torch.bfloat16)

    def pack_line(values: list[int]) -> list[int]:
        number = sum(value << (bits * i) for i, value in enumerate(values))
        data = number.to_bytes(len(values) * bits // 8, "little")
        return [int.from_bytes(data[i : i + 4], "little", signed=True) for i in range(0, len(data), 4)]

    for o in (0, 31):
        assert tensors[f"{spec.name}.qweight"][:, o].tolist() == pack_line(state.codes[o].tolist())
    stored = state.grid.zero - 1 if symmetric else state.grid.zero
    for g in (0, 1):
        assert tensors[f"{spec.name}.qzeros"][g].tolist() == pack_line([int(z) for z in stored[:, g]])
    assert torch.equal(tensors[f"{spec.name}.scales"].float(), state.grid.scale.t())
    assert tensors[f"{spec.name}.g_idx"].tolist() == [0] * 32 + [1] * 32
    config = gptq.quantization_config([(spec, quant)], [])
    assert config is not None and config["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("quant", [QuantSpec(0, 16, False), QuantSpec(0, 12, True), QuantSpec(0, -1, False, True)])
def test_rows_of_native_tensors_are_what_the_rows_alone_encode_to(bits: int, quant: QuantSpec) -> None:
    """And pieces end to end are the whole: large matrices are written and read a few rows at a time."""
    quant = replace(quant, bits=bits)
    spec = make_spec((37, 48), "embedding")
    state = random_state(spec, quant, spec.dtype)
    whole = native.encode(spec, state, spec.dtype)
    config = native.quantization_config([(spec, quant)], []) or {}
    cuts = [slice(0, 16), slice(16, 24), slice(24, 40)]
    pieces = [native.take_rows(spec, quant, whole, cut) for cut in cuts]
    for cut, piece in zip(cuts, pieces, strict=True):
        rows = state.weight[cut]
        got = native.decode(replace(spec, shape=(len(rows), 48)), piece, config)
        assert torch.equal(got, rows)
    for name, tensor in whole.items():
        assert torch.equal(torch.cat([piece[name] for piece in pieces]), tensor)
    with pytest.raises(AssertionError, match="multiple of 8"):
        native.take_rows(spec, quant, whole, slice(4, 8))


def test_a_tied_matrix_is_listed_once_with_both_its_names() -> None:
    quant = QuantSpec(8, 32, False)
    spec = LayerSpec("embed", (40, 64), torch.bfloat16, "embedding", "embed.weight", tied=("lm_head.weight",))
    tensors = native.encode(spec, random_state(spec, quant, spec.dtype), spec.dtype)
    config = native.quantization_config([(spec, quant)], [])
    assert config is not None and config["layers"]["embed"]["tied"] == ["lm_head.weight"]
    assert native.list_layers(headers_of(tensors), config) == [(spec, tuple(tensors))]
    assert "format native carries it" in str(gptq.carries(spec, quant, "llama"))
    assert "the embedding" in str(compressed_tensors.carries(spec, quant, "llama"))


def test_gptq_reads_act_order_of_others() -> None:
    spec = make_spec((32, 64))
    quant = QuantSpec(4, 32, False)
    state = random_state(spec, quant, torch.float16)
    assert state.codes is not None and state.grid is not None
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0)) % 2
    tensors = gptq.encode(spec, state, torch.bfloat16) | {f"{spec.name}.g_idx": order.int()}
    got = gptq.decode(spec, tensors, gptq.quantization_config([(spec, quant)], []) or {})
    wanted = torch.stack([
        state.grid.scale[:, order[i]] * (state.codes[:, i].float() - state.grid.zero[:, order[i]]) for i in range(64)
    ], dim=1)  # fmt: skip
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [-1, 16])
def test_compressed_tensors_decompresses_to_one_rounding(bits: int, symmetric: bool, size: int) -> None:
    """The package's own decompression of what we wrote, bit for bit."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme

    spec = make_spec((33, 48))
    quant = QuantSpec(bits, size, symmetric)
    config = compressed_tensors.quantization_config([(spec, quant)], [])
    assert config is not None
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        state = random_state(spec, quant, dtype)
        tensors = compressed_tensors.encode(spec, state, dtype)
        local = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
        got = PackedQuantizationCompressor.decompress(local, scheme)["weight"]
        assert got.dtype == dtype and torch.equal(got, state.weight.to(dtype))


def test_scales_that_were_not_rounded_are_a_bug_of_the_method() -> None:
    spec = make_spec()
    state = random_state(spec, QuantSpec(4, 16, True), torch.float32)
    for form in (native, compressed_tensors, gptq):
        with pytest.raises(AssertionError, match="was not rounded"):
            form.encode(spec, state, torch.bfloat16)


@pytest.mark.parametrize("form", [native, compressed_tensors, gptq], ids=["native", "compressed-tensors", "gptq"])
def test_contradictions_are_named(form: Format) -> None:
    spec = make_spec()
    quant = QuantSpec(4, 32, False)
    tensors = form.encode(spec, random_state(spec, quant, form.scale_dtype(spec.dtype)), spec.dtype)
    config = form.quantization_config([(spec, quant)], []) or {}
    for name, tensor in tensors.items():
        without = {key: value for key, value in tensors.items() if key != name}
        if name.endswith("g_idx"):  # other people leave it out where inputs are in order
            assert torch.equal(form.decode(spec, without, config), form.decode(spec, tensors, config))
        else:
            with pytest.raises(UserError, match=name.rpartition(".")[2]):
                form.decode(spec, without, config)
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            form.decode(spec, {**tensors, name: tensor[:-1]}, config)
        with pytest.raises(UserError, match=name.rpartition(".")[2]):
            form.decode(spec, {**tensors, name: tensor.to(torch.complex64)}, config)
    for wrong in (QuantSpec(3, 32, False), QuantSpec(4, 16, False)):
        with pytest.raises(UserError, match="wanted"):
            form.decode(spec, tensors, form.quantization_config([(spec, wrong)], []) or {})
    with pytest.raises(UserError):
        form.decode(spec, tensors, {})


def test_malformed_configurations_are_named() -> None:
    spec = make_spec()
    entry: dict[str, Any] = (native.quantization_config([(spec, QuantSpec(4, 32, True))], []) or {})["layers"][
        spec.name
    ]
    for key, value in (
        ("bits", "4"),
        ("bits", 9),
        ("bits", True),
        ("group_size", 0),
        ("group_size", 7),
        ("shape", [1]),
    ):
        config = {"version": 1, "layers": {spec.name: {**entry, key: value}}}
        with pytest.raises(UserError, match=key if key != "bits" or value != 9 else "1 to 8 bits"):
            native.decode(native.list_layers({}, config)[0][0], {}, config)
    with pytest.raises(UserError, match="version"):
        native.list_layers({}, {"version": 2, "layers": {}})
    with pytest.raises(UserError, match="checkpoint_format"):
        gptq.decode(spec, {}, {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq_v3"})
    group = {"targets": ["re:.*"], "weights": {"num_bits": 4, "strategy": "tensor", "symmetric": True}}
    with pytest.raises(UserError, match="strategy"):
        compressed_tensors.decode(spec, {}, {"config_groups": {"group_0": group}})


def test_whole_model_conflicts() -> None:
    a, b = make_spec(), LayerSpec("model.layers.1.mlp.up_proj", (64, 96), torch.bfloat16, "linear", "x")
    mixed = [(a, QuantSpec(4, 32, True)), (b, QuantSpec(3, 32, True))]
    assert compressed_tensors.conflict(mixed, []) is None and native.conflict(mixed, []) is None
    assert a.name in str(gptq.conflict(mixed, [])) and b.name in str(gptq.conflict(mixed, []))
    mixed = [(a, QuantSpec(4, 32, True)), (b, QuantSpec(4, 32, False))]
    assert "asymmetric" in str(compressed_tensors.conflict(mixed, []))
    with pytest.raises(UserError, match="asymmetric"):
        compressed_tensors.quantization_config(mixed, [])


def test_targets_match_their_layers_and_nothing_else() -> None:
    import re

    def spec(name: str) -> LayerSpec:
        return LayerSpec(name, (64, 64), torch.bfloat16, "linear", f"{name}.weight")

    four, three = QuantSpec(4, 32, True), QuantSpec(3, 32, True)
    layers = [(spec(f"model.layers.{i}.mlp.up_proj"), four) for i in range(11)]
    layers += [(spec(f"model.layers.{i}.self_attn.q_proj"), three if i % 2 else four) for i in range(11)]
    untouched = [spec(f"model.layers.{i}.mlp.down_proj") for i in range(11)]
    layers += [(spec("model.layers.1.mlp.gate_proj"), four)]
    untouched += [spec("model.layers.10.mlp.gate_proj")]
    config = compressed_tensors.quantization_config(layers, untouched)
    assert config is not None

    def matches(target: str, name: str) -> bool:
        return re.match(target[3:], name) is not None if target.startswith("re:") else target == name

    found: dict[str, list[int]] = {}
    for name in [one.name for one, _ in layers] + [one.name for one in untouched] + ["lm_head", "model.layers.1.mlp"]:
        groups = config["config_groups"].values()
        found[name] = [g["weights"]["num_bits"] for g in groups if any(matches(t, name) for t in g["targets"])]
    assert found == {name: [] for name in found} | {one.name: [quant.bits] for one, quant in layers}
    assert set(config["ignore"]) == {one.name for one in untouched} | {"lm_head"}
    assert r"re:^model\.layers\.\d+\.mlp\.up_proj$" in config["config_groups"]["group_0"]["targets"]


def test_encode_unit_replaces_weights_and_keeps_the_rest() -> None:
    linear, expert = make_spec(), make_spec((8, 32), "expert")
    states = {spec: random_state(spec, QuantSpec(4, 16, False), torch.bfloat16) for spec in (linear, expert)}
    fused = torch.randn(3, 8, 32).bfloat16()
    bias = torch.randn(64).bfloat16()
    unit = {linear.parameter: torch.zeros(64, 96), "model.layers.0.mlp.up_proj.bias": bias, expert.parameter: fused}
    written = encode_unit(native, unit, list(states.items()), torch.bfloat16)
    stem = f"{expert.parameter}.1"
    assert set(written) == {
        *(f"{linear.name}.{leaf}" for leaf in ("codes", "scale", "zero", "bias")),
        *(f"{stem}.{leaf}" for leaf in ("codes", "scale", "zero")),
        f"{expert.parameter}.0",
        f"{expert.parameter}.2",
    }
    assert torch.equal(written[f"{expert.parameter}.2"], fused[2])
    untouched = LayerState(torch.zeros(64, 96))
    assert set(encode_unit(native, unit, [(linear, untouched)], torch.bfloat16)) == set(unit)
    assert set(encode_unit(dense, unit, list(states.items()), torch.bfloat16)) == set(unit)
