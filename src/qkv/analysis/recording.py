"""`record`: what each attention layer of a model of transformers attends to on a text, in the numbers of `qkv.look`."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv import look
from qkv.arguments import require_count
from qkv.integrations.transformers.attention import observed
from qkv.integrations.transformers.watching import watched
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

    def mean(self, number: Tensor) -> Tensor:
        """The mean of a number ``(B, H, Lq)`` over the queries, padding apart: ``(B, H)``. NaN where there are none."""
        if self.is_token is not None:
            number = number.masked_fill(~self.is_token[:, None], torch.nan)
        return number.nanmean(-1)

    @property
    def window(self) -> int | None:
        """Number of keys that a query sees at most, its own and those before it; None for all, or a dense mask's."""
        lookback = self.mask.lookback
        return None if lookback is None else lookback + 1

    def cut_by_head(self) -> Tensor:
        """The weight that each window cuts from each query head: ``(windows, B, H)``.

        In the mean over the queries that have as many keys before them; 0 where there are none.
        """
        return self._mean_of_those_that_lose(self.cut.mass).nan_to_num()

    def change_by_head(self) -> Tensor:
        """How far each window moves the output of each query head: ``(windows, B, H)``, over the same queries."""
        return self._mean_of_those_that_lose(self.cut.change)

    def _mean_of_those_that_lose(self, lost: Tensor) -> Tensor:
        """The mean of ``(windows, B, H, Lq)`` over the queries from which a window may hide keys."""
        is_token = self.is_token
        if is_token is None:
            is_token = torch.ones(lost.shape[1], lost.shape[3], dtype=torch.bool, device=lost.device)
        number = is_token.cumsum(1) + self.offset
        windows = torch.tensor(self.windows, dtype=number.dtype, device=lost.device)
        loses = is_token & (number > windows[:, None, None])  # (windows, B, Lq)
        return lost.masked_fill(~loses[:, :, None], torch.nan).nanmean(-1)

    def cut_by_kv_head(self) -> Tensor:
        """The weight that each window cuts from each KV head: ``(windows, B, Hkv)``.

        The largest among the query heads of a group, since one that needs distant keys needs those of its group.
        """
        return self.cut_by_head().unflatten(2, (self.kv_heads, -1)).amax(3)  # type: ignore[no-any-return]


class Recording(NamedTuple):
    """What all attention layers attended to, in the order of their calls. Printed as a table."""

    windows: tuple[int, ...]
    sink_tokens: int
    layers: tuple[LayerRecord, ...]

    def cut_by_layer(self) -> Tensor:
        """The weight that windows cut from layers, of the KV head which loses most: ``(layers, windows)``.

        Configurations give a window to layers, and not to heads. NaN for cross-attention.
        """
        found = torch.full((len(self.layers), len(self.windows)), torch.nan)
        for row, layer in zip(found, self.layers, strict=True):
            if not layer.is_cross:
                row.copy_(layer.cut_by_kv_head().amax((1, 2)))
        return found

    def rows(self) -> list[list[str]]:
        """What a layer sees, its numbers in the mean over queries and heads, and its cuts: a table in words."""
        found = []
        for layer, cuts in zip(self.layers, self.cut_by_layer().tolist(), strict=True):
            spent = layer.mean(layer.sinks.first + layer.sinks.learned)
            rest = "all keys" if layer.mask.allow is None else "a dense mask"
            seen = rest if layer.window is None else f"{layer.window:,} keys"
            found.append(
                [
                    "a context" if layer.is_cross else seen,
                    f"{layer.mean(layer.keys_in_effect).nanmean():.1f}",
                    f"{layer.mean(layer.distance.mean).nanmean():.1f}",
                    f"{100 * spent.nanmean():.1f}%",
                    *("" if cut != cut else f"{100 * cut:.1f}%" for cut in cuts),
                ]
            )
        return found

    def __str__(self) -> str:
        sinks = f", with {self.sink_tokens} sink tokens" if self.sink_tokens else ""
        lines = [["layer", "sees", "in effect", "distance", "sinks", *(f"cut by {window}" for window in self.windows)]]
        lines += [[layer.name, *row] for layer, row in zip(self.layers, self.rows(), strict=True)]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        note = f"cut: the weight on keys that a window hides{sinks}, of the KV head that loses most; before training"
        return "\n".join([*rows, *([note] if self.windows else [])])


