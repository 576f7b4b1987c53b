"""`load`: a causal language model and its tokenizer, with transformers kept quiet."""

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

MAX_OF_A_CAUSE = 400
"""Characters of what transformers says, which may be pages."""


class LanguageModel(NamedTuple):
    """What `load` returns."""

    name: str
    model: Any
    """A transformers model."""
    tokenizer: Any

    def encode(self, prompt: str, max_new_tokens: int) -> dict[str, Tensor]:
        """The prompt's ``input_ids`` and ``attention_mask``, (1, L) each, through the chat template if there is one.

        Raises:
            CommandError: where there are no tokens, or too many for the model.
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
        length, room = inputs["input_ids"].shape[1], self.context_length
        if length == 0:
            raise CommandError(f"--prompt: {prompt!r} has no tokens in the vocabulary of {self.name}; give another.")
        if room is not None and length + max_new_tokens > room:
            raise CommandError(
                f"--prompt and --max-new-tokens must fit into the {room} tokens of {self.name} together; "
                f"got {length} and {max_new_tokens}. Give a shorter prompt or fewer new tokens."
            )
        return inputs

    @property
    def context_length(self) -> int | None:
        """The most tokens that the model can take, where it says so."""
        length: int | None = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return length

    def decode(self, tokens: tuple[int, ...]) -> str:
        """The text of tokens, without special ones."""
        text: str = self.tokenizer.decode(list(tokens), skip_special_tokens=True)
        return text


def load(source: ModelSource, dtype: torch.dtype, progress: Progress) -> LanguageModel:
    """Loads tokenizer and model on the CPU.

    Raises:
        CommandError: where transformers cannot, and for what is no causal language model.
    """
    with progress.step("starting transformers"), quiet():
        from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
    place = {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    unpacked = {} if source.gguf_file is None else _unpacked_weights()
    with progress.step("loading the tokenizer"), _explained(source, "configuration or tokenizer"), quiet():
        config = AutoConfig.from_pretrained(source.location, **place)
        _check_causal(source, config)
        tokenizer = AutoTokenizer.from_pretrained(source.location, **place)
    with progress.step("loading the model"), _explained(source, "weights"), quiet():
        # The configuration is passed on because reading it from a GGUF file takes seconds.
        model = AutoModelForCausalLM.from_pretrained(source.location, config=config, dtype=dtype, **place, **unpacked)
    return LanguageModel(source.name, model.eval(), tokenizer)


def _unpacked_weights() -> dict[str, Any]:
    """Options for plain weights of the dtype asked for, whatever kernels for packed ones are installed."""
    import transformers

    # Versions without GgufConfig always unpack.
    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}


@contextmanager
def quiet() -> Iterator[None]:
    """Drops what others print, log and warn: what matters of it comes as an exception."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _explained(source: ModelSource, part: str) -> Iterator[None]:
    """Whatever loading raises, of a damaged file, a missing one or no network, as one message."""
    try:
        yield
    except CommandError:
        raise
    except Exception as error:
        cause = textwrap.shorten(f"{type(error).__name__}: {error}", MAX_OF_A_CAUSE, placeholder=" ...")
        remedy = (
            "Check the name and the network, or give a local folder or a GGUF file."
            if source.is_remote
            else "Check that it is complete, and of a kind that this version of transformers knows."
        )
        raise CommandError(f"the {part} of {source.path!r} cannot be loaded. {cause}\n{remedy}") from error


def _check_causal(source: ModelSource, config: Any) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    architectures = config.architectures or [expected]
    if expected is None or config.is_encoder_decoder or expected not in architectures:
        kind = ", ".join(config.architectures or []) or config.model_type
        raise CommandError(
            f"{source.path!r} must be a causal language model, one that continues a text; it is {kind}. "
            "Give one such as SmolLM2, Llama, Mistral, Qwen or Gemma."
        )
