"""The int8 ops on every instruction set against integers and sums in float64; what LLM.int8() promises; refusals."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from compress.kernels import library
from compress.kernels.int8 import int8_linear, int8_matmul, quantize_rows
from compress.numerics.int8_panels import (
    Int8Panels,
    pack_int8_panels,
    pack_outlier_weight,
    quantize_rowwise,
    unpack_int8_panels,
)

BODIES = ("reference", *library.INSTRUCTION_SETS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of y itself, and of a float32 sum of a few parts, relative to the sum of their magnitudes.
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}


@pytest.fixture(params=BODIES)
def body(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each implementation in turn; no test falls back silently."""
    name: str = request.param
    if name == "reference":
        with library.mode("reference"):
            yield name
        return
    if name not in library.available():
        pytest.skip(f"no {name} kernels here: {library.describe()['sets'].get(name) or library.describe()['problem']}")
    library.select_cpu(name)
    with library.mode("require"):
        yield name
    library.select_cpu("auto")


def make_codes(rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Int8Panels]:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows, columns), generator=generator, dtype=torch.int8)
    return codes, pack_int8_panels(codes, torch.rand(rows, generator=generator) * 0.01 + 1e-3)


def make_rows(tokens: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(tokens, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


def multiply(panels: Int8Panels, q: Tensor, row_scale: Tensor) -> Tensor:
    """The bare product in float32."""
    parts = (panels.codes, panels.scale, panels.sums, None, None, None, None, None)
    return int8_matmul(q, row_scale, *parts, panels.shape[0], torch.float32)


def linear(panels: Int8Panels, x: Tensor, threshold: float = 0.0, bias: Tensor | None = None) -> Tensor:
    return int8_linear(x, panels.codes, panels.scale, panels.sums, bias, threshold, None, None, panels.shape[0])


def linear_kept(panels: Int8Panels, x: Tensor, threshold: float, index: Tensor, weight: Tensor) -> Tensor:
    """With the columns `index` of a dense weight kept."""
    kept = pack_outlier_weight(weight, index)
    return int8_linear(x, panels.codes, panels.scale, panels.sums, None, threshold, index, kept, panels.shape[0])


# -- layout -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns", [(1, 1), (16, 4), (17, 5), (40, 63)])
def test_panels_hold_each_code_where_they_say_and_come_back(rows: int, columns: int) -> None:
    codes, panels = make_codes(rows, columns)
    for o, i in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 3)]:
        assert panels.codes[o // 16, i // 4, o % 16, i % 4] == codes[o, i]
    assert torch.equal(panels.sums[:rows].long(), codes.long().sum(1)) and not panels.sums[rows:].any()
    assert int(panels.codes.long().sum()) == int(codes.long().sum()), "padding isn't zero"
    again, scale = unpack_int8_panels(panels)
    assert torch.equal(again, codes) and torch.equal(scale, panels.scale[:rows]) and not panels.scale[rows:].any()


def test_panels_refuse_what_does_not_fit() -> None:
    codes = torch.zeros(4, 8, dtype=torch.int8)
    with pytest.raises(ValueError, match=r"int8 \(O, I\), got float32 \(4, 8\)"):
        pack_int8_panels(codes.float(), torch.ones(4))
    with pytest.raises(ValueError, match=r"scale must be \(4,\).* got \(8,\)"):
        pack_int8_panels(codes, torch.ones(8))
    with pytest.raises(ValueError, match=r"-127\.\.127, got -128"):
        pack_int8_panels(torch.full_like(codes, -128), torch.ones(4))
    with pytest.raises(ValueError, match="132104 in features at most, got 132105"):
        pack_int8_panels(torch.zeros(1, 132105, dtype=torch.int8), torch.ones(1))


# -- integers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [0, 1, 2, 5, 11, 12, 13, 25, 100])
@pytest.mark.parametrize("rows, columns", [(1, 1), (16, 64), (33, 7), (50, 130)])
def test_sums_are_exact(body: str, tokens: int, rows: int, columns: int) -> None:
    codes, panels = make_codes(rows, columns)
    panels = Int8Panels(panels.codes, torch.ones_like(panels.scale), panels.sums, panels.shape)
    q = torch.randint(-127, 128, (tokens, columns), dtype=torch.int8, generator=torch.Generator().manual_seed(2))
    padded = torch.nn.functional.pad(q, (0, -columns % 4))
    y = multiply(panels, padded, torch.ones(tokens))
    wanted = q.long() @ codes.long().t()
    assert int(wanted.abs().max() if tokens else 0) < 2**24, "float32 would round"
    assert y.shape == (tokens, rows) and torch.equal(y.long(), wanted)


@pytest.mark.parametrize("left, right", [(127, 127), (-127, 127), (127, -127), (-127, -127)])
@pytest.mark.parametrize("tokens", [1, 12, 13])
def test_extremes_do_not_saturate(body: str, left: int, right: int, tokens: int) -> None:
    columns = 4096
    panels = pack_int8_panels(torch.full((20, columns), right, dtype=torch.int8), torch.ones(20))
    y = multiply(panels, torch.full((tokens, columns), left, dtype=torch.int8), torch.ones(tokens))
    assert torch.equal(y, torch.full((tokens, 20), float(left * right * columns)))  # 127^2 2^12: float32 is exact


def test_the_longest_row_fits_int32(body: str) -> None:
    columns = 132104
    panels = pack_int8_panels(torch.full((1, columns), 127, dtype=torch.int8), torch.ones(1))
    y = multiply(panels, torch.full((1, columns), -127, dtype=torch.int8), torch.ones(1))
    assert float(y) == pytest.approx(-(127**2) * columns, rel=2.0**-23)


# -- quantizing rows --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, columns", [(1, 1), (3, 7), (5, 64), (40, 1030), (2000, 33)])
def test_rows_are_quantized_alike_everywhere(body: str, dtype: torch.dtype, tokens: int, columns: int) -> None:
    x = make_rows(tokens, columns, dtype)
    x[-1] = 0
    q, scale, outliers = quantize_rows(x, 2.5)
    values = x.double()
    large = (values.abs() >= 2.5).any(0)
    left = values.masked_fill(large, 0)
    most = left.abs().amax(1)
    assert torch.equal(outliers, large.to(torch.uint8))
    assert torch.equal(scale, (most.float() / 127)) and scale.dtype is torch.float32
    assert q.shape == (tokens, -(-columns // 4) * 4) and not q[:, columns:].any() and not q[-1].any()
    exact = 127 * left / most.clamp_min(1e-300).unsqueeze(1)
    assert (q[:, :columns].double() - exact).abs().max() <= 0.5 + 1e-4
    with library.mode("reference"):
        again = quantize_rows(x, 2.5)
    assert torch.equal(q, again[0]) and torch.equal(scale, again[1]), "not the same codes as the reference"


def test_ties_round_to_even(body: str) -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5]])
    q, scale, _ = quantize_rows(x, 0.0)
    assert q.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126]] and scale.tolist() == [1.0]


