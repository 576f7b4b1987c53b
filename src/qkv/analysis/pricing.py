"""`price`: what a model of transformers would lose on a text, if some of its layers had a window or fewer KV heads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from qkv.analysis.changes import Change, FewerHeads, Window
from qkv.analysis.recording import refuse_inputs, require_tokens
from qkv.arguments import require_count
from qkv.convert.heads.pooling import ConversionMethod
from qkv.integrations.transformers.attention import observed
from qkv.integrations.transformers.watching import Watched, require_itself, stacks, watched
from qkv.layer_record import cuts_nothing, sees_later_keys

LOGITS_AT_ONCE = 1 << 22
"""Number of logits that are computed at once: 16 MiB in fp32, which allocators keep for the next ones."""


class Together(NamedTuple):
    """The loss with several layers changed at once."""

    layers: tuple[int, ...]
    """indices into `Price.layers`, in order of their position"""
    loss: Tensor
    """(B, L - 1)"""


class Price(NamedTuple):
    """What a change of layers costs on a text, in nats by predicted token: all tokens but the first.

    Tokens that are padding, or predicted from padding, are NaN.
    """

    change: str
    """what a layer would have, such as ``a window of 256 tokens``"""
    window: int | None
    sink_tokens: int
    kv_heads: int | None
    layers: tuple[str, ...]
    """names of the attention modules that the change alters, in the order of their calls"""
    loss: Tensor
    """(B, L - 1), of the model as it is"""
    increase: Tensor
    """(layers, B, L - 1), of the loss, if this layer alone were changed"""
    together: tuple[Together, ...]
    """with the cheapest layers changed at once"""
    unmeasured: int | None = None
    """where it was interrupted: number of layers whose price was not found"""

    @property
    def note(self) -> str | None:
        """How far it came, if it was interrupted."""
        if self.unmeasured is None:
            return None
        found = len(self.layers)
        return f"interrupted: {found} of {found + self.unmeasured} layers measured, in the order of their calls"

    @property
    def by_layer(self) -> Tensor:
        """(layers,), the mean increase."""
        return self.increase.flatten(1).nanmean(1)

    @property
    def by_token(self) -> Tensor:
        """(B, L - 1), the increase with the most layers changed together; the mean over layers in turn if none were."""
        return self.together[-1].loss - self.loss if self.together else self.increase.mean(0)

    @property
    def cheapest(self) -> tuple[int, ...]:
        """The layers by their mean increase, the smallest first."""
        return tuple(self.by_layer.argsort(stable=True).tolist())


class PriceInterrupted(KeyboardInterrupt):
    """An interrupt while `price` ran, with what it had found."""

    def __init__(self, price: Price) -> None:
        super().__init__(price.note)
        self.price = price


def price(
    model: nn.Module,
    input_ids: Tensor,
    *,
    window: int | None = None,
    sink_tokens: int = 0,
    kv_heads: int | None = None,
    pooling: ConversionMethod = "mean",
    together: Sequence[int] = (),
    on_progress: Callable[[int], None] | None = None,
    **inputs: Any,
) -> Price:
    """The loss on a text if one layer of a language model had a window or fewer KV heads, layer by layer.

    With ``p`` the model's probabilities, the loss of token t is ``-log p(token t | tokens before)``. For the price of a
    layer it alone is changed, and then several at once, the cheapest first. What lies below a changed layer is not
    computed again, so that all prices of n layers take the time of ``n / 2`` passes; models whose layers hand more to
    each other than their output are computed as a whole. The outputs of all layers are kept meanwhile,
    ``B * L * layers * width`` numbers. It is the price before training, which lowers it.

    Of an encoder-decoder, the loss is that of ``decoder_input_ids``, which start with the token that its decoder starts
    with, and a window has a price in the layers in which the decoder attends to these.

    Args:
        model: a causal language model or encoder-decoder of transformers, of any family that runs on "qkv", in
            evaluation mode.
        input_ids: ``(B, L)``.
        window: number of keys that a query would see at most, its own and those before it, as `Mask.causal` counts.
        sink_tokens: number of first keys that the window shows too.
        kv_heads: instead of a window, a number of KV heads that divides the model's, in a family that `convert` knows.
        pooling: for ``kv_heads``: how heads are pooled, as in `convert_layer`.
        together: numbers of layers. For each k of them, the loss with the k cheapest layers changed.
        on_progress: called with the number of losses found so far, of as many as there are layers and numbers in
            ``together``.
        **inputs: other arguments of the model, such as ``attention_mask``.

    Raises:
        PriceInterrupted: for a KeyboardInterrupt after the first layer, with those that were measured before it.
        TypeError: for anything but a model of transformers.
        ValueError: for a model that is training, does not run on "qkv" or predicts no tokens from those before, both
            or neither of window and kv_heads, kv_heads of an encoder-decoder, a text that is no longer than the window,
            a change that alters no layer, more layers together than it alters, and losses that are not finite.
        CheckpointError: for KV heads that the model cannot have, and families that `convert` does not know.

    Example:
        >>> from qkv.analysis import price
        >>> price(model, input_ids, window=256, sink_tokens=4).by_layer  # doctest: +SKIP
    """
    if not isinstance(together, Sequence):
        raise TypeError(f"price: together must be a sequence of counts; got {type(together).__name__}.")
    for number in together:
        require_count("price", "each of together", number, 0)
    with watched("price", model) as known:
        text = _Text("price", model, input_ids, inputs)
        change = _change(text, window, sink_tokens, kv_heads, pooling)
        stack = _Stack(text, known, change)
        names = tuple(known.names[id(layer)] for layer in stack.layers)
        for number in together:
            if number > len(names):
                raise ValueError(f"price: together must be at most {len(names)}, the layers; got {number}.")
        done = 0

        def loss(chosen: Sequence[int]) -> Tensor:
            nonlocal done
            with change.of({names[index]: stack.layers[index] for index in chosen}):
                found = stack.loss_from(min(chosen)) if chosen else stack.loss
            done += 1
            if on_progress is not None:
                on_progress(done)
            return found

        lost = (~stack.loss.isfinite() & text.is_predicted).sum()
        if lost:
            raise ValueError(
                f"price: the model as it is must have a finite loss at each token; {lost} are not. Try another dtype."
            )
        of = change.window, change.sink_tokens, change.kv_heads
        increases: list[Tensor] = []
        some: list[Together] = []

        def so_far() -> Price:
            return Price(str(change), *of, names[: len(increases)], stack.loss, torch.stack(increases), tuple(some))

        try:
            for index in range(len(names)):
                increases.append(loss([index]) - stack.loss)  # noqa: PERF401 - those found so far
            cheapest = so_far().cheapest
            for number in together:
                chosen = tuple(sorted(cheapest[:number]))
                some.append(Together(chosen, loss(chosen)))
        except KeyboardInterrupt as interrupt:
            if not increases:
                raise
            raise PriceInterrupted(so_far()._replace(unmeasured=len(names) - len(increases))) from interrupt
        return so_far()


def losses(model: nn.Module, input_ids: Tensor, **inputs: Any) -> Tensor:
    """The loss of each token of a text but the first, in nats, as `price` has it: ``(B, L - 1)``.

    The logits of all tokens are never in memory together.

    Args:
        model, input_ids, **inputs: as in `price`.

    Raises:
        TypeError, ValueError: as `price`, for the model and the text.

    Example:
        >>> from qkv.analysis import losses
        >>> losses(model, input_ids).mean().exp()  # the perplexity  # doctest: +SKIP
    """
    with watched("losses", model):
        return _Text("losses", model, input_ids, inputs).loss()


def _change(text: "_Text", window: int | None, sink_tokens: int, kv_heads: int | None, how: ConversionMethod) -> Change:
    """The change that the arguments of `price` describe."""
    if (window is None) == (kv_heads is None):
        raise ValueError(f"price: give either window or kv_heads; got {window!r} and {kv_heads!r}.")
    if kv_heads is not None:
        require_count("price", "kv_heads", kv_heads)
        if how not in get_args(ConversionMethod):
            raise ValueError(f"price: pooling must be one of {', '.join(get_args(ConversionMethod))}; got {how!r}.")
        if text.is_encoder_decoder:
            raise ValueError(
                f"price: kv_heads must be None for an encoder-decoder, whose layers of all kinds have as many; got "
                f"{kv_heads}. Convert it, and compare the whole: qkv convert --kv-heads."
            )
        if sink_tokens:
            raise ValueError(f"price: sink_tokens belong to a window; got {sink_tokens} with kv_heads={kv_heads}.")
        return FewerHeads(text.model, kv_heads, how)
    assert window is not None
    require_count("price", "window", window)
    require_count("price", "sink_tokens", sink_tokens, 0)
    length, shown = text.tokens.shape[1], window + sink_tokens
    if shown >= length:
        raise ValueError(f"price: {cuts_nothing(window, sink_tokens, length)}")
    return Window(window, sink_tokens)


class _Text:
    """A text on a model, and its loss."""

    def __init__(self, caller: str, model: Any, input_ids: Tensor, inputs: dict[str, Any]) -> None:
        require_tokens(caller, "input_ids", input_ids, 2)
        require_itself(caller, model)
        refuse_inputs(caller, inputs, "labels", "past_key_values", "inputs_embeds")
        self.caller, self.model = caller, model
        self.body = getattr(model, "base_model", model)
        self.is_encoder_decoder = bool(model.config.is_encoder_decoder)
        has_body = self.is_encoder_decoder or self.body is not model
        if not has_body or model.get_output_embeddings() is None:
            raise ValueError(
                f"{caller}: model must be a causal language model, with a head; got {type(model).__name__}."
            )
        self.inputs = {"input_ids": input_ids, "use_cache": False, "return_dict": True, **inputs}
        predicted = "decoder_input_ids" if self.is_encoder_decoder else "input_ids"
        keep = inputs.get("decoder_attention_mask" if self.is_encoder_decoder else "attention_mask")
        require_tokens(caller, predicted, self.inputs.get(predicted), 2)
        self.tokens = self.inputs[predicted] = self.inputs[predicted].long()
        words = len(self.tokens) * self.model.config.get_text_config().vocab_size
        self.tokens_at_once = max(1, LOGITS_AT_ONCE // words)
        self.is_predicted = torch.ones_like(self.tokens[:, 1:], dtype=torch.bool)
        if isinstance(keep, Tensor) and keep.dim() == 2:
            self.is_predicted = keep[:, 1:].bool() & keep[:, :-1].bool()

    def loss(self) -> Tensor:
        """(B, L - 1), inf where it is not a number. The model's own head is applied to a few tokens at a time."""
        outputs: list[Any] = []

        def run(*args: Any, **kwargs: Any) -> Any:
            outputs.append(forward(*args, **kwargs))
            return of_tokens(-1, None)

        def of_tokens(start: int, stop: int | None) -> Any:
            return type(outputs[0])(last_hidden_state=outputs[0].last_hidden_state[:, start:stop])

        # The head of a few models is applied to a part of the base model, its decoder; that of T5 has no base model.
        for body in dict.fromkeys([self.body, self.model.get_decoder()]):
            if body is self.model:
                continue
            self.body, forward = body, body.forward
            with _forward_as(run, body):
                self.model(**self.inputs)
            if outputs:
                break
        else:
            name = type(self.model).__name__
            raise ValueError(f"{self.caller}: the head of {name} must be applied to the output of its base model.")
        found = []
        step = self.tokens_at_once
        for start in range(0, self.tokens.shape[1] - 1, step):
            following = self.tokens[:, start + 1 : start + 1 + step]
            few = of_tokens(start, start + following.shape[1])
            given = {"input_ids": following}
            if self.is_encoder_decoder:  # where the encoder is not part of the body, it is not called either
                given = {"decoder_input_ids": following, "encoder_outputs": (few.last_hidden_state,)}
            with _forward_as(lambda *_, few=few, **__: few, self.body):
                logits = self.model(**given, use_cache=False, return_dict=True).logits.float()
            few_losses = F.cross_entropy(logits.flatten(0, 1), following.flatten(), reduction="none")
            found.append(few_losses.view_as(following))
        loss = torch.cat(found, dim=1)
        return loss.masked_fill(loss.isnan(), torch.inf).masked_fill(~self.is_predicted, torch.nan)


