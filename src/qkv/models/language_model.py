"""`load`: loads a model that reads text, and its tokenizer, without transformers' output."""

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from qkv.models.errors import CommandError
from qkv.models.progress import Progress
from qkv.models.source import ModelSource

MAX_CAUSE = 400
"""Characters of a message of transformers that are shown."""

SPACE = "\u2581"
"""How tokens of SentencePiece begin that a space stands before."""
Kind = Literal["language model", "encoder", "encoder-decoder"]
"""A causal language model; a model without a head, whatever its mask; one that reads a text and writes another."""


class LanguageModel(NamedTuple):
    """A model that reads text, with its tokenizer."""

    name: str
    model: Any
    """A transformers model."""
    tokenizer: Any
    kind: Kind = "language model"

    def encode(self, prompt: str, max_new_tokens: int) -> dict[str, Tensor]:
        """The prompt's ``input_ids`` and ``attention_mask`` ``(1, L)``, with the chat template if there is one.

        Raises:
            CommandError: for a prompt without tokens, and one that does not fit with ``max_new_tokens``.
        """
        with quiet():
            if self.tokenizer.chat_template is None:
                encoded = self.tokenizer(prompt, return_tensors="pt")
            else:
                messages = [{"role": "user", "content": prompt}]
                encoded = self.tokenizer.apply_chat_template(
                    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
                )
        inputs = {name: encoded[name] for name in ("input_ids", "attention_mask")}
        length, limit = inputs["input_ids"].shape[1], self.context_length
        if length == 0:
            raise CommandError(f"--prompt: {prompt!r} has no tokens in the vocabulary of {self.name}; give another.")
        if limit is not None and length + max_new_tokens > limit:
            raise CommandError(
                f"--prompt and --max-new-tokens must fit into the context of {self.name}, {limit} tokens; "
                f"got {length} + {max_new_tokens}. Give a shorter prompt or fewer new tokens."
            )
        return inputs

    @property
    def context_length(self) -> int | None:
        """The model's maximum number of tokens; None where its configuration has none."""
        length: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        for module in self.model.modules():
            # RoBERTa and its kin have no token at the positions up to that of padding.
            if not isinstance(module, torch.nn.Embedding) or module is self.model.get_input_embeddings():
                continue
            if length is not None and module.num_embeddings == length and module.padding_idx is not None:
                return length - module.padding_idx - 1
        return length

    @property
    def vocabulary(self) -> int:
        """The number of tokens that the model knows."""
        count: int = self.model.get_input_embeddings().num_embeddings
        return count

    def check_vocabulary(self, token_ids: Tensor) -> None:
        """Raises a CommandError if the tokenizer gave tokens that the model does not know."""
        if token_ids.max() >= self.vocabulary:
            raise CommandError(
                f"the tokenizer of {self.name} belongs to another model: it gives token {token_ids.max()}, but the "
                f"model's vocabulary has {self.vocabulary} tokens."
            )

    def after_start(self, token_ids: Tensor) -> Tensor:
        """Tokens ``(1, L)`` that an encoder-decoder writes, after the one with which its decoder starts."""
        starts = self.model.prepare_decoder_input_ids_from_labels(labels=token_ids)[:, :1]
        return torch.cat([starts.to(token_ids.dtype), token_ids], dim=1)

    def first(self, token_ids: Tensor, count: int) -> Tensor:
        """The first tokens ``(1, L)`` of a text; an encoder gets the special ones at its end too, such as [SEP]."""
        ids = token_ids[0].tolist()
        if self.kind == "language model" or count >= len(ids):
            return token_ids[:, :count]
        is_special = self.tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True)
        last = len(ids)
        while last > 0 and is_special[last - 1]:
            last -= 1
        at_end = min(len(ids) - last, count - 1)
        return torch.cat([token_ids[:, : count - at_end], token_ids[:, len(ids) - at_end :]], dim=1)

    def pieces(self, token_ids: Tensor) -> tuple[str, ...]:
        """Each of the tokens ``(1, L)`` as it reads within a text, with the space before it.

        Tokenizers drop that space where a token stands alone; WordPiece marks tokens without one instead.
        """
        ids = token_ids[0].tolist()
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        joins = getattr(getattr(backend, "model", None), "continuing_subword_prefix", None)
        special = set(self.tokenizer.all_special_ids)
        found = []
        for token, name in zip(ids, self.tokenizer.convert_ids_to_tokens(ids), strict=True):
            text = self.tokenizer.decode([token])
            if name.startswith(SPACE) or (joins and not name.startswith(joins) and token not in special):
                text = text if text.startswith(" ") else f" {text}"
            found.append(text.removeprefix(joins) if joins else text)
        return tuple(found)

    def cast(self, dtype: torch.dtype) -> None:
        """Converts the weights in place; buffers stay as ``from_pretrained(dtype=...)`` leaves them, such as the
        frequencies of rotary embeddings in fp32.
        """
        for parameter in self.model.parameters():
            parameter.data = parameter.data.to(dtype)

    def decode(self, tokens: tuple[int, ...]) -> str:
        """The text of tokens, without special tokens."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


class Opened(NamedTuple):
    """A model whose weights are not loaded yet, so that what it cannot do is said before that."""

    source: ModelSource
    config: Any
    tokenizer: Any
    kind: Kind

    def without_weights(self) -> Any:
        """A causal language model on the meta device: names and shapes of its weights."""
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(self.config)

    def load(self, dtype: torch.dtype, progress: Progress) -> LanguageModel:
        """Loads the model on the CPU. That of an encoder is the body, without a head.

        Raises:
            CommandError: where transformers fails, and for a model that does not read tokens.
        """
        from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

        classes = {
            "language model": AutoModelForCausalLM,
            "encoder": AutoModel,
            "encoder-decoder": AutoModelForSeq2SeqLM,
        }
        file = _file(self.source)
        dequantize = _dequantize_options() if file else {}
        with progress.step("loading the model"), _as_command_error(self.source, "weights"), quiet():
            # Passing the configuration saves seconds: reading it again from a GGUF file is slow.
            model, found = classes[self.kind].from_pretrained(
                self.source.location, config=self.config, dtype=dtype, output_loading_info=True, **file, **dequantize
            )
        missing = sorted({*found["missing_keys"]} & {name for name, _ in model.named_parameters()})
        if missing and self.kind != "encoder":  # those of a body alone are enough for an encoder, without its pooler
            raise CommandError(
                f"{self.source.path!r} must have all weights of {type(model).__name__}; it lacks {missing[0]}"
                f"{f' and {len(missing) - 1} more' if len(missing) > 1 else ''}. Give a complete checkpoint."
            )
        if model.main_input_name != "input_ids":
            raise CommandError(
                f"{self.source.path!r} must be a model that reads tokens; {type(model).__name__} reads "
                f"{model.main_input_name}. Give a model of text."
            )
        return LanguageModel(self.source.name, model.eval(), self.tokenizer, self.kind)


def open_model(source: ModelSource, progress: Progress) -> Opened:
    """Loads configuration and tokenizer of a model.

    Raises:
        CommandError: where transformers fails, and for configurations of which it has no model.
    """
    _start(progress)
    return _open(source, progress, must_be_causal=False)


def load(source: ModelSource, dtype: torch.dtype, progress: Progress) -> LanguageModel:
    """Loads tokenizer and causal language model on the CPU.

    Raises:
        CommandError: where transformers fails, and for models that are not causal language models.
    """
    _start(progress)
    return _open(source, progress, must_be_causal=True).load(dtype, progress)


def _start(progress: Progress) -> None:
    with progress.step("starting transformers"), quiet():
        from transformers import AutoModel, AutoTokenizer  # noqa: F401 - the seconds of the step
        from transformers.utils import logging

        logging.set_verbosity_error()


def _open(source: ModelSource, progress: Progress, *, must_be_causal: bool) -> Opened:
    from transformers import AutoConfig, AutoTokenizer

    file = _file(source)
    with progress.step("loading the tokenizer"), _as_command_error(source, "configuration or tokenizer"), quiet():
        config = AutoConfig.from_pretrained(source.location, **file)
        kind = _kind(config)
        if kind is None or (must_be_causal and kind != "language model"):
            others = "" if must_be_causal else ", an encoder or an encoder-decoder of text"
            raise CommandError(
                f"{source.path!r} must be a causal language model{others}; got "
                f"{', '.join(config.architectures or []) or config.model_type}. "
                "Give a model such as SmolLM2, Llama, Mistral, Qwen or Gemma."
            )
        tokenizer = AutoTokenizer.from_pretrained(source.location, **file)
    return Opened(source, config, tokenizer, kind)


def _file(source: ModelSource) -> dict[str, str]:
    return {} if source.gguf_file is None else {"gguf_file": source.gguf_file}


def _dequantize_options() -> dict[str, Any]:
    """Options of ``from_pretrained`` that dequantise GGUF weights, even where quantised kernels are installed."""
    import transformers

    # Versions without GgufConfig always dequantise.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def quiet() -> Iterator[None]:
    """Silences stdout, stderr and warnings of libraries; errors are exceptions."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _as_command_error(source: ModelSource, part: str) -> Iterator[None]:
    """Turns any exception while loading ``part`` of a model into a CommandError."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", MAX_CAUSE, placeholder=" ...")
        remedy = (
            "Check the name and the network, or give a local folder or a GGUF file."
            if source.is_remote
            else "Check that it is complete, and that this version of transformers supports it."
        )
        raise CommandError(f"cannot load the {part} of {source.path!r}. {cause}\n{remedy}") from error


def _kind(config: Any) -> Kind | None:
    """What a configuration is of; None where transformers has no such model of text."""
    from transformers.models.auto import modeling_auto as auto

    kind, architectures = type(config), config.architectures or []
    if config.is_encoder_decoder:
        return "encoder-decoder" if kind in auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING else None
    causal = auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(kind, None)
    # Encoders have a class with a causal head too, of which few checkpoints are.
    is_unnamed = not architectures and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING
    if causal is not None and (causal.__name__ in architectures or is_unnamed):
        return "language model"
    return "encoder" if kind in auto.MODEL_MAPPING else None
