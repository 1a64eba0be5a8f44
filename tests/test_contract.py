"""Every method and every format keeps its contract. Files are found by listing the folders: a new one is tested too."""

from __future__ import annotations

import dataclasses
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import compress
from compress.errors import UserError
from compress.methods.base import MethodConfig
from compress.storage.formats.base import QuantSpec
from compress.types import ActivationRule, Grid, LayerSpec, LayerState, Outliers, Statistic

PACKAGE = Path(compress.__file__).parent
STATISTICS = {field.name for field in dataclasses.fields(Statistic)} - {"tokens", "cache"}


def list_files(folder: str) -> list[str]:
    """Modules of a folder that are words of a recipe: all but the base, the package file and private helpers."""
    names = sorted(path.stem for path in (PACKAGE / folder).glob("*.py"))
    return [name for name in names if name != "base" and not name.startswith("_")]


def load(folder: str, name: str) -> Any:
    return importlib.import_module(f"compress.{folder.replace('/', '.')}.{name}")


METHODS = list_files("methods")
FORMATS = list_files("storage/formats")


def test_the_folders_are_where_this_test_looks() -> None:
    assert {"rtn", "gptq"} <= set(METHODS)
    assert {"dense", "gptq", "compressed_tensors", "native"} <= set(FORMATS)


# -- methods ----------------------------------------------------------------------------------------------------------


