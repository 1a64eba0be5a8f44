"""``compress::weight_matmul`` on every instruction set against sums in float64, and what it refuses."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.kernels import library
from compress.kernels.weight_matmul import weight_matmul
from compress.numerics.panels import Panels, pack_panels

BODIES = ("reference", *library.INSTRUCTION_SETS)
# Of the sum of the magnitudes of all products and the bias. float32 sums are rounded a few times; bfloat16 has weight,
# bias and result rounded (2^-9 each) where there are many tokens; float16 only the result.
ROUNDING = {torch.float32: 2.0**-20, torch.bfloat16: 3 * 2.0**-9, torch.float16: 2.0**-11}


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


@dataclasses.dataclass
class Case:
    """A layer, and its weight in float64."""

    panels: Panels
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        p = self.panels
        return weight_matmul(x, p.codes, p.scale, p.zero, self.bias, p.bits, p.group_size, p.shape[0])

    def expect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y and how far from it a result may be."""
        exact, size = x.double(), self.weight.abs()
        y, magnitude = exact @ self.weight.T, exact.abs() @ size.T
        if self.bias is not None:
            y, magnitude = y + self.bias.double(), magnitude + self.bias.double().abs()
        return y, magnitude * ROUNDING[x.dtype] + 1e-30


def make(
    rows: int,
    columns: int,
    bits: int = 4,
    group_size: int = 32,
    zero: str = "none",
    scale_dtype: torch.dtype = torch.float32,
    bias: torch.dtype | None = None,
    seed: int = 0,
) -> Case:
    """``zero``: none, integer or float."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, columns // group_size)
    codes = torch.randint(0, 2**bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.randn(shape, generator=generator) * 0.05).to(scale_dtype)
    shift: Tensor | None = None
    if zero == "integer":
        shift = torch.randint(0, min(2**bits, 255) + 1, shape, generator=generator)
    elif zero == "float":
        shift = (torch.rand(shape, generator=generator) * 2**bits).to(scale_dtype)
    middle = torch.full(shape, 2.0 ** (bits - 1)) if shift is None else shift
    grouped = codes.view(*shape, group_size).double() - middle.double().unsqueeze(-1)
    weight = (scale.double().unsqueeze(-1) * grouped).view(rows, columns)
    added = None if bias is None else torch.randn(rows, generator=generator).to(bias)
    return Case(pack_panels(codes, scale, shift, bits, group_size), weight, added)


def make_x(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_close(case: Case, x: Tensor, where: Any = None) -> None:
    got = case(x)
    expected, allowed = case.expect(x)
    assert got.dtype == x.dtype and got.shape == (*x.shape[:-1], case.panels.shape[0]), where
    off = (got.double() - expected).abs() - allowed
    assert bool((off <= 0).all()), (
        f"{where}: {int((off > 0).sum())} of {off.numel()} are off, by {float(off.max()):.3g}"
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("tokens", [1, 2, 3, 7, 8, 9, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_products(body: str, bits: int, tokens: int, dtype: torch.dtype) -> None:
    for zero in ("none", "integer", "float"):
        for scale_dtype in (torch.float32, torch.bfloat16, torch.float16):
            case = make(40, 96, bits, 32, zero, scale_dtype, bias=dtype)
            assert_close(case, make_x(tokens, 96, dtype=dtype), (zero, scale_dtype))


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 31, 33, 48, 100])
def test_any_number_of_out_features(body: str, rows: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in (1, 5, 30):
            assert_close(make(rows, 64, zero="integer", bias=torch.float32), make_x(tokens, 64, dtype=dtype))


@pytest.mark.parametrize("columns, group_size", [(32, 32), (2080, 2080), (4160, 32), (4224, 128), (2112, 1056)])
def test_any_number_of_in_features_and_groups(body: str, columns: int, group_size: int) -> None:
    """Past the blocks in which the kernels go through long rows, with a group that lies across their border."""
    for bits in (3, 4):
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 13):
                case = make(18, columns, bits, group_size, "float")
                assert_close(case, make_x(tokens, columns, dtype=dtype), (bits, dtype, tokens))


@pytest.mark.slow
def test_random_shapes(body: str) -> None:
    draw = random.Random(3)
    for turn in range(150):
        runs = draw.choice([1, 2, 3, 4, 6, 8, 12])
        group = 32 * draw.choice([k for k in range(1, runs + 1) if runs % k == 0])
        rows, bits, tokens = draw.randint(1, 90), draw.choice([2, 3, 4, 8]), draw.randint(1, 40)
        dtype, scale = (draw.choice(list(ROUNDING)) for _ in range(2))
        bias = draw.choice([None, torch.float32, dtype])
        zero = draw.choice(["none", "integer", "float"])
        case = make(rows, 32 * runs, bits, group, zero, scale, bias, seed=turn)
        where = (rows, 32 * runs, bits, group, tokens, dtype, scale, bias, zero)
        assert_close(case, make_x(tokens, 32 * runs, dtype=dtype, seed=turn), where)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_share_the_panels(body: str, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            for tokens in (1, 8, 40):
                assert_close(make(200, 512, 4, 64, "integer"), make_x(tokens, 512, dtype=dtype))
    finally:
        torch.set_num_threads(before)


def test_own_threads_give_the_same(body: str) -> None:
    """The pool that serves where PyTorch's OpenMP can't be had."""
    native = library.active()
    if native is None:
        pytest.skip("the reference has no threads of its own")
    case, x = make(300, 512, 4, 64, "integer"), make_x(3, 512)
    before, shared = torch.get_num_threads(), case(x)
    native.use_openmp(0, 0, 0)
    torch.set_num_threads(2)
    try:
        for _ in range(50):
            assert torch.equal(case(x), shared)
    finally:
        torch.set_num_threads(before)
        library._share_threads(native)


def test_many_weight_slices(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of the weight than is decoded at a time, and a last slice that is short."""
    monkeypatch.setattr("compress.kernels.weight_matmul.SLICE_BYTES", 64 * 16 * 4 * 2)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert_close(make(83, 64, zero="float", bias=dtype), make_x(11, 64, dtype=dtype))


