"""Rotary embedding: the kernel and torch's operators against an oracle in fp64, in every way that reaches them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from layouts import LAYOUTS, Layout
from solver import library
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import qkv
from qkv import kernels
from qkv.kernels import rotation as entry_points
from qkv.rotation import Rotation, rotate_by_operators

present = pytest.mark.skipif(kernels.absence() is not None, reason=str(kernels.absence()))
has_fast_path = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_rotate is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


ISAS = kernels.supported_isas() if kernels.absence() is None else []
NATIVE = [pytest.param(isa, id=f"native-{isa}") for isa in ISAS]


@pytest.fixture(params=["torch's operators", *NATIVE])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of the kernel, and its absence."""
    with kernels.use(library(request.param) if request.param in ISAS else "not used"):
        yield request.param


# The oracle


def rotated(x: Tensor, cos: np.ndarray, sin: np.ndarray, rotation: Rotation) -> Tensor:
    """``x (B, H, L, D)`` in fp64, pair by pair, by cos and sin ``(B, L, pairs, 2)`` of both channels of a pair."""
    out = x.double().clone()
    for pair in range(cos.shape[2]):
        one, two = (2 * pair, 2 * pair + 1) if rotation.interleaved else (pair, pair + cos.shape[2])
        c, s = (torch.from_numpy(table[:, None, :, pair]).double() for table in (cos, sin))
        first, second = x[..., one].double(), x[..., two].double()
        if rotation.inverse:  # the transposed matrix
            out[..., one] = c[..., 0] * first + s[..., 1] * second
            out[..., two] = c[..., 1] * second - s[..., 0] * first
        else:
            out[..., one] = c[..., 0] * first - s[..., 0] * second
            out[..., two] = c[..., 1] * second + s[..., 1] * first
    return out