def make_layer(outputs: int = 24, inputs: int = 32) -> tuple[Tensor, Statistic]:
    """A weight and a statistic of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    mixing = torch.eye(inputs) + 0.3 * torch.randn(inputs, inputs, generator=generator)
    rows = torch.randn(400, inputs, generator=generator) @ mixing
    gram, size = rows.T @ rows, rows.abs()
    return weight, Statistic(400, gram, 0.01 * gram, absmax=size.amax(0), peaks=size.amax(1))


def run(method: Any, weight: Tensor, statistic: Statistic, config: Any) -> LayerState:
    given = dataclasses.replace(statistic, cache={}) if method.needs(config) else None
    state: LayerState = method.compress(LayerState(weight.clone()), given, config, torch.float16)
    return state


def small_config(method: Any) -> Any:
    """The defaults, with groups that fit the layer of ``make_layer``."""
    return method.Config(**({"group_size": 8} if "group_size" in method.Config.model_fields else {}))


def dequantize(state: LayerState) -> Tensor:
    """By the letter of ``Grid`` and ``Outliers``, one column at a time."""
    grid, codes = state.grid, state.codes
    assert grid is not None
    assert codes is not None
    columns = []
    for index in range(codes.shape[1]):
        group = index // grid.group_size
        columns.append(grid.scale[:, group] * (codes[:, index].float() - grid.zero[:, group]))
    if state.outliers is not None:
        for place, index in enumerate(state.outliers.index.tolist()):
            assert bool((columns[index] == 0).all()), "codes of outlier columns stand for 0"
            columns[index] = state.outliers.weight[:, place]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("name", METHODS)
class TestMethod:
    def test_what_it_says_of_itself(self, name: str) -> None:
        method = load("methods", name)
        assert method.KIND in {"layer", "block", "model", "train"}
        assert method.__doc__
        assert method.Config.__doc__
        assert issubclass(method.Config, MethodConfig)
        assert method.Config.__module__ == method.__name__, "each method has a Config of its own"
        assert set(method.needs(method.Config())) <= STATISTICS

    def test_its_config_is_strict_and_frozen(self, name: str) -> None:
        config = load("methods", name).Config()
        with pytest.raises((ValidationError, UserError)):
            type(config)(no_such_field=1)
        field = next(iter(type(config).model_fields))
        with pytest.raises(ValidationError):
            setattr(config, field, getattr(config, field))

    @pytest.mark.parametrize("bits", [2, 3, 4, 8])
    @pytest.mark.parametrize("group_size", [8, -1])
    @pytest.mark.parametrize("symmetric", [True, False])
    def test_a_layer_goes_in_and_a_layer_on_a_grid_comes_out(
        self, name: str, bits: int, group_size: int, symmetric: bool
    ) -> None:
        method = load("methods", name)
        if method.KIND != "layer" or "bits" not in method.Config.model_fields:
            pytest.skip("not a method that quantizes layer by layer")
        weight, statistic = make_layer()
        config = method.Config(bits=bits, group_size=group_size, symmetric=symmetric)
        state = run(method, weight, statistic, config)
        grid, codes = state.grid, state.codes
        assert grid is not None
        assert codes is not None
        assert (grid.bits, grid.symmetric) == (bits, symmetric)
        assert grid.group_size == (32 if group_size == -1 else group_size)
        assert grid.scale.shape == grid.zero.shape == (24, 32 // grid.group_size)
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < 2**bits
        assert torch.equal(grid.scale, grid.scale.half().float()), "scales are what will be stored"
        if symmetric:
            assert bool((grid.zero == 2 ** (bits - 1)).all())
        elif not grid.float_zero:
            assert torch.equal(grid.zero, grid.zero.round().clamp(0, 2**bits - 1))
        torch.testing.assert_close(state.weight, dequantize(state), rtol=0, atol=1e-5)
        error = float((state.weight - weight).pow(2).sum() / weight.pow(2).sum())
        assert error < {2: 0.7, 3: 0.2, 4: 0.05, 8: 3e-4}[bits]

    def test_what_it_gives_depends_on_nothing_else(self, name: str) -> None:
        """Twice the same is the same to the bit, and neither weight nor statistic is changed."""
        method = load("methods", name)
        if method.KIND != "layer":
            pytest.skip("not a layer method")
        weight, statistic = make_layer()
        before = (weight.clone(), statistic.gram.clone())
        first, second = (run(method, weight, statistic, small_config(method)) for _ in range(2))
        assert torch.equal(first.weight, second.weight)
        assert torch.equal(weight, before[0])
        assert torch.equal(statistic.gram, before[1])

    def test_rows_stand_alone_if_it_says_so(self, name: str) -> None:
        """The driver stacks layers with the same input: that must change nothing but the order of additions."""
        method = load("methods", name)
        if method.KIND != "layer" or not method.ROWWISE:
            pytest.skip("rows are not independent, and it says so")
        weight, statistic = make_layer()
        whole = run(method, weight, statistic, small_config(method)).weight
        halves = [run(method, half, statistic, small_config(method)).weight for half in weight.split(12)]
        same = (torch.cat(halves) - whole).abs() < 1e-5
        assert float(same.float().mean()) > 0.97  # a tie may fall to the other side


# -- formats ----------------------------------------------------------------------------------------------------------


def make_state(spec: LayerSpec, quant: QuantSpec, dtype: torch.dtype) -> LayerState:
    """Random codes over the whole range, scales of either sign, zeros over the whole range."""
    generator = torch.Generator().manual_seed(quant.bits)
    rows, columns = spec.shape
    size = columns if quant.group_size == -1 else quant.group_size
    shape = (rows, columns // size)
    codes = torch.randint(2**quant.bits, spec.shape, generator=generator).to(torch.uint8)
    scale = (torch.randn(shape, generator=generator) * 0.05 + 0.01).to(dtype).float()
    if quant.symmetric:
        zero = torch.full(shape, float(2 ** (quant.bits - 1)))
    elif quant.float_zero:
        zero = (torch.rand(shape, generator=generator) * 2**quant.bits).to(dtype).float()
    else:
        zero = torch.randint(2**quant.bits, shape, generator=generator).float()
    outliers = input_groups = None
    if quant.activations is not None:
        scale = scale * 127 / 127  # the 127th part of a number
        if quant.activations.groups > 1:
            input_groups = torch.arange(columns).remainder(quant.activations.groups).to(torch.uint8)
    if quant.outliers:
        index = torch.randperm(columns, generator=generator)[: quant.outliers].sort().values
        codes[:, index] = 2 ** (quant.bits - 1)
        outliers = Outliers(index, torch.randn(rows, quant.outliers, generator=generator).to(spec.dtype).float())
    grid = Grid(quant.bits, size, quant.symmetric, scale, zero, quant.float_zero)
    state = LayerState(torch.zeros(spec.shape), grid, codes, outliers, quant.activations, input_groups)
    return dataclasses.replace(state, weight=dequantize(state))


def make_spec(name: str, shape: tuple[int, int], dtype: torch.dtype, kind: Any = "linear") -> LayerSpec:
    return LayerSpec(name, shape, dtype, kind, f"{name}.weight")


SPECS = [
    make_spec("model.layers.0.mlp.up_proj", (32, 64), torch.bfloat16),
    make_spec("model.layers.1.self_attn.k_proj", (96, 32), torch.float16),
    make_spec("transformer.h.0.mlp.c_fc", (64, 32), torch.float32, "conv1d"),
    LayerSpec("layers.0.experts.1.down_proj", (32, 64), torch.bfloat16, "expert", "layers.0.experts.down_proj", 1),
]
QUANTS = [
    QuantSpec(bits, group_size, symmetric, float_zero)
    for bits in (2, 3, 4, 8)
    for group_size in (32, -1)
    for symmetric, float_zero in ((True, False), (False, False), (False, True))
]
QUANTS += [
    QuantSpec(8, -1, True, activations=ActivationRule()),
    QuantSpec(4, 32, True, activations=ActivationRule()),
    QuantSpec(8, -1, True, activations=ActivationRule(threshold=6.0)),
    QuantSpec(8, -1, True, activations=ActivationRule(groups=4)),
    QuantSpec(8, -1, True, activations=ActivationRule(), outliers=3),
]


@pytest.mark.parametrize("name", FORMATS)
class TestFormat:
    def test_what_it_says_of_itself(self, name: str) -> None:
        form = load("storage/formats", name)
        assert form.__doc__
        assert form.NAME.replace("-", "_") == name
        assert all(isinstance(package, str) for package in form.LOADS_WITH)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            assert form.scale_dtype(dtype).is_floating_point

    @pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.kind + "-" + str(spec.dtype).removeprefix("torch."))
    @pytest.mark.parametrize("quant", QUANTS, ids=str)
    def test_what_it_carries_comes_back_exactly(self, name: str, spec: LayerSpec, quant: QuantSpec) -> None:
        form = load("storage/formats", name)
        reason = form.carries(spec, quant, "LlamaForCausalLM")
        if reason is not None:
            assert isinstance(reason, str)
            assert len(reason) > 10, "a reason in words"
            return
        state = make_state(spec, quant, form.scale_dtype(spec.dtype))
        tensors = form.encode(spec, state, spec.dtype)
        config = form.quantization_config([(spec, quant)], [])
        back = form.decode(spec, tensors, config or {})
        stores_weights = config is None  # dense: the weight in the model's own dtype is all that it promises
        assert torch.equal(back, state.weight.to(spec.dtype).float() if stores_weights else state.weight)
        assert sum(one.numel() * one.element_size() for one in tensors.values()) == form.nbytes(spec, quant)
        assert all(one.is_contiguous() for one in tensors.values())

    def test_it_carries_something(self, name: str) -> None:
        form = load("storage/formats", name)
        assert any(form.carries(SPECS[0], quant, "LlamaForCausalLM") is None for quant in QUANTS)
        assert form.carries(SPECS[0], None, "LlamaForCausalLM") is None
        assert form.nbytes(SPECS[0], None) == 2 * SPECS[0].numel