def test_every_element_is_written_and_none_besides(body: str) -> None:
    """The allocator gives back memory that was full of NaN; what lies around inputs is NaN as well."""
    for tokens in (1, 3, 8, 9, 30):
        for dtype in (torch.float32, torch.bfloat16):
            case = make(37, 64, 4, 32, "integer", bias=torch.float32)
            around = torch.full((tokens + 2, 64 + 32), torch.nan, dtype=dtype)
            x = around[1:-1, 16:80]
            x.copy_(make_x(tokens, 64, dtype=dtype))
            for _ in range(4):
                del_me = torch.full((tokens, 37), torch.nan, dtype=dtype)
                del del_me
                assert_close(case, x)


@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64), (0, 3, 64)])
def test_no_tokens_give_no_rows(body: str, shape: tuple[int, ...]) -> None:
    y = make(37, 64)(torch.empty(shape, dtype=torch.bfloat16))
    assert y.shape == (*shape[:-1], 37) and y.dtype == torch.bfloat16


def test_shapes_and_strides_of_x(body: str) -> None:
    case = make(20, 64, zero="integer")
    big = make_x(6, 128, 64)
    for x in (
        big[0, 0],  # one token, no other dimension
        big[:2, :3],  # rows that are no single run
        big[:, ::50],
        big.transpose(0, 1)[:4],
        make_x(64, 5).t(),  # neighbouring inputs are apart
        make_x(64, 50).t(),
        make_x(1, 64).expand(5, 64),  # one row five times
        make_x(1, 64).expand(20, 64),
        make_x(7, 100)[:, 3:67],
        make_x(30, 100)[:, 3:67],
        make_x(2, 1, 3, 64),
    ):
        assert_close(case, x)
        assert_close(case, x.to(torch.bfloat16))