def tables_of(rotation: Rotation, batch: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Cos and sin ``(B, L, pairs, 2)`` in fp64, of the angles as they are defined: rounded to fp32 twice."""
    if rotation.cos is not None:
        both = (rotation.cos, rotation.sin)
        wide = [table.double().expand(batch, tokens, -1).numpy() for table in both if table is not None]
        halves = [np.stack(np.split(table, 2, axis=2) if rotation.halves else [table] * 2, axis=3) for table in wide]
        return halves[0], halves[1]
    assert rotation.frequencies is not None
    frequencies = rotation.frequencies.expand(batch, tokens, -1).numpy()
    angles = np.zeros(frequencies.shape, np.float32)
    for b, i, n in np.ndindex(*angles.shape):
        if rotation.positions is None:
            offsets = rotation.offsets
            position = rotation.offset + i + (0 if offsets is None else int(offsets[b if len(offsets) > 1 else 0]))
        else:
            positions = rotation.positions[(None,) * (3 - rotation.positions.dim())].expand(-1, batch, tokens)
            position = int(positions[0 if rotation.axes is None else int(rotation.axes[n]), b, i])
        angles[b, i, n] = np.float32(position) * np.float32(rotation.position_scale) * frequencies[b, i, n]
    wide = angles.astype(np.float64)[..., None].repeat(2, axis=3)
    return np.cos(wide) * rotation.attention_factor, np.sin(wide) * rotation.attention_factor


def assert_near_oracle(got: Tensor, x: Tensor, rotation: Rotation) -> None:
    """Off by at most the roundings of each term, in units u of 2^-24, and one of the result.

    Of each term: 2 u for cos or sin (1 ulp), and u each for the attention factor, the product and the sum.
    """
    cos, sin = tables_of(rotation, x.shape[0], x.shape[2])
    want = rotated(x, cos, sin, rotation)
    largest = max(np.abs(cos).max(initial=0), np.abs(sin).max(initial=0))
    magnitude = np.abs(x.double().numpy()).max(initial=0) * 2 * largest
    info = torch.finfo(got.dtype)
    bound = 5 * 2.0**-24 * magnitude + want.abs() * info.eps / 2 + info.smallest_normal * info.eps
    assert got.dtype is x.dtype and got.shape == x.shape
    assert ((got.double() - want).abs() <= bound).all(), f"off by {(got.double() - want).abs().max()}"


def frequencies(pairs: int) -> Tensor:
    return 100.0 ** (-torch.arange(pairs) / pairs)


def by_angles(pairs: int, **fields: Any) -> Rotation:
    return Rotation(frequencies=frequencies(pairs), **fields)


ROWS, TOKENS, PAIRS = 3, 7, 5
AXES = torch.tensor([0, 2, 1, 0, 2])
ROTATIONS: dict[str, Rotation] = {
    "an offset": by_angles(PAIRS, offset=11),
    "an offset for each row": by_angles(PAIRS, offset=2, offsets=torch.tensor([0, -300, 77])),
    "an offset of one row": by_angles(PAIRS, offsets=torch.tensor([5])),
    "positions": by_angles(PAIRS, positions=torch.randint(-90, 90, (TOKENS,))),
    "positions of rows": by_angles(PAIRS, positions=torch.randint(-90, 90, (ROWS, TOKENS)), position_scale=0.3),
    "positions of one row": by_angles(PAIRS, positions=torch.randint(-90, 90, (1, TOKENS)), attention_factor=1.3),
    "strided positions": by_angles(PAIRS, positions=torch.randint(-90, 90, (TOKENS, ROWS)).T),
    "positions in int32": by_angles(PAIRS, positions=torch.randint(-90, 90, (ROWS, TOKENS), dtype=torch.int32)),
    "axes": by_angles(PAIRS, positions=torch.randint(-90, 90, (3, ROWS, TOKENS)), axes=AXES),
    "axes of one row": by_angles(PAIRS, positions=torch.randint(-90, 90, (3, 1, TOKENS)), axes=AXES),
    "frequencies of rows": Rotation(frequencies=torch.rand(ROWS, 1, PAIRS), offset=40),
    "frequencies of tokens": Rotation(frequencies=torch.rand(TOKENS, PAIRS), offset=40),
    "frequencies of both": Rotation(frequencies=torch.rand(ROWS, TOKENS, PAIRS), positions=torch.arange(TOKENS)),
    "strided frequencies": Rotation(frequencies=torch.rand(ROWS, TOKENS, 2 * PAIRS)[..., ::2], offset=3),
    "tables": Rotation(cos=torch.randn(ROWS, TOKENS, PAIRS), sin=torch.randn(ROWS, TOKENS, PAIRS)),
    "tables of one row": Rotation(cos=torch.randn(1, TOKENS, PAIRS), sin=torch.randn(TOKENS, PAIRS)),
    "tables of one token": Rotation(cos=torch.randn(ROWS, 1, PAIRS), sin=torch.randn(1, PAIRS)),
    "halves": Rotation(cos=torch.randn(1, TOKENS, 2 * PAIRS), sin=torch.randn(1, TOKENS, 2 * PAIRS), halves=True),
    "halves in bf16": Rotation(
        cos=torch.randn(ROWS, TOKENS, 2 * PAIRS).bfloat16(),
        sin=torch.randn(ROWS, TOKENS, 2 * PAIRS).bfloat16(),
        halves=True,
    ),
    "strided tables": Rotation(cos=torch.randn(TOKENS, 2 * PAIRS)[:, ::2], sin=torch.randn(PAIRS, TOKENS).mT),
}
BY_TABLES = [name for name, rotation in ROTATIONS.items() if rotation.cos is not None]


@pytest.mark.parametrize("name", ROTATIONS)
def test_every_rotation_is_that_of_the_oracle(way: str, name: str) -> None:
    for dtype in DTYPES:
        for interleaved in (False, True):
            for inverse in (False, True):
                rotation = ROTATIONS[name]._replace(interleaved=interleaved, inverse=inverse)
                q, k = torch.randn(ROWS, 4, TOKENS, 12).to(dtype), torch.randn(ROWS, 1, TOKENS, 12).to(dtype)
                got = kernels.rotate([q, k], rotation)
                for one, of_one in zip((q, k), got, strict=True):
                    assert_near_oracle(of_one, one, rotation)
                    assert torch.equal(kernels.rotate([one], rotation)[0], of_one)  # alone


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_changes_no_bit(way: str, default: torch.dtype) -> None:
    x = torch.randn(ROWS, 2, TOKENS, 12)
    for rotation in ROTATIONS.values():
        (want,) = kernels.rotate([x], rotation)
        torch.set_default_dtype(default)
        try:
            (got,) = kernels.rotate([x], rotation)
        finally:
            torch.set_default_dtype(torch.float32)
        assert torch.equal(got, want)


@pytest.mark.parametrize("name", BY_TABLES)
def test_by_given_tables_the_kernel_has_the_bits_of_torchs_operators(way: str, name: str) -> None:
    for dtype in DTYPES:
        for interleaved in (False, True):
            for inverse in (False, True):
                rotation = ROTATIONS[name]._replace(interleaved=interleaved, inverse=inverse)
                x = torch.randn(ROWS, 2, TOKENS, 13).to(dtype)
                assert torch.equal(kernels.rotate([x], rotation)[0], rotate_by_operators(x, rotation))


@pytest.mark.parametrize("pairs", [1, 2, 4, 7, 8, 9, 16, 31, 64, 65, 130])
def test_any_number_of_pairs_and_of_other_channels(way: str, pairs: int) -> None:
    for others in (0, 1, 3, 40):
        for interleaved in (False, True):
            rotation = by_angles(pairs, offset=3, interleaved=interleaved)
            x = torch.randn(1, 2, 3, 2 * pairs + others)
            (got,) = kernels.rotate([x], rotation)
            assert_near_oracle(got, x, rotation)
            assert torch.equal(got[..., 2 * pairs :], x[..., 2 * pairs :])


@pytest.mark.parametrize("tokens", [0, 1, 2, 7, 8, 9, 31, 257])
def test_any_number_of_tokens(way: str, tokens: int) -> None:
    for batch in (0, 1, 3):
        for rotation in (by_angles(4, offset=9), by_angles(4, positions=torch.randint(0, 99, (batch, tokens)))):
            q, k = torch.randn(batch, 3, tokens, 8), torch.randn(batch, 0, tokens, 8)
            got_q, got_k = kernels.rotate([q, k], rotation)
            assert_near_oracle(got_q, q, rotation)
            assert got_k.shape == k.shape


def test_angles_of_any_size(way: str) -> None:
    """Up to 2^62: beyond 2^31 rad, the sines of the C library."""
    sizes = [2**e + d for e in (0, 10, 16, 20, 24, 30, 31, 32, 40, 61) for d in (-1, 0, 1)]
    positions = torch.tensor([sign * size for size in sizes for sign in (1, -1)])
    slow = torch.tensor([1.0, 0.7, 0.01, 1e-6, 1.9, 3.1, 0.0, 0.5, 11.0])
    rotation = Rotation(positions=positions, frequencies=slow)
    x = torch.randn(1, 1, len(positions), 18)
    assert_near_oracle(kernels.rotate([x], rotation)[0], x, rotation)


@present
@pytest.mark.parametrize("isa", NATIVE)
def test_sines_are_within_half_a_unit_and_a_thousandth(isa: str) -> None:
    """Channels (1, 0) become (cos, sin)."""
    for size in (1, 100, 2**20, 2**30):
        rotation = Rotation(positions=torch.randint(-size, size + 1, (64,)), frequencies=torch.rand(32))
        x = torch.tensor([1.0, 0.0]).repeat(1, 1, 64, 32)
        with kernels.use(library(isa)):
            (got,) = kernels.rotate([x], rotation._replace(interleaved=True))
        cos, sin = tables_of(rotation, 1, 64)
        want = np.stack([cos[0, ..., 0], sin[0, ..., 0]], axis=-1).reshape(64, 64)
        units = np.spacing(np.abs(want).astype(np.float32)).astype(np.float64)
        assert (np.abs(got[0, 0].double().numpy() - want) / units).max() <= 0.501


def test_angles_that_are_no_numbers_make_no_numbers(way: str) -> None:
    rotation = Rotation(frequencies=torch.tensor([1.0, torch.inf, torch.nan, 0.5]), offset=1)
    (got,) = kernels.rotate([torch.ones(1, 1, 1, 8)], rotation)
    assert got[0, 0, 0].isnan().tolist() == [False, True, True, False] * 2


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_any_layout(way: str, layout: Layout) -> None:
    rotation = ROTATIONS["positions of rows"]
    for dtype in DTYPES:
        for interleaved in (False, True):
            q, k = (layout(torch.randn(ROWS, heads, TOKENS, 12).to(dtype)) for heads in (4, 2))
            before = [q.clone(), k.clone()]
            turn = rotation._replace(interleaved=interleaved)
            for got, one, copy in zip(kernels.rotate([q, k], turn), (q, k), before, strict=True):
                assert torch.equal(one, copy)
                assert_near_oracle(got, copy, turn)


@present
def test_results_lie_as_those_who_read_them_want() -> None:
    """Rows of a head next to each other for attention; heads of a token for the gradient of a projection."""
    x = torch.randn(2, 5, 3, 12).transpose(1, 2)
    for given in (x, x.requires_grad_()):
        (got,) = kernels.rotate([given], by_angles(3))
        assert got.is_contiguous() and got.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    (gradient,) = torch.autograd.grad(got.sum(), x)
    assert gradient.transpose(1, 2).is_contiguous()


@present
@pytest.mark.parametrize("isa", NATIVE)
def test_a_row_has_the_bits_that_it_has_alone(isa: str) -> None:
    rotation = by_angles(20, positions=torch.randint(0, 900, (2, 130)))
    q, k = torch.randn(2, 8, 130, 48), torch.randn(2, 2, 130, 48)
    threads = torch.get_num_threads()
    with kernels.use(library(isa)):
        try:
            torch.set_num_threads(1)
            alone = kernels.rotate([q, k], rotation)
            torch.set_num_threads(3)
            together = kernels.rotate([q, k], rotation)
        finally:
            torch.set_num_threads(threads)
        assert all(map(torch.equal, alone, together))
        for b, i in ((0, 0), (1, 129), (1, 64)):
            of_row = rotation._replace(positions=rotation.positions[b : b + 1, i : i + 1])  # type: ignore[index]
            (row,) = kernels.rotate([q[b : b + 1, 3:4, i : i + 1]], of_row)
            assert torch.equal(row[0, 0, 0], alone[0][b, 3, i])


# Gradients


@pytest.mark.parametrize("name", ROTATIONS)
def test_gradients_are_those_of_the_oracle(way: str, name: str) -> None:
    for dtype in DTYPES:
        rotation = ROTATIONS[name]
        q, k = (torch.randn(ROWS, heads, TOKENS, 12).to(dtype).requires_grad_() for heads in (4, 1))
        above = [torch.randn_like(one.detach()) for one in (q, k)]
        got = torch.autograd.grad(kernels.rotate([q, k], rotation), [q, k], above)
        for gradient, of_out in zip(got, above, strict=True):
            assert_near_oracle(gradient, of_out, rotation._replace(inverse=True))


def test_gradients_where_one_of_both_has_them(way: str) -> None:
    q, k = torch.randn(2, 4, 3, 8, requires_grad=True), torch.randn(2, 1, 3, 8)
    rotation = by_angles(4, offset=2)
    rotated_q, rotated_k = kernels.rotate([q, k], rotation)
    (gradient,) = torch.autograd.grad(rotated_q.sum() + rotated_k.sum(), q)
    assert_near_oracle(gradient, torch.ones_like(gradient), rotation._replace(inverse=True))


def test_second_derivatives(way: str) -> None:
    """The rotation is linear: that of the sum of squares is twice the identity."""
    x, rotation = torch.randn(1, 2, 3, 8, requires_grad=True), by_angles(4, offset=2)
    (out,) = kernels.rotate([x], rotation)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    direction = torch.randn_like(x)
    (second,) = torch.autograd.grad(gradient, x, direction)
    torch.testing.assert_close(gradient, 2 * x, rtol=0, atol=20 * 2.0**-24 * x.abs().max().item())
    torch.testing.assert_close(second, 2 * direction, rtol=0, atol=20 * 2.0**-24 * direction.abs().max().item())


def test_double_precision_passes_gradcheck() -> None:
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    for interleaved in (False, True):
        cos, sin = torch.randn(2, 3, 6, dtype=torch.float64)
        rotation = Rotation(cos=cos, sin=sin, halves=True, interleaved=interleaved)
        assert torch.autograd.gradcheck(lambda x, r=rotation: kernels.rotate([x], r)[0], x, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(lambda x, r=rotation: kernels.rotate([x], r)[0], x)


def test_gradients_of_tables(way: str) -> None:
    """By torch's operators."""
    cos, sin, x = (torch.randn(*shape, requires_grad=True) for shape in ((3, 4), (3, 4), (1, 2, 3, 8)))
    (out,) = kernels.rotate([x], Rotation(cos=cos, sin=sin))
    d_cos, d_sin = torch.autograd.grad(out.sum(), [cos, sin])
    first, second = x.detach().chunk(2, dim=-1)
    torch.testing.assert_close(d_cos, (first + second).sum((0, 1)))
    torch.testing.assert_close(d_sin, (first - second).sum((0, 1)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_batched_gradients(way: str, interleaved: bool) -> None:
    x = torch.randn(1, 2, 3, 8, requires_grad=True)
    (out,) = kernels.rotate([x], by_angles(4, interleaved=interleaved))
    above = torch.randn(5, *out.shape)
    (got,) = torch.autograd.grad(out, x, above, is_grads_batched=True, retain_graph=True)
    want = torch.stack([torch.autograd.grad(out, x, one, retain_graph=True)[0] for one in above])
    torch.testing.assert_close(got, want, rtol=0, atol=10 * 2.0**-24 * above.abs().max().item())


@pytest.mark.filterwarnings("ignore:`torch.jit")  # by torch's forward mode
@pytest.mark.parametrize("name", ["an offset for each row", "positions", "axes", "frequencies of both", "halves"])
def test_transforms_of_functorch(way: str, name: str) -> None:
    """Bits as without: derivatives, and maps over heads, rows and rotations, alone and nested."""
    rotation, x = ROTATIONS[name], torch.randn(ROWS, 2, TOKENS, 12)

    def turn(x: Tensor) -> Tensor:
        return kernels.rotate([x], rotation)[0]

    want, weights = turn(x), torch.randn(x.shape)
    (gradient,) = kernels.rotate([weights], rotation._replace(inverse=True))
    assert torch.equal(torch.func.grad(lambda x: (turn(x) * weights).sum())(x), gradient)
    assert torch.equal(torch.func.jvp(turn, (x,), (weights,))[1], turn(weights))
    assert torch.equal(torch.vmap(turn)(torch.stack([x, weights])), torch.stack([want, turn(weights)]))
    assert torch.equal(torch.vmap(lambda one: turn(one[:, None])[:, 0], in_dims=1, out_dims=1)(x), want)
    of_each = torch.func.vmap(torch.func.grad(lambda x, w: (turn(x) * w).sum()))(
        torch.stack([x, x]), weights[None].expand(2, -1, -1, -1, -1)
    )
    assert torch.equal(of_each, torch.stack([gradient, gradient]))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, weights)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(turn(dual)).tangent, turn(weights))


@pytest.mark.parametrize("name", [name for name, rotation in ROTATIONS.items() if "row" in name or "both" in name])
def test_maps_over_the_fields_of_a_rotation(way: str, name: str) -> None:
    """Each of three rotations, of tensors that are mapped with it or not."""
    rotation = ROTATIONS[name]
    fields = {name: field for name, field in rotation._asdict().items() if isinstance(field, Tensor) and name != "axes"}
    names, many = [*fields], [torch.stack([t, t.flip(-1), t.roll(1, -1)]) for t in fields.values()]
    x = torch.randn(3, ROWS, 2, TOKENS, 12)

    def turn(x: Tensor, *tensors: Tensor) -> Tensor:
        return kernels.rotate([x], rotation._replace(**dict(zip(names, tensors, strict=True))))[0]

    want = [turn(x[n], *(t[n] for t in many)) for n in range(3)]
    assert torch.equal(torch.vmap(turn)(x, *many), torch.stack(want))
    want = [turn(x[0], *(t[n] for t in many)) for n in range(3)]
    assert torch.equal(torch.vmap(turn, in_dims=(None, *[0] * len(many)))(x[0], *many), torch.stack(want))


# Programs, modes and kinds of tensors


class Turn(nn.Module):
    def __init__(self, rotation: Rotation) -> None:
        super().__init__()
        self.rotation = rotation

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q, k = kernels.rotate([q, k], self.rotation)
        return q, k


def heads(*, requires_grad: bool = False) -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, 4, TOKENS, 12, requires_grad=requires_grad), torch.randn(ROWS, 1, TOKENS, 12)


