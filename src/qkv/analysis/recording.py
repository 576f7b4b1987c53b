"""`record`: what each attention layer of a model of transformers attends to on a text, in the numbers of `qkv.look`."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv.analysis.words import counted, what_layers_see, without_number
from qkv.integrations.transformers.attention import observed
from qkv.integrations.transformers.watching import watched
from qkv.layer_record import LayerRecord, check_options, record_call


class Recording(NamedTuple):
    """What all attention layers attended to, in the order of their calls. Printed as a table."""

    windows: tuple[int, ...]
    sink_tokens: int
    layers: tuple[LayerRecord, ...]
    without_heads: tuple[str, ...] = ()
    """names of the layers that keep no keys by heads, such as recurrent ones between others"""

    def cut_by_layer(self) -> Tensor:
        """The weight that windows cut from layers, of the KV head which loses most: ``(layers, windows)``.

        Configurations give a window to layers, and not to heads. NaN for cross-attention.
        """
        found = torch.full((len(self.layers), len(self.windows)), torch.nan)
        for row, layer in zip(found, self.layers, strict=True):
            if not layer.is_cross:
                row.copy_(layer.cut_by_kv_head().amax((1, 2)))
        return found

    def change_by_layer(self) -> Tensor:
        """How far windows move the output of layers, of the head that moves most: ``(layers, windows)``.

        Ranks layers by what a window would cost better than `cut_by_layer` does, see studies/windows_smollm2. NaN for
        cross-attention.
        """
        found = torch.full((len(self.layers), len(self.windows)), torch.nan)
        for row, layer in zip(found, self.layers, strict=True):
            if not layer.is_cross:
                row.copy_(layer.change_by_head().amax((1, 2)))
        return found

    def _lines(self) -> list[list[str]]:
        """A table, with its heading."""
        words = what_layers_see(self.layers, self.cut_by_layer())
        cuts = (f"cut by {window}" for window in self.windows)
        rows = [[layer.name, *row] for layer, row in zip(self.layers, words, strict=True)]
        return [["layer", "sees", "in effect", "distance", "sinks", *cuts], *rows]

    def _notes(self) -> list[str]:
        """What is not in the table, and what is meant by a cut."""
        notes = [f"{name} keeps no keys by heads" for name in self.without_heads]
        padding = [int((~layer.is_token).sum()) for layer in self.layers if layer.is_token is not None]
        if any(padding):
            notes.append(f"left out: {max(padding)} queries of padding")
        lost = without_number(self.layers)
        if lost is not None:
            notes.append(lost)
        if self.windows:
            sinks = f", with {counted(self.sink_tokens, 'sink token')}" if self.sink_tokens else ""
            what = f"the weight on keys that a window hides{sinks}, of the KV head that loses most; before training"
            notes.append(f"cut: {what}")
        return notes

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        from qkv.analysis.page.markup import table

        heading, *rows = self._lines()
        return table("; ".join(self._notes()) or "What layers attend to", heading, rows)

    def __str__(self) -> str:
        lines = self._lines()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines]
        return "\n".join([*rows, *self._notes()])


def record(
    model: nn.Module,
    input_ids: Tensor | None = None,
    *,
    windows: Sequence[int] = (),
    sink_tokens: int = 0,
    blocks: int = 64,
    queries: Sequence[int] = (),
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
        queries: places of the queries whose heaviest keys are recorded, as `look.top_keys` finds them; negative ones
            count from the last.
        **inputs: other arguments of the model, such as ``attention_mask`` and ``decoder_input_ids``.

    Raises:
        TypeError: for anything but a model of transformers, and windows that are not integers.
        ValueError: for a model that is training or does not run on "qkv", a window that hides no key of the longest
            sequence, a query that no layer has, and a model without a layer that has heads of keys.

    Example:
        >>> from qkv.analysis import record
        >>> print(record(model, input_ids, windows=[256, 512], sink_tokens=4))  # doctest: +SKIP
    """
    check_options(windows, sink_tokens, blocks, queries)
    if input_ids is not None:
        require_tokens("record", "input_ids", input_ids, 1)
    found: list[LayerRecord] = []
    attended: set[int] = set()
    with watched("record", model) as known:
        given = {**inputs} if input_ids is None else {"input_ids": input_ids, **inputs}
        given = without_what_is_not_recorded(model, given)
        texts = (given.get(name) for name in ("input_ids", "decoder_input_ids"))
        longest = max((text.shape[1] for text in texts if isinstance(text, Tensor)), default=0)

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
            name, is_cross = known.names[id(module)], known.is_cross(module, q, k, options)
            if "sinks" in options:
                raise ValueError(f"record: {name} has a sink logit for each query, of which there are no numbers.")
            call = q, k, v, options
            found.append(record_call(name, is_cross, call, windows, sink_tokens, blocks, queries, longest))
            attended.add(id(module))

        with observed(observe):
            model(**given)
        if not found:
            raise known.no_calls("record")
        without_heads = known.without_heads(attended)
    most = max(layer.keys_in_effect.shape[2] for layer in found)
    for query in queries:
        if not -most <= query < most:
            raise ValueError(
                f"record: each of queries must be from {-most} to {most - 1}, for {most} queries; got {query}."
            )
    return Recording(tuple(windows), sink_tokens, tuple(found), without_heads)


def require_tokens(caller: str, name: str, token_ids: Any, fewest: int) -> None:
    """Raises a ValueError for anything but so many tokens of one text or several."""
    is_text = isinstance(token_ids, Tensor) and token_ids.dim() == 2 and not token_ids.is_floating_point()
    if not is_text or token_ids.shape[0] < 1 or token_ids.shape[1] < fewest:
        count = "two tokens" if fewest == 2 else "one token"
        raise ValueError(f"{caller}: {name} must be a tensor (B, L) of integers, {count} or more.")


def refuse_inputs(caller: str, inputs: dict[str, Any], *names: str) -> None:
    """Raises a ValueError for arguments of a model by which it would read anything but a text as a whole."""
    for name in names:
        if inputs.get(name) is not None:
            raise ValueError(f"{caller}: {name} must not be given; the text is input_ids, read as a whole.")


def without_what_is_not_recorded(model: Any, given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call, without a cache and the logits of a text, unless they are asked for."""
    takes = inspect.signature(model.forward).parameters
    given = {"use_cache": False, **given} if "use_cache" in takes else given
    body = getattr(model, "base_model", model)
    # The body of a few models leaves out queries by it.
    leaves_out = body is model or "logits_to_keep" in inspect.signature(body.forward).parameters
    if "logits_to_keep" in takes and "labels" not in given and not leaves_out:
        given = {"logits_to_keep": 1, **given}
    return given