def test_gradients_are_not_kept_and_autocast_changes_nothing(body: str) -> None:
    case = make(20, 64)
    for tokens in (2, 20):
        x = make_x(tokens, 64)
        plain = case(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(case(x), plain)
        assert torch.equal(case(x.clone().requires_grad_()).detach(), plain)
        with torch.inference_mode():
            assert torch.equal(case(x), plain)


def test_infinities_and_nan_stay_in_their_token(body: str) -> None:
    case = make(20, 64, zero="integer")
    for tokens in (4, 20):
        x = make_x(tokens, 64)
        clean = case(x)
        x[1, 5], x[2, 7] = torch.inf, torch.nan
        y = case(x)
        assert not bool(torch.isfinite(y[1]).any()) and bool(torch.isnan(y[2]).all())
        assert torch.equal(y[3:], clean[3:]) and torch.equal(y[0], clean[0])


# -- what is refused --------------------------------------------------------------------------------------------------


def misalign(tensor: Tensor) -> Tensor:
    """The same values at an address that is off by one byte."""
    raw = torch.empty(tensor.nbytes + 1, dtype=torch.uint8)
    moved = torch.frombuffer(raw.numpy(), dtype=tensor.dtype, count=tensor.numel(), offset=1)
    return moved.view(tensor.shape)


GOOD = make(20, 64, 4, 32, "integer", bias=torch.float32)
WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("bits", {"bits": 5}, "bits must be one of 2, 3, 4, 8, got 5"),
    ("bits and codes", {"bits": 3}, r"codes must be int32 \(P, I \* 3 / 32, 16\).*got int32 \(2, 8, 16\)"),
    ("codes' dtype", {"codes": GOOD.panels.codes.long()}, r"got int64 \(2, 8, 16\)"),
    ("codes' shape", {"codes": GOOD.panels.codes[0]}, r"got int32 \(8, 16\)"),
    ("codes' lanes", {"codes": GOOD.panels.codes[..., :8]}, r"got int32 \(2, 8, 8\)"),
    ("codes' strides", {"codes": GOOD.panels.codes.transpose(0, 2).contiguous().transpose(0, 2)}, "codes has strides"),
    ("codes' address", {"codes": misalign(GOOD.panels.codes)}, "multiple of 4"),
    ("group that does not divide", {"group_size": 96}, "divides 64 in features, got 96"),
    ("group too small", {"group_size": 16}, "multiple of 32 .* got 16"),
    ("no group", {"group_size": 0}, "got 0"),
    ("group and scale", {"group_size": 64}, r"scale must be .* \(2, 1, 16\), got float32 \(2, 2, 16\)"),
    ("too many rows", {"out_features": 33}, "2 panels of 16 rows do not make 33 out features"),
    ("too few rows", {"out_features": 16}, "do not make 16 out features"),
    ("no rows", {"out_features": 0}, "do not make 0"),
    ("x's width", {"x": torch.zeros(2, 65)}, r"x must be .* \(\.\.\., 64\), got float32 \(2, 65\)"),
    ("x's dtype", {"x": torch.zeros(2, 64, dtype=torch.float64)}, r"got float64 \(2, 64\)"),
    ("x's dimensions", {"x": torch.zeros(())}, r"got float32 \(\)"),
    ("x's address", {"x": misalign(torch.zeros(2, 64))}, "multiple of 4"),
    ("x's address, 16 bit", {"x": misalign(torch.zeros(2, 64, dtype=torch.bfloat16))}, "multiple of 2"),
    ("scale's dtype", {"scale": GOOD.panels.scale.double()}, r"got float64 \(2, 2, 16\)"),
    ("scale's strides", {"scale": GOOD.panels.scale.transpose(0, 1).contiguous().transpose(0, 1)}, "scale has strides"),
    ("scale's address", {"scale": misalign(GOOD.panels.scale)}, "multiple of 4"),
    ("zero's dtype", {"zero": GOOD.panels.scale.half()}, r"zero must be uint8 or torch.float32 .*got float16"),
    ("zero's shape", {"zero": torch.zeros(2, 2, 15, dtype=torch.uint8)}, r"got uint8 \(2, 2, 15\)"),
    ("zero's address", {"zero": misalign(GOOD.panels.scale)}, "multiple of 4"),
    ("bias's dtype", {"bias": torch.zeros(20).half()}, r"bias must be float32 or torch.float32 \(20,\), got float16"),
    ("bias's shape", {"bias": torch.zeros(32)}, r"got float32 \(32,\)"),
    ("bias's strides", {"bias": torch.zeros(40)[::2]}, "bias has strides"),
    ("bias's address", {"bias": misalign(torch.zeros(20))}, "misaligned"),
]


