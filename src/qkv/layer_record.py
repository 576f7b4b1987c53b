"""`LayerRecord`: what one call of an attention layer attends to, in the numbers of `qkv.look`."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qkv import look
from qkv.arguments import require_count, require_int
from qkv.masks import Mask


class LayerRecord(NamedTuple):
    """What one call of an attention module attended to."""

    name: str
    """of the module within the model"""
    mask: Mask
    """the mask that was in effect"""
    offset: int
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    is_cross: bool
    """whether keys and values come from another sequence"""
    windows: tuple[int, ...]
    """those of the recording; none in cross-attention"""
    cut: look.WindowCut
    keys_in_effect: Tensor
    """(B, H, Lq)"""
    distance: look.Distance
    sinks: look.SinkShare
    map: look.BlockMap
    is_token: Tensor | None
    """(B, Lq), which queries are not padding; None if all are, and where the mask does not tell"""
    queries: tuple[int, ...] = ()
    """places of those whose keys are in `top`"""
    top: look.TopKeys | None = None
    """the keys of these queries, in their order; None where there are none"""

    def mean(self, number: Tensor) -> Tensor:
        """The mean of a number ``(B, H, Lq)`` over the queries, padding apart: ``(B, H)``. NaN where there are none."""
        if self.is_token is not None:
            number = number.masked_fill(~self.is_token[:, None], torch.nan)
        return number.nanmean(-1)

    @property
    def window(self) -> int | None:
        """Number of keys that a query sees at most, its own and those before it; None for all, or a dense mask's.

        In a layer that sees later keys, as many to each side.
        """
        lookback = self.mask.lookback
        return None if lookback is None else lookback + 1

    @property
    def sees_later_keys(self) -> bool:
        """Whether queries see keys after their own, as in encoders."""
        lq = self.keys_in_effect.shape[2]
        return not self.is_cross and sees_later_keys(self.mask, lq, lq + self.offset, self.offset)

    @property
    def group(self) -> Literal["encoder", "decoder", "cross"]:
        """What a layer attends to: all of its text, what stands before, or another sequence."""
        return "cross" if self.is_cross else "encoder" if self.sees_later_keys else "decoder"

    @property
    def no_number(self) -> Tensor:
        """(B, H, Lq), which queries have no number, since they or a key that they see have NaN or inf."""
        return ~self.keys_in_effect.isfinite()

    def cut_by_head(self) -> Tensor:
        """The weight that each window cuts from each query head: ``(windows, B, H)``.

        In the mean over the queries that have as many keys before them, or after them if they see these; 0 where there
        are none, and NaN where these have no number.
        """
        return self._mean_of_those_that_lose(self.cut.mass).masked_fill(~self._loses().any(-1, keepdim=True), 0)

    def change_by_head(self) -> Tensor:
        """How far each window moves the output of each query head: ``(windows, B, H)``, over the same queries."""
        return self._mean_of_those_that_lose(self.cut.change)

    def _mean_of_those_that_lose(self, lost: Tensor) -> Tensor:
        """The mean of ``(windows, B, H, Lq)`` over the queries from which a window may hide keys."""
        return lost.masked_fill(~self._loses()[:, :, None], torch.nan).nanmean(-1)

    def _loses(self) -> Tensor:
        """``(windows, B, Lq)``, from which queries a window may hide keys."""
        is_token, (rows, _, lq) = self.is_token, self.keys_in_effect.shape
        if is_token is None:
            is_token = torch.ones(rows, lq, dtype=torch.bool, device=self.keys_in_effect.device)
        number = is_token.cumsum(1) + self.offset
        windows = torch.tensor(self.windows, dtype=number.dtype, device=number.device)[:, None, None]
        loses = number > windows
        if self.sees_later_keys:
            loses = loses | (is_token.flip(1).cumsum(1).flip(1) > windows)
        return is_token & loses

    def cut_by_kv_head(self) -> Tensor:
        """The weight that each window cuts from each KV head: ``(windows, B, Hkv)``.

        The largest among the query heads of a group, since one that needs distant keys needs those of its group.
        """
        return self.cut_by_head().unflatten(2, (self.kv_heads, -1)).amax(3)  # type: ignore[no-any-return]


def check_options(windows: Sequence[int], sink_tokens: int, blocks: int, queries: Sequence[int] = ()) -> None:
    """Raises a TypeError or ValueError unless they can be those of a record."""
    if not isinstance(queries, Sequence):
        raise TypeError(f"record: queries must be a sequence of places; got {type(queries).__name__}.")
    for query in queries:
        require_int("record", "each of queries", query)
    if not isinstance(windows, Sequence):
        raise TypeError(f"record: windows must be a sequence of counts; got {type(windows).__name__}.")
    for window in windows:
        require_count("record", "each of windows", window)
    require_count("record", "sink_tokens", sink_tokens, 0)
    require_count("record", "blocks", blocks)


def cuts_nothing(window: int, sink_tokens: int, tokens: int) -> str:
    """What is wrong with a window as long as the text, in words."""
    sinks = f" and {sink_tokens} sink token{'' if sink_tokens == 1 else 's'}" if sink_tokens else ""
    return f"a window of {window}{sinks} cuts nothing of {tokens} tokens; give a longer text or a smaller window."


def sees_later_keys(mask: Mask, lq: int, lk: int, offset: int) -> bool:
    """Whether a mask shows a query a key after its own."""
    if mask.allow is None:
        return lq > 1 and mask.shows_later_keys(1)
    return bool(mask.visible(lq, lk, offset).triu(offset + 1).any())


def record_call(
    name: str,
    is_cross: bool,
    given: tuple[Tensor, Tensor, Tensor, dict[str, Any]],
    windows: Sequence[int],
    sink_tokens: int,
    blocks: int,
    queries: Sequence[int] = (),
    longest: int = 0,
) -> LayerRecord:
    """The record of a call with queries, keys, values and other arguments of `qkv.attention`.

    Args:
        queries: places of those whose heaviest keys are recorded; those that the call does not have are left out.
        longest: tokens of the longest sequence of a model. A window that hides a key of it may hide none here.

    Raises:
        TypeError, ValueError: for windows that are not counts, or hide nothing.
    """
    check_options(windows, sink_tokens, blocks, queries)
    q, k, v, options = given
    lq = q.shape[2]
    places = tuple(dict.fromkeys(at % lq for at in queries if -lq <= at < lq))
    windows = () if is_cross else tuple(windows)
    mask, offset, lk = options["mask"], options["offset"], k.shape[2]
    for window in windows:
        if window + sink_tokens >= max(lk, longest):
            raise ValueError(f"record: {cuts_nothing(window, sink_tokens, lk)}")
    sees_later_keys = lq > 1 and mask.shows_later_keys(1)
    used = [Mask.band(w - 1, w - 1, sink_tokens) if sees_later_keys else w for w in windows]
    of_scores = {name: value for name, value in options.items() if name != "v_scale"}
    found = look.overview(q, k, first=max(1, sink_tokens), blocks=blocks, **of_scores)
    return LayerRecord(
        name,
        mask,
        offset,
        q.shape[1],
        k.shape[1],
        q.shape[3],
        v.shape[3],
        is_cross,
        windows,
        look.window_cut(q, k, v, used, sink_tokens=sink_tokens, **options),
        look.keys_in_effect(q, k, **of_scores),
        *found,
        mask.keep_keys(lk) if lq == lk and not is_cross else None,
        places,
        look.top_keys(q, k, queries=places, **of_scores) if places else None,
    )