TRACED = ["an offset", "axes", "halves"]


@pytest.mark.parametrize("name", TRACED)
def test_compiled_calls_and_their_gradients_have_the_same_bits(name: str) -> None:
    torch._dynamo.reset()
    turn, (q, k) = Turn(ROTATIONS[name]), heads(requires_grad=True)
    compiled = torch.compile(turn, backend="aot_eager", fullgraph=True)
    got, want = compiled(q, k), turn(q, k)
    assert all(map(torch.equal, got, want))
    above = [torch.randn_like(one) for one in want]
    gradients = [torch.autograd.grad(out[0], q, above[0])[0] for out in (got, want)]
    assert torch.equal(*gradients)
    with torch.no_grad():
        assert all(map(torch.equal, compiled(q, k), want))


@pytest.mark.filterwarnings("ignore")  # of the tracers' own making
@pytest.mark.parametrize("name", TRACED)
def test_exported_and_traced_calls_have_the_same_bits(name: str) -> None:
    turn, (q, k) = Turn(ROTATIONS[name]), heads()
    exported = torch.export.export(turn, (q, k), strict=False)
    if kernels.absence() is None:
        assert "qkv.rotate" in str(exported.graph)
    other = heads()
    for program in (exported.module(), torch.jit.trace(turn, (q, k)), make_fx(turn)(q, k)):
        assert all(map(torch.equal, program(*other), turn(*other)))


