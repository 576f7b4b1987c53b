"""Memory layouts of tensors, beside which kernels that leave the bounds of a view read NaN."""

from collections.abc import Callable

import torch
from torch import Tensor

Layout = Callable[[Tensor], Tensor]


def poisoned(*shape: int, like: Tensor) -> Tensor:
    """Memory full of NaN (127 in int8), to be read by kernels that leave the bounds of a view."""
    value = (
        torch.nan if like.dtype.is_floating_point else torch.iinfo(like.dtype).max if like.dtype != torch.bool else 1
    )
    return torch.full(shape, value, dtype=like.dtype, device=like.device)


def every_second(x: Tensor) -> Tensor:
    memory = poisoned(*x.shape[:-1], 2 * x.shape[-1] + 1, like=x)
    memory[..., 1::2] = x
    return memory[..., 1::2]


def packed_last(x: Tensor) -> Tensor:
    """A view of "b l (h d three)"."""
    memory = poisoned(*x.shape, 3, like=x)
    memory[..., 1] = x
    return memory.unbind(-1)[1]


def transposed(x: Tensor) -> Tensor:
    """Column-major."""
    return x.mT.contiguous().mT


def sliced(x: Tensor) -> Tensor:
    """A slice of a larger tensor, at an odd offset."""
    memory = poisoned(*(size + 3 for size in x.shape), like=x)
    view = memory[tuple(slice(1, size + 1) for size in x.shape)]
    view.copy_(x)
    return view


def every_second_row(x: Tensor) -> Tensor:
    memory = poisoned(*x.shape[:-2], 2 * x.shape[-2], x.shape[-1], like=x)
    memory[..., ::2, :] = x
    return memory[..., ::2, :]


def tokens_first(x: Tensor) -> Tensor:
    """Heads inside of tokens, as in layers and flash-attn."""
    return x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() > 2 else x.clone()


# Layouts of arbitrary numbers, and those that repeat numbers.
ANY: dict[str, Layout] = {
    layout.__name__: layout
    for layout in (every_second, packed_last, transposed, sliced, every_second_row, tokens_first)
}
REPEATED: dict[str, Layout] = {
    **{
        f"expanded {name}": lambda x, dim=dim: x.narrow(dim, 0, 1).clone().expand(x.shape)
        for dim, name in enumerate(["batch", "heads", "length", "width"])
    },
    "unfolded": lambda x: x.flatten(-2)[..., : sum(x.shape[-2:]) - 1].clone().unfold(-1, x.shape[-1], 1),
}
LAYOUTS = {**ANY, **REPEATED}
