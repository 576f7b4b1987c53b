"""Rotary embedding: the kernel where it can be, with its operator ``qkv::rotate``, and torch's operators elsewhere."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, library

from qkv.kernels.binding import absence, loaded
from qkv.kernels.dispatch import can_bypass_dispatcher
from qkv.kernels.structs import DTYPES, ROTATION, view
from qkv.rotation import Rotation, pairs_of, rotate_by_operators, tensors_of
from qkv.torch_internals import is_legacy_batched, transforms_are_active
from qkv.tracing import is_exact_tensor, is_tracing

_MIN_PARALLEL = 1 << 14
"""Number of elements from which several threads rotate faster than one."""

_LARGEST_OFFSET = 1 << 62

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_LIBRARY = library.Library("qkv", "FRAGMENT")
_LIBRARY.define(
    "rotate(Tensor[] x, Tensor? positions, SymInt offset, Tensor? offsets, Tensor? axes, Tensor? frequencies,"
    " float position_scale, float attention_factor, Tensor? cos, Tensor? sin, bool halves, bool interleaved,"
    " bool inverse) -> Tensor[]"
)


def rotate(x: Sequence[Tensor], rotation: Rotation) -> Sequence[Tensor]:
    """Rotates one or two tensors ``(B, H, L, width)``, which differ in H alone, by the same angles.

    Results are new tensors with the heads of a row next to each other, as attention reads them; those of an inverse
    rotation have them apart, as the gradients of projections are read.

    | way | when | one token |
    |---|---|---|
    | one call of C | fp32, bf16 and fp16 on a CPU; no gradient, transform or tracer | 14 us |
    | `Rotate` | the same with gradients, or under transforms of functorch | 60 us |
    | ``torch.ops.qkv.rotate`` | operators are being recorded | 35 us |
    | `rotate_by_operators` | fp64, other devices, ONNX, no kernel, subclasses of tensors | 150 us |
    """
    tensors = tensors_of(rotation)
    bypasses = can_bypass_dispatcher(*x, *tensors)
    if bypasses:
        rotated = _fast_rotate(x, rotation)
        if rotated is not None:
            return rotated
    if not _is_supported(x, rotation, tensors):
        return [rotate_by_operators(one, rotation) for one in x]
    if is_tracing():
        recorded: list[Tensor] = torch.ops.qkv.rotate(list(x), *rotation)
        return recorded
    if bypasses:
        return _rotate(x, rotation)
    applied: tuple[Tensor, ...]
    if transforms_are_active():
        applied = TransformedRotate.apply(*rotation, *x)  # type: ignore[no-untyped-call]
        return applied
    applied = Rotate.apply(*rotation, *x)  # type: ignore[no-untyped-call]
    # Queries alone may need a gradient. An autograd.Function marks all of its results.
    return [
        out if one.requires_grad or not out.requires_grad else out.detach() for one, out in zip(x, applied, strict=True)
    ]


def _is_supported(x: Sequence[Tensor], rotation: Rotation, tensors: list[Tensor]) -> bool:
    """Whether the kernel computes a rotation, in any of these ways."""
    if absence() is not None or not all(tensor.is_cpu for tensor in (*x, *tensors)):
        return False
    first, pairs = x[0], pairs_of(rotation)
    if first.dtype not in _DTYPES or not 0 < 2 * pairs <= first.shape[-1]:
        return False
    if not -_LARGEST_OFFSET < rotation.offset < _LARGEST_OFFSET:
        return False
    if len(x) > 2 or any(one.dim() != 4 or one.dtype is not first.dtype for one in x):
        return False
    if any((one.shape[0], *one.shape[2:]) != (first.shape[0], *first.shape[2:]) for one in x[1:]):
        return False
    if any(tensor.requires_grad for tensor in tensors):
        return False
    if any(table is not None and table.dtype not in _DTYPES for table in (rotation.cos, rotation.sin)):
        return False
    if is_tracing() and torch.onnx.is_in_onnx_export():
        return False
    if torch.compiler.is_compiling():
        return True
    if is_tracing() and transforms_are_active():
        return False
    return all(is_exact_tensor(tensor) and not is_legacy_batched(tensor) for tensor in (*x, *tensors))


def _fast_rotate(x: Sequence[Tensor], rotation: Rotation) -> list[Tensor] | None:
    """`rotate` in one call of C, which reads tensors through DLPack. They must satisfy `can_bypass_dispatcher`.

    Returns:
        None for tensors that do not fit together or are not supported. Shapes, dtypes and strides are checked in C
        (native/src/abi/fast_rotate.cpp).
    """
    call = loaded().fast_rotate
    if call is None or len(x) > 2 or not -_LARGEST_OFFSET < rotation.offset < _LARGEST_OFFSET:
        return None
    rotated = [_new_out(one, rotation.inverse) for one in x]
    q, k = x if len(x) == 2 else (x[0], None)
    q_out, k_out = rotated if k is not None else (rotated[0], None)
    pairs = pairs_of(rotation)
    failed = call(
        *(q, k, q_out, k_out),
        *(rotation.positions, rotation.offsets, rotation.axes, rotation.frequencies, rotation.cos, rotation.sin),
        *(rotation.offset, rotation.position_scale, rotation.attention_factor, pairs, pairs if rotation.halves else 0),
        *(rotation.interleaved, rotation.inverse, _threads_for(x)),
    )
    return None if failed else rotated


def _new_out(x: Tensor, inverse: bool) -> Tensor:
    """Uninitialised result for ``x (B, H, L, width)``."""
    if not inverse:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    _, heads, tokens, width = x.shape
    return x.new_empty_strided(x.shape, (tokens * heads * width, width, heads * width, 1))


def _threads_for(x: Sequence[Tensor]) -> int:
    """Number of threads with which to rotate."""
    return torch.get_num_threads() if sum(one.numel() for one in x) >= _MIN_PARALLEL else 1


def _rotate(x: Sequence[Tensor], rotation: Rotation) -> list[Tensor]:
    """`rotate` by the kernel, without torch's dispatcher and without gradients."""
    if not 1 <= len(x) <= 2:
        raise ValueError(f"qkv's kernel: a rotation is of one or two tensors; got {len(x)}.")
    batch, _, tokens, width = x[0].shape
    for one in x[1:]:
        if one.dtype is not x[0].dtype or (one.shape[0], *one.shape[2:]) != (batch, tokens, width):
            raise ValueError(
                "qkv's kernel: tensors that are rotated together must differ only in the number of heads; got "
                f"{x[0].dtype} {tuple(x[0].shape)} and {one.dtype} {tuple(one.shape)}."
            )
    pairs = pairs_of(rotation)
    if 2 * pairs > width:
        raise ValueError(f"qkv's kernel: heads of {pairs} pairs must have at least {2 * pairs} channels; got {width}.")
    given = [_rows(one) for one in x]
    rotated = [_new_out(one, rotation.inverse) for one in x]
    heads = [one.shape[1] for one in given]
    absent = [(0, 0, 0, 0)] * (2 - len(x))
    from_views, to_views = [*map(view, given), *absent], [*map(view, rotated), *absent]
    angles, _alive = _pack_angles(rotation, batch, tokens)
    packed = ROTATION.pack(
        *(DTYPES[x[0].dtype], DTYPES[x[0].dtype], batch, tokens, width, pairs),
        *(heads[0], heads[1] if len(heads) == 2 else 0),
        *(number for views in (from_views, to_views) for one in views for number in one),
        *(rotation.interleaved, rotation.inverse, _threads_for(x)),
        *angles,
    )
    if loaded().rotate(packed):
        positions, axes = rotation.positions, rotation.axes
        raise ValueError(
            "qkv's kernel: axes must be those of the positions, "
            f"{None if positions is None else tuple(positions.shape)}; got {axes}."
        )
    return rotated