def test_rows_too_small_for_a_scale_become_zeros(body: str) -> None:
    q, scale, _ = quantize_rows(torch.tensor([[1e-38] * 20, [0.0] * 20, [1e-30] * 20]), 0.0)
    assert not q[:2].any() and scale[:2].tolist() == [0.0, 0.0]
    assert bool((q[2] == 127).all()) and float(scale[2]) > 0


def test_threshold_counts_its_own_value_and_zero_means_none(body: str) -> None:
    x = torch.tensor([[6.0, 5.99, -6.0, 1.0], [0.0, 0.0, 0.0, 100.0]])
    assert quantize_rows(x, 6.0)[2].tolist() == [1, 0, 1, 1]
    assert quantize_rows(x, 0.0)[2].tolist() == [0, 0, 0, 0]
    assert quantize_rows(x, 0.0, torch.tensor([1, 3]))[2].tolist() == [0, 1, 0, 1]
    assert quantize_rows(x, 50.0, torch.tensor([1]))[2].tolist() == [0, 1, 0, 1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("column", [0, 21])
def test_rows_that_are_not_finite_are_refused(body: str, value: float, threshold: float, column: int) -> None:
    _, panels = make_codes(8, 22)
    x = make_rows(7, 22)
    x[4, column] = x[5, 3] = value
    with pytest.raises(ValueError, match="row 4 of x holds NaN or infinity"):
        quantize_rows(x, threshold)
    with pytest.raises(ValueError, match="row 4 of x holds NaN or infinity"):
        linear(panels, x, threshold)
    with pytest.raises(ValueError, match="row 4 of x holds NaN or infinity"):
        quantize_rows(x, 0.0, torch.tensor([column]))


# -- the whole product ------------------------------------------------------------------------------------------------


def expect(
    x: Tensor, panels: Int8Panels, threshold: float, bias: Tensor | None, dense: Tensor
) -> tuple[Tensor, Tensor]:
    """y in float64 from the reference's codes, outlier columns taken from `dense`; and how far off a result may be."""
    codes, scale = unpack_int8_panels(panels)
    with library.mode("reference"):
        q, row_scale, outliers = quantize_rows(x, threshold)
    found = outliers.bool()
    inner = (
        q[:, : x.shape[1]].double() * row_scale.double().unsqueeze(1),
        codes.double() * scale.double().unsqueeze(1),
    )
    outer = (x[:, found].double(), dense[:, found].double())
    y = inner[0] @ inner[1].t() + outer[0] @ outer[1].t()
    size = y.abs() + outer[0].abs() @ outer[1].abs().t()
    if bias is not None:
        y, size = y + bias.double(), size + bias.double().abs()
    return y, size * ROUNDING[x.dtype] + 1e-30


def test_random_shapes(body: str) -> None:
    """Shapes, types and options at random: the two-step path is right, and one call gives the same bits."""
    draw = random.Random(5)
    for round_number in range(40):
        rows, columns, tokens = draw.randint(1, 70), draw.randint(1, 300), draw.choice([1, 2, 3, 7, 12, 13, 30, 64])
        dtype, threshold = draw.choice(DTYPES), draw.choice([0.0, 1.0, 2.0, 6.0])
        codes, panels = make_codes(rows, columns, round_number)
        x = make_rows(tokens, columns, dtype, round_number)
        bias = None if draw.random() < 0.5 else make_rows(1, rows, draw.choice([dtype, torch.float32]))[0]
        dense = codes.float() * panels.scale[:rows].unsqueeze(1)
        q, row_scale, outliers = quantize_rows(x, threshold)
        parts = (panels.codes, panels.scale, panels.sums, bias, x, outliers, None, None, rows, dtype)
        y = int8_matmul(q, row_scale, *parts)
        wanted, tolerance = expect(x, panels, threshold, bias, dense)
        case = f"round {round_number}: {rows} x {columns}, {tokens} tokens, {dtype}, threshold {threshold}"
        assert y.dtype is dtype and bool(((y.double() - wanted).abs() <= tolerance).all()), case
        assert torch.equal(linear(panels, x, threshold, bias), y), case


@pytest.mark.parametrize("kept_dtype", DTYPES)
def test_kept_columns_are_used_and_others_dequantized(body: str, kept_dtype: torch.dtype) -> None:
    """Found 3, 9, 20; listed 3, 12: features 3 and 12 come from the kept weight, 9 and 20 from the codes."""
    codes, panels = make_codes(35, 30)
    x, index = make_rows(14, 30).clamp(-2, 2), torch.tensor([3, 12])
    x[2, 3], x[5, 9], x[11, 20] = 8.0, -9.0, 30.0
    kept = torch.randn(35, 30, generator=torch.Generator().manual_seed(3)).to(kept_dtype)
    dense = codes.float() * panels.scale[:35].unsqueeze(1)
    dense[:, index] = kept[:, index].float()
    q, row_scale, outliers = quantize_rows(x, 6.0, index)
    assert outliers.nonzero().flatten().tolist() == [3, 9, 12, 20] and not q[:, [3, 9, 12, 20]].any()
    parts = (panels.codes, panels.scale, panels.sums, None, x, outliers, index, pack_outlier_weight(kept, index), 35)
    y = int8_matmul(q, row_scale, *parts, torch.float32)
    inner = (q[:, :30].double() * row_scale.double().unsqueeze(1)) @ (codes.double().t() * panels.scale[:35].double())
    outer = x[:, outliers.bool()].double() @ dense[:, outliers.bool()].double().t()
    torch.testing.assert_close(y.double(), inner + outer, rtol=1e-5, atol=1e-4)
    assert torch.equal(linear_kept(panels, x, 6.0, index, kept), y)
    static = linear_kept(panels, x, 0.0, index, kept)
    assert not torch.equal(static, y), "threshold 0 leaves only the list"
    assert torch.equal(quantize_rows(x, 0.0, index)[2].nonzero().flatten(), index)


def test_any_leading_shape_and_strides(body: str) -> None:
    _, panels = make_codes(20, 18)
    x = make_rows(24, 18)
    wanted = linear(panels, x)
    assert torch.equal(linear(panels, x.view(2, 3, 4, 18)), wanted.view(2, 3, 4, 20))
    assert torch.equal(linear(panels, x[3]), wanted[3])
    wide = torch.zeros(24, 50)
    wide[:, 7:25] = x
    assert torch.equal(linear(panels, wide[:, 7:25]), wanted)
    assert torch.equal(linear(panels, x.t().contiguous().t()), wanted)
    assert torch.equal(linear(panels, x[::2]), wanted[::2])
    assert torch.equal(linear(panels, x[:1].expand(5, 18)), wanted[:1].expand(5, 20))
    assert linear(panels, x[:0]).shape == (0, 20) and linear(panels, x.view(2, 12, 18)[:, :0]).shape == (2, 0, 20)
    assert [tuple(part.shape) for part in quantize_rows(x[:0], 6.0)] == [(0, 20), (0,), (18,)]


def test_more_threads_give_the_same_bits(body: str) -> None:
    _, panels = make_codes(300, 512)
    x = make_rows(150, 512)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append((linear(panels, x, 2.5), linear(panels, x[:1], 2.5), *quantize_rows(x, 2.5)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# -- what LLM.int8() promises (arXiv:2208.07339) ----------------------------------------------------------------------


def make_layer(rows: int, columns: int) -> tuple[Tensor, Int8Panels]:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
    return weight, pack_int8_panels(*quantize_rowwise(weight))


def test_an_infinite_threshold_is_plain_vector_wise(body: str) -> None:
    _, panels = make_layer(48, 96)
    x = make_rows(9, 96) * 10
    assert torch.equal(linear(panels, x, float("inf")), linear(panels, x, 0.0))


def test_a_tiny_threshold_with_all_weights_kept_is_the_dense_product(body: str) -> None:
    weight, panels = make_layer(48, 96)
    x = make_rows(9, 96)
    y = linear_kept(panels, x, 1e-30, torch.arange(96), weight)
    torch.testing.assert_close(y.double(), x.double() @ weight.double().t(), rtol=1e-5, atol=1e-4)


def test_decomposition_restores_what_an_outlier_feature_spoils(body: str) -> None:
    weight, panels = make_layer(64, 512)
    x = make_rows(32, 512)
    x[:, 100] = 60.0
    index, dense = torch.tensor([100]), x.double() @ weight.double().t()

    def error(y: Tensor) -> float:
        return float((y.double() - dense).square().mean().sqrt())

    plain = error(linear(panels, x, 0.0))
    assert error(linear_kept(panels, x, 6.0, index, weight)) * 10 < plain
    assert error(linear(panels, x, 6.0)) * 5 < plain


def test_scaling_a_token_scales_its_output(body: str) -> None:
    _, panels = make_layer(40, 80)
    x = make_rows(6, 80)
    scaled = x.clone()
    scaled[2] *= 4.0  # a power of two: the codes stay the same, and so every bit of the rest
    y, z = linear(panels, x), linear(panels, scaled)
    assert torch.equal(z[2], y[2] * 4) and torch.equal(z[[0, 1, 3, 4, 5]], y[[0, 1, 3, 4, 5]])
    scaled[2] = x[2] * 0.37
    torch.testing.assert_close(linear(panels, scaled)[2], y[2] * 0.37, rtol=0.02, atol=0.02)


def test_each_output_is_within_the_bound(body: str) -> None:
    weight, panels = make_layer(40, 200)
    x = make_rows(10, 200)
    error = (linear(panels, x).double() - x.double() @ weight.double().t()).abs()
    cx, cw = x.abs().amax(1).double().unsqueeze(1), weight.abs().amax(1).double()
    bound = weight.abs().double().sum(1) * cx / 254 + x.abs().double().sum(1, keepdim=True) * cw / 254
    bound = bound + 200 * cx * cw / 254**2
    assert bool((error <= bound * (1 + 1e-5)).all()) and float((error / bound).max()) > 0.01


def test_the_order_of_tokens_does_not_matter(body: str) -> None:
    _, panels = make_layer(40, 130)
    x = make_rows(50, 130) * 3
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(linear(panels, x[order], 6.0), linear(panels, x, 6.0)[order])


# -- as PyTorch ops ---------------------------------------------------------------------------------------------------


def test_opcheck(body: str) -> None:
    _, panels = make_codes(20, 18)
    x, index, weight = make_rows(5, 18), torch.tensor([2, 11]), torch.randn(20, 18)
    kept, bias = pack_outlier_weight(weight, index), torch.randn(20)
    q, row_scale, outliers = quantize_rows(x, 1.0)
    ops, layer = torch.ops.compress, (panels.codes, panels.scale, panels.sums)
    for quantize in ((x, 6.0, None), (x.bfloat16(), 1.0, index)):
        torch.library.opcheck(ops.quantize_rows.default, quantize)
    torch.library.opcheck(ops.int8_linear.default, (x, *layer, bias, 1.0, index, kept, 20))
    torch.library.opcheck(ops.int8_linear.default, (x.half(), *layer, None, 0.0, None, None, 20))
    parts = (bias, x, outliers, index, kept, 20, torch.bfloat16)
    torch.library.opcheck(ops.int8_matmul.default, (q, row_scale, *layer, *parts))


def test_one_graph_with_outliers_that_depend_on_the_data(body: str) -> None:
    _, panels = make_codes(20, 18)

    def forward(x: Tensor) -> Tensor:
        q, row_scale, outliers = quantize_rows(x * 2, 3.0)
        parts = (panels.codes, panels.scale, panels.sums, None, x * 2, outliers, None, None, 20, torch.float32)
        return int8_matmul(q, row_scale, *parts) + linear(panels, x, 3.0)

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (3, 8):
        x = make_rows(tokens, 18, seed=tokens)
        assert torch.equal(compiled(x), forward(x))


# -- what is refused --------------------------------------------------------------------------------------------------


def test_wrong_activations_are_refused(body: str) -> None:
    _, panels = make_codes(20, 18)
    x = make_rows(3, 18)
    for wrong, message in [
        (x.double(), r"x must be float32.*got float64 \(3, 18\)"),
        (x[:, :16], r"I in 17\.\.20, got float32 \(3, 16\)"),
        (make_rows(3, 21), r"I in 17\.\.20, got float32 \(3, 21\)"),
        (torch.tensor(1.0), r"got float32 \(\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            linear(panels, wrong)
    for threshold in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be 0"):
            linear(panels, x, threshold)
    with pytest.raises(ValueError, match=r"\(T, I\)"):
        quantize_rows(x.view(1, 3, 18), 6.0)
    with pytest.raises(ValueError, match="got int8"):
        quantize_rows(x.to(torch.int8), 6.0)


def test_wrong_weights_are_refused(body: str) -> None:
    _, p = make_codes(20, 18)
    x = make_rows(3, 18)

    def call(codes: Tensor, scale: Tensor, sums: Tensor, bias: Tensor | None = None, out: int = 20) -> None:
        int8_linear(x, codes, scale, sums, bias, 0.0, None, None, out)

    for parts, message in [
        ((p.codes.to(torch.uint8), p.scale, p.sums), r"codes must be int8 \(P, K, 16, 4\), got uint8"),
        ((p.codes.transpose(0, 1), p.scale, p.sums), "codes must be contiguous"),
        ((p.codes, p.scale[:20], p.sums), r"scale must be contiguous float32 \(32,\), got float32 \(20,\)"),
        ((p.codes, p.scale.double(), p.sums), "scale must be contiguous float32"),
        ((p.codes, p.scale, p.sums.long()), r"sums must be contiguous int32 \(32,\)"),
        ((p.codes, p.scale, p.sums, torch.ones(19)), r"bias must be contiguous .* \(20,\), got float32 \(19,\)"),
        ((p.codes, p.scale, p.sums, None, 33), "2 panels of 16 rows do not make 33"),
        ((p.codes, p.scale, p.sums, None, 16), "2 panels of 16 rows do not make 16"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*parts)


def test_wrong_outliers_are_refused(body: str) -> None:
    _, panels = make_codes(20, 18)
    x, weight = make_rows(3, 18), torch.randn(20, 18)

    def call(index: Tensor | None, kept: Tensor | None) -> None:
        int8_linear(x, panels.codes, panels.scale, panels.sums, None, 6.0, index, kept, 20)

    index = torch.tensor([2, 11])
    kept = pack_outlier_weight(weight, index)
    for parts, message in [
        ((index, None), "belong together, got only outlier_index"),
        ((None, kept), "belong together, got only outlier_weight"),
        ((index.int(), kept), r"outlier_index must be contiguous int64 \(n,\), got int32"),
        ((index, kept[:, :20]), r"outlier_weight must be .* \(2, 32\)"),
        ((torch.tensor([11, 2]), kept), "must ascend"),
        ((torch.tensor([2, 2]), kept), "must ascend"),
        ((torch.tensor([2, 18]), kept), r"0\.\.17"),
        ((torch.tensor([-1, 3]), kept), r"0\.\.17"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(*parts)


def test_wrong_codes_of_activations_are_refused(body: str) -> None:
    _, p = make_codes(20, 18)
    x = make_rows(3, 18)
    q, row_scale, outliers = quantize_rows(x, 6.0)
    layer = (p.codes, p.scale, p.sums, None)
    for first, rest, message in [
        ((q[:, :16], row_scale), (None, None), r"q must be contiguous int8 \(T, 20\)"),
        ((q, row_scale[:2]), (None, None), r"row_scale must be contiguous float32 \(3,\)"),
        ((q, row_scale), (x, None), "belong together, got only x"),
        ((q, row_scale), (x[:2], outliers), r"x must be .* \(3, I\)"),
        ((q, row_scale), (x, outliers.bool()), r"outliers must be contiguous uint8 \(18,\), got bool"),
    ]:
        with pytest.raises(ValueError, match=message):
            int8_matmul(*first, *layer, *rest, None, None, 20, torch.float32)
    with pytest.raises(ValueError, match=r"dtype must be .* got torch\.float64"):
        int8_matmul(q, row_scale, *layer, None, None, None, None, 20, torch.float64)