@present
def test_the_operator_passes_opcheck() -> None:
    q, k = heads(requires_grad=True)
    for name in ("an offset for each row", "axes", "halves"):
        torch.library.opcheck(torch.ops.qkv.rotate.default, ([q, k], *ROTATIONS[name]))


def test_modes_and_kinds_of_tensors(way: str) -> None:
    rotation, (q, k) = ROTATIONS["positions of rows"], heads()
    want = kernels.rotate([q, k], rotation)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(map(torch.equal, kernels.rotate([q, k], rotation), want))
    with torch.inference_mode():
        assert all(map(torch.equal, kernels.rotate([q.clone(), k], rotation), want))
    on_meta = kernels.rotate([q.to("meta")], Rotation(frequencies=frequencies(PAIRS).to("meta")))
    assert on_meta[0].is_meta and on_meta[0].shape == q.shape
    assert torch.equal(kernels.rotate([nn.Parameter(q)], rotation)[0], want[0])
    negated = torch.complex(k, q).conj().imag  # -q, in memory q
    assert negated.is_neg() and torch.equal(kernels.rotate([negated], rotation)[0], -want[0])

    class Subclass(Tensor):
        pass

    assert type(kernels.rotate([q.as_subclass(Subclass)], rotation)[0]) is Subclass
    together = kernels.rotate([q, k.bfloat16()], rotation)  # of two dtypes
    assert together[1].dtype is torch.bfloat16
    wide = kernels.rotate([q.double(), k.double()], rotation)
    assert wide[0].dtype is torch.float64
    torch.testing.assert_close(wide[0].float(), want[0])