def _pack_angles(rotation: Rotation, batch: int, tokens: int) -> tuple[list[float], list[Tensor]]:
    """The last members of `ROTATION`, from ``positions`` on, and the tensors that they point to, to be kept alive."""
    alive: list[Tensor] = []

    def expanded(tensor: Tensor | None, dtype: torch.dtype, *sizes: int) -> list[int]:
        """Address and strides of all dimensions but the last one, whose numbers lie next to each other."""
        if tensor is None:
            return [0] * len(sizes)
        tensor = _rows(tensor.to(dtype)).expand(sizes)
        alive.append(tensor)
        return [tensor.data_ptr(), *tensor.stride()[:-1]]

    positions, axes, cos, sin = rotation.positions, rotation.axes, rotation.cos, rotation.sin
    axis_count = positions.shape[0] if positions is not None and positions.dim() == 3 else 1
    # One more dimension of size 1, so that positions may have any stride between tokens.
    of_tokens = expanded(None if positions is None else positions[..., None], torch.int64, axis_count, batch, tokens, 1)
    offsets = expanded(None if rotation.offsets is None else rotation.offsets[:, None], torch.int64, batch, 1)
    pairs = pairs_of(rotation)
    dtype = torch.float32 if cos is None or sin is None else torch.promote_types(cos.dtype, sin.dtype)
    columns = 2 * pairs if rotation.halves else pairs
    cos_address, *cos_strides = expanded(cos, dtype, batch, tokens, columns)
    sin_address, *sin_strides = expanded(sin, dtype, batch, tokens, columns)
    angles = [
        *(*of_tokens, axis_count),
        *expanded(axes, torch.int64, pairs),
        *(rotation.offset, *offsets),
        *expanded(rotation.frequencies, torch.float32, batch, tokens, pairs),
        *(rotation.position_scale, rotation.attention_factor),
        *(DTYPES[dtype], cos_address, sin_address, *cos_strides, *sin_strides),
        pairs if rotation.halves else 0,
    ]
    return angles, alive


