"""Attention of a module that `qkv.parallel.Context` has marked, which has the tokens of one rank."""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qkv import kernels, parallel
from qkv.masks import Mask
from qkv.parallel.context import Over, count_call
from qkv.scores import ScoreOptions


class ConvertedMask(NamedTuple):
    """transformers' ``attention_mask`` as arguments of `attention`."""

    mask: Mask
    offset: int = 0
    bias: Tensor | None = None


def attend_over_ranks(
    module: nn.Module,
    layout: Over,
    qkv: tuple[Tensor, Tensor, Tensor],
    converted: ConvertedMask,
    position_ids: object,
    refused: Sequence[str],
    scores: ScoreOptions,
) -> tuple[Tensor, None]:
    """`parallel.attention` with the arguments and results of transformers' attention functions.

    Args:
        module: the calling layer.
        layout: that of its tokens.
        qkv: heads of this rank's tokens.
        converted: the mask that the model made for them.
        position_ids: those of the call, if the model passes them on.
        refused: arguments that were given and have no meaning over ranks.
        scores: keywords of `parallel.attention`.

    Raises:
        ValueError: for a cache, what is of some tokens alone, and other positions than those of the layout.
    """
    caller, tokens = type(module).__name__, layout.tokens
    if refused:
        raise ValueError(f"{caller}: {', '.join(refused)} must be None in a call over ranks, which does not have them.")
    q, k, _ = qkv
    if not q.shape[2] == k.shape[2] == tokens.rows:
        raise ValueError(
            f"{caller}: queries and keys must be those of the {tokens.rows} tokens that the layout gives rank "
            f"{tokens.rank} of {len(tokens.runs)}, without a cache (use_cache=False); "
            f"got {q.shape[2]} and {k.shape[2]}."
        )
    mask = _without_jumps(converted.mask, tokens.positions)
    if mask.has_tensors or converted.bias is not None or converted.offset:
        raise ValueError(
            f"{caller}: padding, documents and other masks of single tokens must be those of all ranks; got "
            f"{mask!r} for the tokens of one. Leave out attention_mask and pass `parallel.over(tokens, mask=...)`; "
            "leave the model uncompiled, as a compiled one makes masks of its positions."
        )
    has_documents = layout.mask is not None and layout.mask.document_ids is not None
    if isinstance(position_ids, Tensor) and not has_documents:
        _require_positions(caller, position_ids, tokens.positions)
    count_call(module)
    mask = mask if layout.mask is None else mask & layout.mask
    out = parallel.attention(*qkv, tokens, mask=mask, **scores)
    return out.transpose(1, 2).contiguous(), None


def _without_jumps(mask: Mask, positions: Tensor) -> Mask:
    """The mask without documents that transformers has made of the jumps between runs."""
    ids = mask.document_ids
    if ids is None or not kernels.can_read_values(ids):
        return mask
    jumps = torch.diff(positions, prepend=positions[:1] - 1) != 1
    return replace(mask, document_ids=None) if bool((ids == jumps.cumsum(0)).all()) else mask


def _require_positions(caller: str, position_ids: Tensor, positions: Tensor) -> None:
    """Raises ValueError for numbers that rotate the tokens of a rank as if they were the first ones."""
    is_known = position_ids.is_cpu and kernels.can_read_values(position_ids) and position_ids.dim() == 2
    if is_known and not bool((position_ids == positions).all()):
        raise ValueError(
            f"{caller}: position_ids must be those of the layout, tokens.positions[None]; got others, from "
            f"{int(position_ids.min())} to {int(position_ids.max())}."
        )