class _Stack:
    """The layers of a model, with their outputs on a text: those below a changed one are not computed again."""

    layers: list[nn.Module]
    """attention modules that the change alters, in the order of their calls"""

    def __init__(self, text: _Text, known: Watched, change: Change) -> None:
        self.text = text
        blocks = [block for blocks in stacks(text.model) for block in blocks]
        called: dict[nn.Module, int] = {}
        seen: list[nn.Module] = []
        outputs: list[Any] = []
        self._blocks: list[nn.Module] = []

        def kept(block: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            output = forward(*args, **kwargs)  # before hooks, which are called again
            self._blocks.append(block)
            outputs.append(_copied(output))
            return output

        def observe(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> None:
            lengths = q.shape[2], k.shape[2]
            if known.is_cross(module, q, k, options) or sees_later_keys(options["mask"], *lengths, options["offset"]):
                if text.is_encoder_decoder:  # whose decoder's own layers have a price
                    return
                name = known.names[id(module)]
                raise ValueError(f"price: model must be causal; {name} attends to more than earlier tokens.")
            seen.append(module)
            if change.alters(options["mask"]):
                called.setdefault(module, len(self._blocks))

        with ExitStack() as replaced, observed(observe):
            for block in dict.fromkeys(blocks):
                replaced.enter_context(_forward_as(partial(kept, block, block.forward), block))
            self.loss = text.loss()
        if not seen:
            raise known.no_calls("price")
        if not called:
            raise ValueError(
                f"price: {change} must change a layer; all of {type(text.model).__name__} see as few keys already."
            )
        self.layers, self._block_of, self._outputs = list(called), list(called.values()), outputs
        if not self._can_skip():
            self._block_of, self._outputs = [0] * len(called), []

    def _can_skip(self) -> bool:
        """Whether layers need nothing of those below but their output: found out at the last one."""
        if len(set(self._blocks)) != len(self._blocks):
            return False
        try:
            return torch.equal(self.loss_from(-1).nan_to_num(), self.loss.nan_to_num())
        except (LookupError, AttributeError, TypeError):  # what a layer below has not handed on
            return False

    def loss_from(self, layer: int) -> Tensor:
        """The loss, with all computed again from the block of this layer on."""
        below = self._block_of[layer]
        with ExitStack() as replaced:
            for block, output in zip(self._blocks[:below], self._outputs, strict=False):
                replaced.enter_context(_forward_as(lambda *_, output=output, **__: _copied(output), block))
            return self.text.loss()


@contextmanager
def _forward_as(forward: Callable[..., Any], module: nn.Module) -> Iterator[None]:
    """Replaces the forward of one module meanwhile."""
    before = {name: value for name, value in vars(module).items() if name == "forward"}
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]
        vars(module).update(before)


def _copied(output: Any) -> Any:
    """The output of a block, whose tensors are not those that the model goes on with."""
    return tree_map_only(Tensor, torch.clone, output)