def record(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    windows: Sequence[int] = (),
    sink_tokens: int = 0,
    blocks: int = 64,
    **inputs: Any,
) -> Recording:
    """Runs a model of transformers once, and records what its attention layers attend to: `qkv.look`, layer by layer.

    The model runs on ``attn_implementation="qkv"`` for this call, and is as it was afterwards. Queries and keys of a
    layer are dropped before the next one runs, so that memory is that of one layer and of the numbers. One thread at a
    time may record a model. Windows and sinks are counted in columns, so that padding on the left counts.

    Args:
        model: of any family that runs on "qkv", or a module with such a model in it, in evaluation mode.
        input_ids: ``(B, L)``.
        windows: numbers of keys that queries would see at most, as in `look.window_cut`. In a layer whose queries see
            later keys as well, as many to each side, the query's own included.
        sink_tokens: number of first keys that these windows show too; also those that are counted as sinks, of which
            there is one at least.
        blocks: of `look.block_map`.
        **inputs: other arguments of the model, such as ``attention_mask`` and ``decoder_input_ids``.

    Raises:
        TypeError: for anything but a model of transformers, and windows that are not integers.
        ValueError: for a model that is training or does not run on "qkv", a window that hides no key, and a model
            without a layer that has heads of keys.

    Example:
        >>> from qkv.analysis import record
        >>> print(record(model, input_ids, windows=[256, 512], sink_tokens=4))  # doctest: +SKIP
    """
    if not isinstance(windows, Sequence):
        raise TypeError(f"record: windows must be a sequence of counts; got {type(windows).__name__}.")
    for window in windows:
        require_count("record", "each of windows", window)
    require_count("record", "sink_tokens", sink_tokens, 0)
    require_count("record", "blocks", blocks)
    found: list[LayerRecord] = []
    with watched("record", model) as known:
        given = {**inputs} if input_ids is None else {"input_ids": input_ids, **inputs}
        given = _without_what_is_not_recorded(model, given)

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
            is_cross = known.is_cross(module, q, k, options)
            used = () if is_cross else tuple(windows)
            name = known.names[id(module)]
            found.append(_record_of(name, is_cross, (q, k, v, options), used, sink_tokens, blocks))

        with observed(observe):
            model(**given)
        if not found:
            raise known.no_calls("record")
    return Recording(tuple(windows), sink_tokens, tuple(found))


def _record_of(
    name: str,
    is_cross: bool,
    given: tuple[Tensor, Tensor, Tensor, dict[str, Any]],
    windows: tuple[int, ...],
    sink_tokens: int,
    blocks: int,
) -> LayerRecord:
    """The record of a call with queries, keys, values and other arguments of `qkv.attention`."""
    q, k, v, options = given
    if "sinks" in options:
        raise ValueError(f"record: {name} has a sink logit for each query, of which there are no numbers.")
    mask, offset, lk = options["mask"], options["offset"], k.shape[2]
    for window in windows:
        if window >= lk:
            raise ValueError(
                f"record: a window of {window} cuts nothing of {lk} tokens; give a longer text or a smaller window."
            )
    sees_later_keys = q.shape[2] > 1 and mask.shows_later_keys(1)
    used = [Mask.band(w - 1, w - 1, sink_tokens) if sees_later_keys else w for w in windows]
    of_scores = {name: value for name, value in options.items() if name != "v_scale"}
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
        look.distance(q, k, **of_scores),
        look.sink_share(q, k, first=max(1, sink_tokens), **of_scores),
        look.block_map(q, k, blocks=blocks, **of_scores),
        mask.keep_keys(lk) if q.shape[2] == lk and not is_cross else None,
    )


def _without_what_is_not_recorded(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, without a cache and the logits of a text, unless they are asked for."""
    takes = inspect.signature(model.forward).parameters
    given = {"use_cache": False, **given} if "use_cache" in takes else given
    body = getattr(model, "base_model", model)
    # The body of a few models leaves out queries by it.
    leaves_out = body is model or "logits_to_keep" in inspect.signature(body.forward).parameters
    if "logits_to_keep" in takes and "labels" not in given and not leaves_out:
        given = {"logits_to_keep": 1, **given}
    return given
