"""What a conversion does to a model's predictions on a sample of text, one model in memory at a time."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.convert.divergence import compare, predict
from qkv.convert.families.encoder_decoder import ENCODER_DECODERS
from qkv.convert.files.folder import Folder
from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import readable_bytes
from qkv.models.language_model import load, quiet
from qkv.models.progress import Progress
from qkv.models.source import ModelSource, expand_home

MAX_TOKENS = 512
MAX_CHARACTERS = 32 * MAX_TOKENS
"""Of a file: more than its first tokens have."""
MAX_BYTES = 2 << 30
"""Weights of a model that is loaded without being asked for."""
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
"""Files of which a folder with a tokenizer has one."""


class Sample(NamedTuple):
    """A text to compare models on."""

    name: str
    text: str


DARWIN = Sample(
    "the beginning of On the Origin of Species",
    # Darwin 1859, the introduction.
    "When on board H.M.S. 'Beagle,' as naturalist, I was much struck with certain facts in the distribution of the "
    "inhabitants of South America, and in the geological relations of the present to the past inhabitants of that "
    "continent. These facts seemed to me to throw some light on the origin of species—that mystery of mysteries, as it "
    "has been called by one of our greatest philosophers. On my return home, it occurred to me, in 1837, that "
    "something might perhaps be made out on this question by patiently accumulating and reflecting on all sorts of "
    "facts which could possibly have any bearing on it. After five years' work I allowed myself to speculate on the "
    "subject, and drew up some short notes; these I enlarged in 1844 into a sketch of the conclusions, which then "
    "seemed to me probable: from that period to the present day I have steadily pursued the same object. I hope that I "
    "may be excused for entering on these personal details, as I give them to show that I have not been hasty in "
    "coming to a decision.\n\n"
    "My work is now nearly finished; but as it will take me two or three more years to complete it, and as my health "
    "is far from strong, I have been urged to publish this Abstract. I have more especially been induced to do this, "
    "as Mr. Wallace, who is now studying the natural history of the Malay archipelago, has arrived at almost exactly "
    "the same general conclusions that I have on the origin of species. Last year he sent to me a memoir on this "
    "subject, with a request that I would forward it to Sir Charles Lyell, who sent it to the Linnean Society, and it "
    "is published in the third volume of the Journal of that Society.",
)


class Predictions(NamedTuple):
    """What a model makes of a sample."""

    sample: str
    """Its name."""
    token_ids: Tensor
    logits: Tensor


def predict_original(source: Folder, dtype: torch.dtype, file: Path | None, progress: Progress) -> Predictions | str:
    """What the model in ``source`` predicts on ``file``, or if nobody asked for one, on a text of ours, where it can.

    Returns:
        The predictions, or why there are none.

    Raises:
        CommandError: for a file that cannot be used, or a model that cannot be loaded to use it.
    """
    if file is not None:
        return _predict(source.path, dtype, _read(file), progress)
    num_bytes = sum(spec.num_bytes for spec in source.tensors.values())
    if not any((source.path / name).is_file() for name in TOKENIZERS):
        return "the model comes without a tokenizer"
    if source.config["model_type"] in ENCODER_DECODERS:
        return "only those of causal language models are"
    if num_bytes > MAX_BYTES:
        return f"the model takes {readable_bytes(num_bytes)}, more than {readable_bytes(MAX_BYTES)}; ask with --text"
    try:
        return _predict(source.path, dtype, DARWIN, progress)
    except CommandError as error:
        return " ".join(str(error).split())


def describe_divergence(original: Predictions | str, folder: Path, dtype: torch.dtype, progress: Progress) -> list[str]:
    """How far the predictions of the model in ``folder`` are from the original's, in lines of a report."""
    if isinstance(original, str):
        return ["", f"  predictions not compared: {original}"]
    model = load(ModelSource(str(folder), str(folder)), dtype, progress).model
    with progress.step("predicting the sample"), quiet():
        found = compare(original.logits, predict(model, original.token_ids), original.token_ids)
    return [
        "",
        f"  predictions of {found.num_tokens} tokens of {original.sample}",
        f"    loss {found.loss_before:.3f} became {found.loss_after:.3f} nats a token",
        f"    perplexity {found.perplexity_before:,.1f} became {found.perplexity_after:,.1f}",
        f"    KL divergence {found.kl:.3f} nats a token, the same most probable token for {found.agreement:.1%}",
    ]


def _predict(folder: Path, dtype: torch.dtype, sample: Sample, progress: Progress) -> Predictions:
    loaded = load(ModelSource(str(folder), str(folder)), dtype, progress)
    length = min(MAX_TOKENS, loaded.context_length or MAX_TOKENS)
    with progress.step("predicting the sample"), quiet():
        token_ids = loaded.tokenizer(sample.text, truncation=True, max_length=length, return_tensors="pt").input_ids
        if token_ids.shape[1] < 2:
            raise CommandError(f"--text: {sample.name} must have at least two tokens; give a longer one.")
        vocabulary = loaded.model.get_input_embeddings().num_embeddings
        if token_ids.max() >= vocabulary:
            raise CommandError(
                f"the tokenizer in {folder} gives token {token_ids.max()}, and the model knows {vocabulary}; "
                "it is that of another model."
            )
        return Predictions(sample.name, token_ids, predict(loaded.model, token_ids))


def _read(file: Path) -> Sample:
    """The beginning of a text."""
    try:
        with expand_home(file).open(encoding="utf-8") as opened:
            return Sample(str(file), opened.read(MAX_CHARACTERS))
    except OSError as error:
        raise CommandError(f"--text: {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"--text: {file} must be a text in UTF-8; {error.reason} at byte {error.start}.") from error
