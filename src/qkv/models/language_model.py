"""`load`: loads a causal language model and its tokenizer, without transformers' output."""

import io
import textwrap
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkv.models.errors import CommandError
from qkv.models.progress import Progress
from qkv.models.source import ModelSource

MAX_CAUSE = 400
"""Characters of a message of transformers that are shown."""


class LanguageModel(NamedTuple):
    """A causal language model with its tokenizer."""

    name: str
    model: Any
    """A transformers model."""
    tokenizer: Any

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


def load(source: ModelSource, dtype: torch.dtype, progress: Progress) -> LanguageModel:
    """Loads tokenizer and model on the CPU.

    Raises:
        CommandError: where transformers fails, and for models that are not causal language models.
    """
    with progress.step("starting transformers"), quiet():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
    file = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    dequantize = {} if source.gguf_file is None else _dequantize_options()
    with progress.step("loading the tokenizer"), _as_command_error(source, "configuration or tokenizer"), quiet():
        config = AutoConfig.from_pretrained(source.location, **file)
        _check_causal(source, config)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **file)
    with progress.step("loading the model"), _as_command_error(source, "weights"), quiet():
        # Passing the configuration saves seconds: reading it again from a GGUF file is slow.
        model = AutoModelForCausalLM.from_pretrained(source.location, config=config, dtype=dtype, **file, **dequantize)
    return LanguageModel(source.name, model.eval(), tokenizer)


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


def _check_causal(source: ModelSource, config: Any) -> None:
    """Raises a CommandError unless the configuration is of a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    is_known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    expected = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__ if is_known else None
    architectures = config.architectures or [expected]
    if expected is None or config.is_encoder_decoder or expected not in architectures:
        kind = ", ".join(config.architectures or []) or config.model_type
        raise CommandError(
            f"{source.path!r} must be a causal language model; got {kind}. "
            "Give a model such as SmolLM2, Llama, Mistral, Qwen or Gemma."
        )
