"""`RotaryEmbedding`, compared with complex numbers as in the paper, and with transformers."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qkv
from qkv import RotaryScaling


def rotated_by_complex_numbers(x: torch.Tensor, positions: torch.Tensor, base: float) -> torch.Tensor:
    """RoFormer, section 3.2.1: each pair of channels is a complex number, times ``exp(i * position * theta)``."""
    width = x.shape[-1]
    theta = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    rotation = torch.polar(torch.ones(len(positions), width // 2, dtype=torch.float64), positions[:, None] * theta)
    return torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * rotation).flatten(-2)


@pytest.mark.parametrize("offset", [0, 5, 1000])
def test_interleaved_pairs_rotate_as_complex_numbers(offset: int) -> None:
    x = torch.randn(2, 3, 7, 8)
    want = rotated_by_complex_numbers(x, torch.arange(7) + offset, 500.0)
    got = qkv.RotaryEmbedding(8, base=500.0, interleaved=True)(x, offset)
    torch.testing.assert_close(got, want.float(), rtol=1e-4, atol=1e-4)


def test_both_pairings_are_equal_up_to_the_order_of_channels() -> None:
    x, order = torch.randn(2, 3, 7, 8), torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    halves, pairs = qkv.RotaryEmbedding(8), qkv.RotaryEmbedding(8, interleaved=True)
    torch.testing.assert_close(halves(x[..., order], 3), pairs(x, 3)[..., order])


def test_equals_llama_in_transformers() -> None:
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=48, num_attention_heads=6, head_dim=8, max_position_embeddings=64)
    q, positions = torch.randn(2, 6, 7, 8), torch.arange(4, 11)[None]
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    want, _ = apply_rotary_pos_emb(q, q, cos, sin)
    torch.testing.assert_close(qkv.RotaryEmbedding(8)(q, 4), want)


def test_scores_depend_on_distance_alone() -> None:
    rotary, q, k = qkv.RotaryEmbedding(8).double(), *(torch.randn(1, 1, 1, 8, dtype=torch.float64) for _ in range(2))
    scores = [(rotary(q, 9 + shift) @ rotary(k, 4 + shift).mT).item() for shift in (0, 1, 50)]
    assert max(scores) - min(scores) < 1e-5  # positions times frequencies are fp32


def test_rotary_dim_leaves_the_other_channels_unchanged() -> None:
    x = torch.randn(2, 3, 7, 8)
    got = qkv.RotaryEmbedding(8, rotary_dim=4)(x, 3)
    assert torch.equal(got[..., 4:], x[..., 4:])
    torch.testing.assert_close(got[..., :4], qkv.RotaryEmbedding(4)(x[..., :4], 3))


def test_position_scale_and_frequencies() -> None:
    x = torch.randn(1, 1, 1, 8)
    torch.testing.assert_close(qkv.RotaryEmbedding(8, position_scale=0.25)(x, 20), qkv.RotaryEmbedding(8)(x, 5))
    slower = qkv.RotaryEmbedding(8, frequencies=qkv.RotaryEmbedding(8).frequencies / 4)
    torch.testing.assert_close(slower(x, 20), qkv.RotaryEmbedding(8)(x, 5))


def test_positions_beyond_the_precision_of_bf16_stay_apart() -> None:
    rotary = qkv.RotaryEmbedding(8).bfloat16()
    x = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)[:, :, :1].expand(-1, -1, 2, -1)
    out = rotary(x, 256)
    assert out.dtype == torch.bfloat16
    assert not torch.equal(out[:, :, 0], out[:, :, 1])  # 256 and 257 are the same bf16


# Positions by row, given in every way, are those of each row alone.

YARN = RotaryScaling.yarn(4.0, original_max_position_embeddings=64)
DYNAMIC = RotaryScaling.dynamic(4.0, max_position_embeddings=64)
LONG = RotaryScaling.longrope(
    short_factor=[1.0, 1.5], long_factor=[2.0, 9.0], original_max_position_embeddings=64, factor=4.0
)
ROTARIES: dict[str, Callable[[], qkv.RotaryEmbedding]] = {
    "plain": lambda: qkv.RotaryEmbedding(8, base=500.0),
    "partial, interleaved": lambda: qkv.RotaryEmbedding(8, rotary_dim=4, interleaved=True, position_scale=0.5),
    "yarn": lambda: qkv.RotaryEmbedding(8, scaling=YARN),
    "dynamic": lambda: qkv.RotaryEmbedding(8, scaling=DYNAMIC),
    "longrope, partial": lambda: qkv.RotaryEmbedding(8, rotary_dim=4, scaling=LONG),
    "sections": lambda: qkv.RotaryEmbedding(8, sections=(2, 1, 1), scaling=DYNAMIC),
    "interleaved sections": lambda: qkv.RotaryEmbedding(8, sections=[2, 1, 1], interleaved_sections=True),
}
STARTS = [3, 1000, 0]


@pytest.fixture(params=ROTARIES)
def rotary(request: pytest.FixtureRequest) -> qkv.RotaryEmbedding:
    return ROTARIES[request.param]()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("integers", [torch.int64, torch.int32, torch.int16])
def test_each_row_has_the_bits_that_it_has_alone(
    rotary: qkv.RotaryEmbedding, dtype: torch.dtype, integers: torch.dtype
) -> None:
    x, offset = torch.randn(3, 2, 5, 8, dtype=dtype), torch.tensor(STARTS, dtype=integers)
    want = torch.cat([rotary(row[None], start) for row, start in zip(x, STARTS, strict=True)])
    positions = offset[:, None] + torch.arange(5, dtype=integers)
    assert want.dtype is dtype
    assert torch.equal(rotary(x, offset), want)
    assert torch.equal(rotary(x, positions=positions), want)
    assert torch.equal(rotary(x[:1], positions=positions[0]), want[:1])
    assert torch.equal(rotary(x[:, :, :, :], positions=positions[1:2]), rotary(x, STARTS[1]))
    assert torch.equal(rotary(x, torch.tensor(7)), rotary(x, 7))


def test_positions_need_no_order(rotary: qkv.RotaryEmbedding) -> None:
    x, order = torch.randn(2, 3, 6, 8), torch.tensor([4, 0, 5, 1, 3, 2])
    assert torch.equal(rotary(x[:, :, order], positions=order), rotary(x)[:, :, order])


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_nothing_to_rotate(rotary: qkv.RotaryEmbedding, shape: tuple[int, ...]) -> None:
    x, rows, tokens = torch.randn(shape), shape[0], shape[2]
    for options in (
        {},
        {"offset": torch.zeros(rows, dtype=torch.int64)},
        {"positions": torch.zeros(tokens, dtype=torch.int64)},
        {"positions": torch.zeros(rows, tokens, dtype=torch.int64)},
    ):
        assert rotary(x, **options).shape == shape


@pytest.mark.parametrize("interleaved", [False, True])
def test_each_section_rotates_by_its_axis(interleaved: bool) -> None:
    """In fp64, pair by pair. Angles of up to 9 rad are rounded four times in fp32, cosines and sums four times."""
    rotary = qkv.RotaryEmbedding(16, base=100.0, sections=(4, 2, 2), interleaved_sections=interleaved, interleaved=True)
    x, positions = torch.randn(2, 3, 5, 16), torch.randint(0, 10, (3, 2, 5))
    axes = [0, 1, 2, 0, 1, 2, 0, 0] if interleaved else [0, 0, 0, 0, 1, 1, 2, 2]
    for row in range(2):
        for pair, axis in enumerate(axes):
            channels = x[row, :, :, 2 * pair : 2 * pair + 2].double()
            angles = positions[axis, row].double() * 100.0 ** (-2 * pair / 16)
            rotation = torch.polar(torch.ones(5, dtype=torch.float64), angles)
            want = torch.view_as_real(torch.view_as_complex(channels.contiguous()) * rotation)
            got = rotary(x, positions=positions)[row, :, :, 2 * pair : 2 * pair + 2]
            atol = 2 * x.abs().max().item() * (9 * 4 + 4) * 2**-24
            torch.testing.assert_close(got.double(), want, rtol=0, atol=atol)


def rotated_2d(x: Tensor, positions: Tensor, rotary: qkv.RotaryEmbedding2d) -> Tensor:
    """Rows and columns as two embeddings of half the channels each, or of one whole one."""
    halves = torch.arange(8)
    rows, columns = (halves < 2) | ((halves >= 4) & (halves < 6)), (halves % 4) >= 2
    out = x.clone()
    for axis, channels in enumerate((rows, columns)):
        frequencies = qkv.RotaryEmbedding(4 if not rotary.alternate else 8).frequencies
        half = qkv.RotaryEmbedding(4, frequencies=frequencies[axis::2] if rotary.alternate else frequencies)
        out[..., channels] = half(x[..., channels], positions=positions[axis])
    return out


@pytest.mark.parametrize("alternate", [False, True])
def test_rows_and_columns_rotate_half_of_the_pairs_each(alternate: bool) -> None:
    rotary, x = qkv.RotaryEmbedding2d(8, alternate=alternate), torch.randn(2, 3, 6, 8)
    grid = rotary.grid(2, 3)
    want = rotated_2d(x, grid, rotary)
    assert torch.equal(rotary(x, positions=grid), want)
    assert torch.equal(rotary(x, positions=grid[:, None].expand(2, 2, 6)), want)
    assert torch.equal(rotary(x, positions=torch.zeros_like(grid)), x)  # a class token
    assert repr(rotary) == f"RotaryEmbedding2d(8{', alternate=True' if alternate else ''})"
    assert rotary.grid(0, 3).shape == rotary.grid(3, 0).shape == (2, 0)
    assert rotary.grid(2, 3, device="meta").device.type == "meta"


# Every way to carry a module or to trace a call.


class EveryWay(nn.Module):
    """x, rotated with positions given in every way."""

    def __init__(self, rotary: qkv.RotaryEmbedding) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, offset: Tensor, positions: Tensor) -> Tensor:
        parts = [self.rotary(x), self.rotary(x, 62), self.rotary(x, offset), self.rotary(x, offset[0])]
        parts += [self.rotary(x, positions=positions), self.rotary(x, positions=positions[0])]
        parts += [self.rotary(x, positions=positions, length=positions + 40), self.rotary(x, length=100)]
        return torch.stack(parts)


def every_way(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(3, 2, tokens, 8), torch.tensor(STARTS), torch.randint(0, 900, (3, tokens))


TRACED = [
    "dynamic",
    *(pytest.param(name, marks=pytest.mark.long) for name in ("plain", "longrope, partial", "interleaved sections")),
]


@pytest.mark.parametrize("name", TRACED)
def test_compiled_and_exported_calls_have_the_same_bits(name: str) -> None:
    torch._dynamo.reset()
    module, example, longer = EveryWay(ROTARIES[name]()), every_way(5), every_way(300)
    compiled, (x, offset, _) = torch.compile(module.rotary, backend="aot_eager", fullgraph=True), example
    assert torch.equal(compiled(x, offset), module.rotary(x, offset))
    tokens = torch.export.Dim("tokens", min=2, max=500)
    dims = ({2: tokens}, None, {1: tokens})
    exported = torch.export.export(module, example, dynamic_shapes=dims, strict=False).module()
    assert torch.equal(exported(*example), module(*example))
    assert torch.equal(exported(*longer), module(*longer))


def test_mapped_calls_have_the_same_bits(rotary: qkv.RotaryEmbedding) -> None:
    x, offset, positions = every_way(5)
    module = EveryWay(rotary)
    heads = torch.vmap(lambda one: module(one[:, None], offset, positions)[:, :, 0], in_dims=1, out_dims=2)(x)
    assert torch.equal(heads, module(x, offset, positions))
    rows = torch.vmap(lambda one, where: rotary(one[None], positions=where)[0])(x, positions)
    assert torch.equal(rows, rotary(x, positions=positions))


def test_copies_pickles_casts_and_meta(rotary: qkv.RotaryEmbedding) -> None:
    x, positions = torch.randn(2, 2, 5, 8), torch.randint(0, 900, (2, 5))
    want = rotary(x, positions=positions)
    for other in (copy.deepcopy(rotary), pickle.loads(pickle.dumps(rotary)), copy.deepcopy(rotary).bfloat16()):
        assert torch.equal(other(x, positions=positions), want)
        assert repr(other) == repr(rotary)
    assert not list(rotary.state_dict())
    with torch.device("meta"):
        assert rotary(torch.empty(2, 2, 5, 8), positions=torch.empty(2, 5, dtype=torch.int64)).device.type == "meta"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(rotary(x, positions=positions), want)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(rotary(x, positions=positions), want)
    finally:
        torch.set_default_dtype(before)


def test_the_gradient_turns_back(rotary: qkv.RotaryEmbedding) -> None:
    x = torch.randn(2, 2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rotary(x, positions=torch.tensor([[1, 5, 2], [70, 0, 3]])), x)


# Scalings are values.


def test_scalings_are_values() -> None:
    again = RotaryScaling.yarn(4.0, original_max_position_embeddings=64)
    assert again == YARN and hash(again) == hash(YARN) and again != DYNAMIC
    assert pickle.loads(pickle.dumps(LONG)) == LONG
    assert repr(DYNAMIC) == "RotaryScaling.dynamic(factor=4.0, max_position_embeddings=64)"
    assert eval(repr(YARN)) == YARN
    assert "short_factor=(1.0, 2.0, ..., 8.0)" in repr(
        RotaryScaling.longrope(
            short_factor=torch.arange(1.0, 9.0), long_factor=range(1, 9), original_max_position_embeddings=64
        )
    )
    with pytest.raises(AttributeError):
        YARN.factor = 2.0  # type: ignore[attr-defined]


X, INTS = torch.randn(3, 2, 5, 8), torch.zeros(5, dtype=torch.int64)
CALLS: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "a float": (
        lambda: qkv.RotaryEmbedding(8)(X, 1.5),
        TypeError,
        r"offset must be an int, or integers \(B,\); got 1\.5",
    ),
    "float positions": (
        lambda: qkv.RotaryEmbedding(8)(X, positions=torch.zeros(5)),
        TypeError,
        r"positions must be a tensor of integers; got a tensor of torch\.float32",
    ),
    "a list": (
        lambda: qkv.RotaryEmbedding(8)(X, positions=[0, 1, 2, 3, 4]),
        TypeError,
        "positions must be a tensor of integers; got list",
    ),
    "an offset for each token": (
        lambda: qkv.RotaryEmbedding(8)(X, INTS),
        ValueError,
        r"offset must be an int, or integers of shape \(\) or \(3,\); got \(5,\)",
    ),
    "rows without a batch": (
        lambda: qkv.RotaryEmbedding(8)(X[0], positions=INTS.expand(2, 5)),
        ValueError,
        r"positions must be integers of shape \(5,\); got \(2, 5\)",
    ),
    "other rows": (
        lambda: qkv.RotaryEmbedding(8)(X, positions=INTS.expand(2, 5)),
        ValueError,
        r"positions must be integers of shape \(5,\) or \(3, 5\) or \(1, 5\); got \(2, 5\)",
    ),
    "axes without sections": (
        lambda: qkv.RotaryEmbedding(8)(X, positions=INTS.expand(3, 3, 5)),
        ValueError,
        r"or \(1, 5\); got \(3, 3, 5\)",
    ),
    "other axes": (
        lambda: ROTARIES["sections"]()(X, positions=INTS.expand(2, 3, 5)),
        ValueError,
        r"or \(3, 3, 5\) or \(3, 1, 5\); got \(2, 3, 5\)",
    ),
    "another device": (
        lambda: qkv.RotaryEmbedding(8)(X, positions=INTS.to("meta")),
        ValueError,
        "positions must be on the device of x, cpu; got meta",
    ),
    "both": (
        lambda: qkv.RotaryEmbedding(8)(X, 3, positions=INTS),
        ValueError,
        r"positions replace an offset; got offset=3 as well\. Pass one",
    ),
    "a float length": (
        lambda: ROTARIES["dynamic"]()(X, length=3.5),
        TypeError,
        r"length must be an int, or integers \(L,\) or \(B, L\); got 3\.5",
    ),
    "a length for each row": (
        lambda: ROTARIES["dynamic"]()(X, length=INTS[:3]),
        ValueError,
        r"length must be an int, or integers of shape \(\) or \(5,\) or \(3, 5\) or \(1, 5\); got \(3,\)",
    ),
    "another width": (
        lambda: qkv.RotaryEmbedding2d(12)(X),
        ValueError,
        r"x must have width 12; got shape \(3, 2, 5, 8\)",
    ),
    "2d without positions": (
        lambda: qkv.RotaryEmbedding2d(8)(X),
        ValueError,
        r"RotaryEmbedding2d: positions must be the row and column of each token, \(2, 5\); got None\. Pass",
    ),
    "2d with an offset": (lambda: qkv.RotaryEmbedding2d(8)(X, 1, positions=INTS.expand(2, 5)), ValueError, "offset=1"),
    "2d with one axis": (
        lambda: qkv.RotaryEmbedding2d(8)(X, positions=INTS),
        ValueError,
        r"integers of shape \(2, 5\) or \(2, 3, 5\) or \(2, 1, 5\); got \(5,\)",
    ),
    "2d, odd quarters": (lambda: qkv.RotaryEmbedding2d(6), ValueError, "head_dim must be a multiple of 4; got 6"),
    "2d, alternate": (
        lambda: qkv.RotaryEmbedding2d(8, alternate=1),
        TypeError,
        "alternate must be True or False; got 1",
    ),
    "scaling by name": (
        lambda: qkv.RotaryEmbedding(8, scaling="yarn"),
        TypeError,
        r"scaling must be a qkv\.RotaryScaling or None; got str\. Use RotaryScaling\.yarn",
    ),
    "scaling and frequencies": (
        lambda: qkv.RotaryEmbedding(8, scaling=YARN, frequencies=[1.0] * 4),
        ValueError,
        "pass scaling or frequencies",
    ),
    "factors for another width": (
        lambda: qkv.RotaryEmbedding(8, scaling=LONG),
        ValueError,
        "scaling must have 4 factors, one for each pair of rotary_dim=8 channels; got 2",
    ),
    "yarn, base 1": (lambda: qkv.RotaryEmbedding(8, base=1.0, scaling=YARN), ValueError, "base must be greater than 1"),
    "dynamic, one pair": (lambda: qkv.RotaryEmbedding(2, scaling=DYNAMIC), ValueError, "at least 4 .* got 2"),
    "sections of another sum": (
        lambda: qkv.RotaryEmbedding(8, sections=(2, 1)),
        ValueError,
        r"sections must be the numbers of pairs of two axes or more, 4 together; got \(2, 1\)",
    ),
    "one section": (lambda: qkv.RotaryEmbedding(8, sections=(4,)), ValueError, r"two axes or more, .* got \(4,\)"),
    "a number of sections": (lambda: qkv.RotaryEmbedding(8, sections=4), TypeError, "sections must be .* got 4"),
    "an empty section": (
        lambda: qkv.RotaryEmbedding(8, sections=(4, 0)),
        ValueError,
        "each of sections must be at least 1",
    ),
    "turns that do not fit": (
        lambda: qkv.RotaryEmbedding(8, sections=(1, 3), interleaved_sections=True),
        ValueError,
        r"must give the first axis the most pairs; got \(1, 3\)",
    ),
    "linear": (
        lambda: RotaryScaling.linear(0),
        ValueError,
        r"RotaryScaling\.linear: factor must be a positive number; got 0",
    ),
    "dynamic": (
        lambda: RotaryScaling.dynamic(2.0, max_position_embeddings=0),
        ValueError,
        r"RotaryScaling\.dynamic: max_position_embeddings must be at least 1; got 0",
    ),
    "yarn": (
        lambda: RotaryScaling.yarn(2.0, original_max_position_embeddings=64, beta_fast=0.0),
        ValueError,
        r"RotaryScaling\.yarn: beta_fast must be a positive number; got 0\.0",
    ),
    "longrope": (
        lambda: RotaryScaling.longrope(short_factor=[1.0], long_factor=[1.0, 2.0], original_max_position_embeddings=64),
        ValueError,
        r"long_factor must be floating-point of shape \(1,\), one per pair of channels; got \[1\.0, 2\.0\]",
    ),
    "longrope, zero": (
        lambda: RotaryScaling.longrope(short_factor=[0.0], long_factor=[1.0], original_max_position_embeddings=64),
        ValueError,
        r"must be positive; got \(0\.0,\) and \(1\.0,\)",
    ),
    "llama3": (
        lambda: RotaryScaling.llama3(
            8.0, low_freq_factor=4.0, high_freq_factor=4.0, original_max_position_embeddings=64
        ),
        ValueError,
        r"low_freq_factor must be less than high_freq_factor; got 4\.0 and 4\.0",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_refused(name: str) -> None:
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call()


def test_a_layer_on_patches_of_an_image_knows_their_neighbours() -> None:
    """Scores depend on the differences of rows and columns alone: moving the image changes nothing."""
    layer = qkv.MultiHeadAttention(32, 4, rotary=qkv.RotaryEmbedding2d(8)).double()
    x, grid = torch.randn(2, 6, 32, dtype=torch.float64), qkv.RotaryEmbedding2d.grid(2, 3)
    out = layer(x, positions=grid)
    torch.testing.assert_close(layer(x, positions=grid + torch.tensor([[4], [9]])), out, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(layer(x, positions=grid.flip(0)), out, atol=1e-4)
    with pytest.raises(ValueError, match=r"RotaryEmbedding2d: positions must be the row and column of each token"):
        layer(x)


def test_a_layer_decodes_after_an_image_as_it_reads_the_whole() -> None:
    """As Qwen2-VL: the text after an image goes on from its greatest position, not from the number of its patches."""
    rotary = qkv.RotaryEmbedding(8, sections=(2, 1, 1))
    layer, x = qkv.CausalAttention(32, 4, rotary=rotary).eval(), torch.randn(2, 9, 32)
    image = torch.cat([torch.zeros(1, 6, dtype=torch.int64), qkv.RotaryEmbedding2d.grid(2, 3)])
    positions = torch.cat([image, torch.arange(3, 6).expand(3, 3)], dim=1)[:, None].expand(3, 2, 9)
    cache, whole = qkv.KVCache(), layer(x, positions=positions)
    with torch.no_grad():
        parts = [layer(x[:, :7], positions=positions[..., :7], cache=cache)]
        parts += [layer(x[:, i : i + 1], positions=positions[..., i : i + 1], cache=cache) for i in (7, 8)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-5, rtol=1e-5)
