"""`reach`: how far one token of a text has an influence, layer by layer: by the windows, and as measured."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qkv.analysis.changes import Window
from qkv.analysis.recording import refuse_inputs, require_tokens, without_what_is_not_recorded
from qkv.arguments import require_count, require_int
from qkv.integrations.transformers.attention import observed
from qkv.integrations.transformers.watching import require_itself, watched
from qkv.layer_record import sees_later_keys
from qkv.masks import Mask


class Reach(NamedTuple):
    """The influence of one token on the hidden states of a text, before the first layer and after each."""

    position: int
    windows: tuple[int | None, ...]
    """of each layer; None for one that sees all tokens before, or passes them on without attention"""
    stops: tuple[int, ...]
    """(layers + 1,), the first of the later tokens that the windows keep it from"""
    change: Tensor
    """(layers + 1, L), how far hidden states move, ``norm(new - old) / norm(old)``; 0 for those equal in bits alone"""

    def allowed(self) -> list[int]:
        """The tokens that the windows let the token reach, its own included, before the first layer and after each."""
        return [stop - self.position for stop in self.stops]

    def measured(self) -> list[int]:
        """The tokens from its own to the last one that changes; 0 where none does."""
        moved = self.change.ne(0)
        last = [int(row.nonzero().max()) if row.any() else self.position - 1 for row in moved]
        return [one + 1 - self.position for one in last]

    def beyond(self) -> int:
        """The number of hidden states that change though the windows keep the token from them."""
        at = torch.arange(self.change.shape[1])
        outside = (at < self.position) | (at >= torch.tensor(self.stops)[:, None])
        return int((self.change.ne(0) & outside).sum())


def reach(
    model: nn.Module, input_ids: Tensor, position: int, *, windows: Mapping[str, int] | None = None, **inputs: Any
) -> Reach:
    """How far a token reaches: what windows ``w_l`` allow, and which hidden states change if the token does.

    After some layers, a token can have changed ``1 + sum(w_l - 1)`` tokens, the sum over these layers, its own and
    those after it. For what is measured, the model runs on the text twice, the second time with another token there. A
    hidden key has exactly no influence, so that hidden states out of reach are equal in bits, as long as the rest of
    the model computes each token by itself; experts, which compute several tokens together, may round them otherwise.

    Args:
        model, **inputs: as in `record`; causal.
        input_ids: ``(1, L)``.
        position: of the token; a negative one counts from the last.
        windows: names of attention modules, as in `Recording`, and the keys that their queries would see at most,
            besides what they see now. None for the model as it is.

    Raises:
        TypeError, ValueError: as `record`, and for a position or a module that is not there, a model that is not causal
            and several rows.

    Example:
        >>> from qkv.analysis import reach
        >>> reach(model, input_ids, 100, windows={"model.layers.0.self_attn": 256}).stops  # doctest: +SKIP

    Source: Beltagy et al. 2020 (Longformer), section 3.1, on the receptive field of windows in layers.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or len(input_ids) != 1:
        raise ValueError("reach: input_ids must be a tensor (1, L).")
    length = input_ids.shape[1]
    require_tokens("reach", "input_ids", input_ids, 1)
    refuse_inputs("reach", inputs, "inputs_embeds", "past_key_values")
    require_int("reach", "position", position)
    if not -length <= position < length:
        raise ValueError(
            f"reach: position must be from {-length} to {length - 1}, for {length} tokens; got {position}."
        )
    for number in (windows or {}).values():
        require_count("reach", "each of windows", number)
    narrower = {name: Window(number, 0) for name, number in (windows or {}).items()}
    effective: dict[str, int | None] = {}
    with watched("reach", model) as known:
        require_itself("reach", model)

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Mask | None:
            name = known.names[id(module)]
            lengths = q.shape[2], k.shape[2]
            if known.is_cross(module, q, k, options) or sees_later_keys(options["mask"], *lengths, options["offset"]):
                raise ValueError(f"reach: model must be causal; {name} attends to more than earlier tokens.")
            lookback, window = options["mask"].lookback, narrower.get(name)
            seen = [None if lookback is None else lookback + 1, None if window is None else window.window]
            effective[name] = min((number for number in seen if number is not None), default=None)
            return None if window is None else window.narrowed(q, k, options)

        of_words: Any = model.get_input_embeddings()  # type: ignore[operator]
        other = input_ids.clone()
        other[0, position] = (other[0, position] + 1) % of_words.num_embeddings
        given = without_what_is_not_recorded(model, {"output_hidden_states": True, "return_dict": True, **inputs})
        with observed(observe):
            old, new = (model(input_ids=ids, **given).hidden_states for ids in (input_ids, other))
        if not effective:
            raise known.no_calls("reach")
        if old is None or new is None:
            raise ValueError(f"reach: model must return its hidden states; {type(model).__name__} does not.")
    for name in narrower:
        if name not in effective:
            raise ValueError(f"reach: windows must be of {', '.join(effective)}; got {name!r}.")
    return _reach(position % length, effective, old, new)


def _reach(position: int, effective: dict[str, int | None], old: Any, new: Any) -> Reach:
    layers, length = len(old) - 1, old[0].shape[1]
    windows: list[int | None] = [None] * layers
    for name, window in effective.items():
        number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)  # of the block that the module is in
        if number is None or int(number[1]) >= layers:
            raise ValueError(f"reach: the {layers} layers must be numbered, and be all; got {name}.")
        windows[int(number[1])] = window
    stops = [position + 1]
    for window in windows:
        stops.append(length if window is None else min(length, stops[-1] + window - 1))
    change = torch.stack([_change(a[0], b[0]) for a, b in zip(old, new, strict=True)])
    return Reach(position, tuple(windows), tuple(stops), change.cpu())


def _change(old: Tensor, new: Tensor) -> Tensor:
    """(L,), how far rows move; 0 for rows equal in bits, and for no others."""
    differs = (old != new).any(1)  # NaN differs
    way = (new.double() - old.double()).norm(dim=1) / old.double().norm(dim=1)
    moved: Tensor = way.float().clamp(min=torch.finfo(torch.float32).tiny).masked_fill(~differs, 0)
    return moved