def test_an_offset_beyond_64_bits_is_refused_as_by_torch(way: str) -> None:
    with pytest.raises((RuntimeError, OverflowError, TypeError)):
        kernels.rotate([torch.randn(1, 1, 2, 8)], by_angles(4, offset=1 << 70))


REFUSED: dict[str, tuple[list[Tensor], Rotation, type[Exception], str]] = {
    "other heads": (
        [torch.ones(1, 1, 2, 8), torch.ones(1, 1, 3, 8)],
        by_angles(4),
        ValueError,
        r"differ only in the number of heads; got torch\.float32 \(1, 1, 2, 8\) and torch\.float32 \(1, 1, 3, 8\)",
    ),
    "too many pairs": ([torch.ones(1, 1, 2, 8)], by_angles(5), ValueError, "at least 10 channels; got 8"),
    "three tensors": ([torch.ones(1, 1, 2, 8)] * 3, by_angles(4), ValueError, "one or two tensors; got 3"),
    "other axes": (
        [torch.ones(1, 1, 2, 8)],
        by_angles(2, positions=torch.ones(3, 1, 2, dtype=torch.int64), axes=torch.tensor([0, 3])),
        ValueError,
        r"axes must be those of the positions, \(3, 1, 2\); got tensor\(\[0, 3\]\)",
    ),
    "other positions": ([torch.ones(1, 1, 2, 8)], by_angles(4, positions=torch.arange(3)), RuntimeError, "expand"),
    "other tables": (
        [torch.ones(1, 1, 2, 8)],
        Rotation(cos=torch.ones(3, 4), sin=torch.ones(2, 4)),
        RuntimeError,
        "ex",
    ),
}