def _rows(tensor: Tensor) -> Tensor:
    """The tensor, with the numbers of its last dimension next to each other and not lazily negated."""
    tensor = tensor.resolve_neg()
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


_FIELDS = len(Rotation._fields)


def _run(x: Sequence[Tensor], rotation: Rotation) -> list[Tensor]:
    """Rotates plain tensors, below autograd and transforms."""
    is_negated = any(tensor.is_neg() for tensor in (*x, *tensors_of(rotation)))
    rotated = None if is_negated else _fast_rotate(x, rotation)
    return _rotate(x, rotation) if rotated is None else rotated


def _operate(x: list[Tensor], *fields: Any) -> list[Tensor]:
    return _run(x, Rotation(*fields))


def _operate_fake(x: list[Tensor], *fields: Any) -> list[Tensor]:
    return [_new_out(one, Rotation(*fields).inverse) for one in x]


def _save(ctx: Any, rotation: Rotation) -> list[Tensor | None]:
    """Saves a rotation for `_saved`. Returns its tensors, with None in the place of other fields."""
    tensors = [field if isinstance(field, Tensor) else None for field in rotation]
    ctx.save_for_backward(*tensors)
    ctx.constants = [None if isinstance(field, Tensor) else field for field in rotation]
    return tensors


def _saved(ctx: Any) -> Rotation:
    pairs = zip(ctx.saved_tensors, ctx.constants, strict=True)
    return Rotation(*(constant if tensor is None else tensor for tensor, constant in pairs))


def _inverted(rotation: Rotation) -> Rotation:
    return rotation._replace(inverse=not rotation.inverse)