@pytest.mark.parametrize("what, change, message", WRONG, ids=[what for what, _, _ in WRONG])
@pytest.mark.parametrize("tokens", [2, 20])
def test_bad_input_is_refused(body: str, what: str, change: dict[str, Any], message: str, tokens: int) -> None:
    p = GOOD.panels
    given: dict[str, Any] = {
        "x": torch.zeros(tokens, 64), "codes": p.codes, "scale": p.scale, "zero": p.zero, "bias": GOOD.bias,
        "bits": 4, "group_size": 32, "out_features": 20,
    }  # fmt: skip
    assert weight_matmul(*given.values()).shape == (tokens, 20)
    with pytest.raises(ValueError, match=message):
        weight_matmul(*{**given, **change}.values())


@pytest.mark.parametrize("name", ["codes", "scale", "zero", "bias"])
def test_tensors_on_another_device_are_refused(body: str, name: str) -> None:
    p = GOOD.panels
    parts = {"codes": p.codes, "scale": p.scale, "zero": p.zero, "bias": GOOD.bias}
    parts[name] = torch.empty_like(parts[name], device="meta")
    with pytest.raises(ValueError, match="must be on one device, got"):
        weight_matmul(torch.zeros(2, 64), *parts.values(), 4, 32, 20)  # type: ignore[arg-type]


# -- PyTorch's rules for operators ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [1, 20])
def test_opcheck(body: str, tokens: int) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for case in (GOOD, make(32, 64, 3)):
            p = case.panels
            arguments = (make_x(tokens, 64, dtype=dtype), p.codes, p.scale, p.zero, case.bias, p.bits, 32, p.shape[0])
            torch.library.opcheck(torch.ops.compress.weight_matmul.default, arguments)


def test_fake_tensors_are_checked_too() -> None:
    p = GOOD.panels
    on_meta = [None if one is None else one.to("meta") for one in (p.codes, p.scale, p.zero, GOOD.bias)]
    y = weight_matmul(torch.empty(3, 5, 64, device="meta", dtype=torch.float16), *on_meta[:3], None, 4, 32, 20)  # type: ignore[arg-type]
    assert y.shape == (3, 5, 20) and y.dtype == torch.float16 and y.is_meta
    with pytest.raises((ValueError, RuntimeError), match=r"x must be .* got float32 \(3, 63\)"):
        weight_matmul(torch.empty(3, 63, device="meta"), *on_meta, 4, 32, 20)  # type: ignore[arg-type]


def test_the_whole_graph_compiles(body: str) -> None:
    case = make(20, 64, bias=torch.float32)
    p = case.panels

    def layer(x: Tensor) -> Tensor:
        return weight_matmul(x * 2, p.codes, p.scale, p.zero, case.bias, 4, 32, 20).relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (1, 3, 20, 21):
        x = make_x(tokens, 64)
        torch.testing.assert_close(compiled(x), layer(x), rtol=0, atol=0)