@present
@pytest.mark.parametrize("name", REFUSED)
def test_the_native_operator_refuses_what_it_would_read_beyond(name: str) -> None:
    x, rotation, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        torch.ops.qkv.rotate(x, *rotation)
    assert entry_points._fast_rotate(x, rotation) is None


# Which way a call takes


class Calls:
    """The library, counting its calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fast = self.slow = 0
        given = kernels.loaded()
        fast = given.fast_rotate

        def count_fast(*arguments: Any) -> int:
            self.fast += 1
            assert fast is not None
            return fast(*arguments)

        def count(packed: bytes) -> int:
            self.slow += 1
            return given.rotate(packed)

        self.library = given._replace(rotate=count, fast_rotate=None if fast is None else count_fast)

    def of(self, call: Callable[[], object]) -> tuple[int, int]:
        """How often the call went through the fast path and past it."""
        self.fast = self.slow = 0
        with kernels.use(self.library):
            call()
        return self.fast, self.slow


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return Calls(monkeypatch)


@has_fast_path
@pytest.mark.parametrize("name", ROTATIONS)
def test_calls_and_gradients_take_the_fast_path(calls: Calls, name: str) -> None:
    q, k = heads()
    rotation, q = ROTATIONS[name], q.requires_grad_()
    once = (1, int("int32" in name or name in ("strided tables", "strided frequencies")))
    with torch.no_grad():
        assert calls.of(lambda: kernels.rotate([q, k], rotation)) == once
    assert calls.of(lambda: kernels.rotate([q, k], rotation)) == once
    out, other = kernels.rotate([q, k], rotation)
    assert out.requires_grad and not other.requires_grad
    assert calls.of(lambda: out.backward(torch.randn(out.shape))) == once


ROTARY = qkv.RotaryEmbedding(8)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "attention": lambda: qkv.CausalAttention(32, 4, num_kv_heads=2, rotary=ROTARY),
    "norms": lambda: qkv.CausalAttention(32, 4, rotary=ROTARY, qk_norm=True),
    "by the length": lambda: qkv.CausalAttention(
        32, 4, rotary=qkv.RotaryEmbedding(8, scaling=qkv.RotaryScaling.dynamic(2.0, max_position_embeddings=4))
    ),
    "latent": lambda: qkv.LatentAttention(
        32, 4, kv_rank=8, nope_dim=8, rope_dim=8, mask=qkv.Mask.causal(), rotary=ROTARY
    ),
}


@has_fast_path
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_rotates_queries_and_keys_by_one_call(calls: Calls, name: str) -> None:
    layer, x = LAYERS[name](), torch.randn(2, 9, 32)
    cache = layer.make_cache()  # type: ignore[operator]
    watched = layer.out_proj.register_forward_hook(lambda *_: None)  # or the one call that a step takes rotates
    with torch.no_grad():
        assert calls.of(lambda: layer(x, cache=cache)) == (1, 0)
        assert calls.of(lambda: layer(x[:, :1], cache=cache)) == (1, 0)
    watched.remove()
    assert calls.of(lambda: layer(x).sum().backward()) == (2, 0)
    for call in (layer, lambda x: layer(x, positions=torch.arange(9))):
        with kernels.use("the kernel is absent"):
            want = call(x)
        torch.testing.assert_close(call(x), want, atol=1e-5, rtol=1e-5)


@has_fast_path
def test_other_layers_take_as_few_calls(calls: Calls) -> None:
    x = torch.randn(2, 5, 32)
    first, second = qkv.CausalAttention(32, 4, rotary=ROTARY), qkv.CrossLayerAttention(32, 4, rotary=ROTARY)
    halves = qkv.DifferentialAttention(32, 2, rotary=ROTARY)
    nested = torch.nested.nested_tensor([torch.randn(3, 32), torch.randn(5, 32)], layout=torch.jagged)
    patches = qkv.MultiHeadAttention(32, 4, rotary=qkv.RotaryEmbedding2d(8))
    cache = qkv.KVCache()
    with torch.no_grad():
        first(x, cache=cache)
        assert calls.of(lambda: second(x, cache=cache)) == (1, 0)
        assert calls.of(lambda: halves(x)) == (2, 0)
        assert calls.of(lambda: first(nested)) == (1, 0)
        assert calls.of(lambda: patches(x, positions=torch.randint(0, 9, (2, 5)))) == (1, 0)


def test_a_rotary_that_is_changed_is_called_as_a_module() -> None:
    """Hooks and other ``forward`` methods see queries and keys one by one."""
    seen: list[Tensor] = []

    class Own(qkv.RotaryEmbedding):
        def forward(self, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
            seen.append(x)
            return x

    x, patched, hooked = torch.randn(1, 3, 32), qkv.RotaryEmbedding(8), qkv.RotaryEmbedding(8)
    hooked.register_forward_hook(lambda module, inputs, out: seen.append(out))
    patched.forward = lambda x, *arguments, **options: seen.append(x) or x  # type: ignore[method-assign, func-returns-value]
    for rotary in (Own(8), patched, hooked):
        seen.clear()
        qkv.CausalAttention(32, 4, num_kv_heads=2, rotary=rotary)(x)
        assert [one.shape[1] for one in seen] == [4, 2]
    with torch.nn.modules.module.register_module_forward_hook(lambda module, inputs, out: seen.append(module)):
        seen.clear()
        qkv.CausalAttention(32, 4, rotary=ROTARY)(x)
        assert sum(one is ROTARY for one in seen) == 2


def test_any_number_of_dimensions() -> None:
    x, rotary = torch.randn(2, 3, 4, 5, 8), qkv.RotaryEmbedding(8)
    want = rotary(x[0], 3)
    assert torch.equal(rotary(x, 3)[0], want)
    assert torch.equal(rotary(x[0, 0], 3), want[0])
    assert torch.equal(rotary(x[0, 0, 0], 3), want[0, 0])
    assert rotary(x[:0], 3).shape == (0, 3, 4, 5, 8)


def test_scores_of_layers_with_offsets_for_each_row(way: str) -> None:
    """Left padding and continuous batches: rows of a cache that differ in length, as each row alone."""
    layer, cache = qkv.CausalAttention(32, 4, num_kv_heads=2, rotary=ROTARY).eval(), qkv.KVCache()
    x, keep = torch.randn(2, 6, 32), torch.tensor([[False, False, True, True], [True, True, True, True]])
    with torch.no_grad():
        layer(x[:, :4], mask=qkv.Mask.padding(keep), cache=cache)
        step = layer(x[:, 4:5], cache=cache)
        for row, start in ((0, 2), (1, 0)):
            alone = layer(x[row : row + 1, start:5])
            torch.testing.assert_close(step[row], alone[0, -1:], atol=1e-5, rtol=1e-5)


def test_bf16_is_rounded_once(way: str) -> None:
    """At most half a unit from fp64, and as many roundings of fp32 as `assert_near_oracle` allows."""
    x = torch.randn(1, 4, 64, 64).bfloat16()
    rotation = by_angles(32, offset=1000)
    (got,) = kernels.rotate([x], rotation)
    assert_near_oracle(got, x, rotation)
    assert math.isfinite(got.float().sum().item())