class Rotate(torch.autograd.Function):
    """``qkv::rotate`` without torch's dispatcher, with both derivatives.

    It takes the fields of a `Rotation`, then one or two tensors. It is linear in these: the gradient is rotated back.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        rotation = Rotation(*arguments[:_FIELDS])
        ctx.save_for_forward(*_save(ctx, rotation))
        return tuple(_run(arguments[_FIELDS:], rotation))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return (*[None] * _FIELDS, *rotate(gradients, _inverted(_saved(ctx))))

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:
        rotation = _saved(ctx)
        return tuple(None if one is None else rotate([one], rotation)[0] for one in tangents[_FIELDS:])


class TransformedRotate(Rotate):
    """`Rotate` under the transforms of functorch, whose form of a function costs torch 60 us more."""

    @staticmethod
    def forward(*arguments: Any) -> tuple[Tensor, ...]:
        return tuple(_run(arguments[_FIELDS:], Rotation(*arguments[:_FIELDS])))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_forward(*_save(ctx, Rotation(*inputs[:_FIELDS])))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[tuple[Tensor, ...], int]:
        x, fields = arguments[_FIELDS:], arguments[:_FIELDS]
        rotation, folded = _fold(info.batch_size, Rotation(*fields), in_dims[:_FIELDS], x, in_dims[_FIELDS:])
        return tuple(one.unflatten(0, (info.batch_size, -1)) for one in rotate(folded, rotation)), 0


def _fold(
    copies: int, rotation: Rotation, dims: Sequence[int | None], x: Sequence[Tensor], x_dims: Sequence[int | None]
) -> tuple[Rotation, list[Tensor]]:
    """A call under vmap as one call over ``copies`` times the batch: the mapped dimensions become part of the batch."""
    batch = next(
        (one.shape[0] if dim is None else one.movedim(dim, 0).shape[1] for one, dim in zip(x, x_dims, strict=True)), 1
    )

    def folded(tensor: Any, dim: int | None, after: int) -> Any:
        """The tensor with mapped and batch dimension as one, before the last ``after`` ones; any may be missing."""
        if not isinstance(tensor, Tensor):
            return tensor
        if dim is None:
            if tensor.dim() <= after or (tensor.shape[-after - 1] == 1 and batch == 1):
                return tensor
            tensor, dim = tensor.expand(copies, *tensor.shape), 0
        tensor = tensor.movedim(dim, 0)
        while tensor.dim() < after + 2:
            tensor = tensor.unsqueeze(1)
        tensor = tensor.movedim(0, -after - 2)
        sizes = list(tensor.shape)
        sizes[-after - 1] = batch
        return tensor.expand(sizes).flatten(-after - 2, -after - 1)

    fields = rotation._asdict()
    after = {"positions": 1, "offsets": 0, "frequencies": 2, "cos": 2, "sin": 2}
    for (name, field), dim in zip(fields.items(), dims, strict=True):
        if name in after:
            fields[name] = folded(field, dim, after[name])
    return Rotation(**fields), [folded(one, dim, 3) for one, dim in zip(x, x_dims, strict=True)]


def _differentiate(ctx: Any, gradients: list[Tensor]) -> tuple[Any, ...]:
    """The gradients of the arguments of ``qkv::rotate``."""
    return torch.ops.qkv.rotate(gradients, *_inverted(_saved(ctx))), *[None] * _FIELDS


_LIBRARY.impl("rotate", _operate, "CPU")
library.register_fake("qkv::rotate", _operate_fake, lib=_LIBRARY)
library.register_autograd(
    "qkv::rotate",
    _differentiate,
    setup_context=lambda ctx, inputs, output: _save(ctx, Rotation(*inputs[1:])),
    lib=_LIBRARY,
)


def _map(info: Any, in_dims: tuple[Any, ...], x: list[Tensor], *fields: Any) -> tuple[list[Tensor], list[int]]:
    rotation, folded = _fold(info.batch_size, Rotation(*fields), in_dims[1:], x, in_dims[0])
    mapped = torch.ops.qkv.rotate(folded, *rotation)
    return [one.unflatten(0, (info.batch_size, -1)) for one in mapped], [0] * len(mapped)


library.register_vmap("qkv::rotate", _map, lib=_LIBRARY)
