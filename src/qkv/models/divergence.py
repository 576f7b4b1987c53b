"""Compares the predictions of original and converted model on a text, with one model in memory at a time."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from qkv.convert.divergence import Divergence, compare, predict
from qkv.convert.families.encoder_decoder import ENCODER_DECODERS
from qkv.convert.files.folder import Folder
from qkv.models.errors import CommandError
from qkv.models.kv_cache_size import readable_bytes
from qkv.models.language_model import load, quiet
from qkv.models.progress import Progress
from qkv.models.source import ModelSource
from qkv.models.text import read_text

MAX_TOKENS = 512
MAX_CHARACTERS = 32 * MAX_TOKENS
"""Read from a file; enough for `MAX_TOKENS`."""
MAX_BYTES = 2 << 30
"""Weights of models that are compared by default, without ``--text``."""
TOKENIZERS = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
"""A folder with a tokenizer contains one of these files."""


class Sample(NamedTuple):
    """A text for the comparison, with its name."""

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
    """The logits of a model on a sample."""

    sample: str
    """Name of the sample."""
    token_ids: Tensor
    logits: Tensor


def predict_original(source: Folder, dtype: torch.dtype, file: Path | None, progress: Progress) -> Predictions | str:
    """The predictions of the model in ``source`` on ``file``, or on a built-in text if ``file`` is None.

    Returns:
        the predictions, or the reason why the built-in text was not used.

    Raises:
        CommandError: where ``file`` is given, and it cannot be read or the model cannot be loaded.
    """
    if file is not None:
        return _predict(source.path, dtype, Sample(str(file), read_text(file, MAX_CHARACTERS)), progress)
    num_bytes = sum(spec.num_bytes for spec in source.tensors.values())
    if not any((source.path / name).is_file() for name in TOKENIZERS):
        return "the model has no tokenizer"
    if source.config["model_type"] in ENCODER_DECODERS:
        return "only causal language models are compared"
    if num_bytes > MAX_BYTES:
        return f"the weights take {readable_bytes(num_bytes)}, more than {readable_bytes(MAX_BYTES)}; give --text"
    try:
        return _predict(source.path, dtype, DARWIN, progress)
    except CommandError as error:
        return " ".join(str(error).split())


class Compared(NamedTuple):
    """The divergence of a converted model from the original on a sample."""

    sample: str
    """Name of the sample."""
    length: int
    """Tokens of the sample."""
    divergence: Divergence

    @property
    def increase(self) -> float:
        """Of the loss, in nats a token."""
        return self.divergence.loss_after - self.divergence.loss_before


def compare_with(original: Predictions | str, folder: Path, dtype: torch.dtype, progress: Progress) -> Compared | str:
    """Compares the model in ``folder`` with the original; a reason why not is handed on.

    Raises:
        CommandError: where the model cannot be loaded.
    """
    if isinstance(original, str):
        return original
    model = load(ModelSource(str(folder), str(folder)), dtype, progress).model
    with progress.step("predicting the sample"), quiet():
        divergence = compare(original.logits, predict(model, original.token_ids), original.token_ids)
    return Compared(original.sample, original.token_ids.shape[1], divergence)


def _predict(folder: Path, dtype: torch.dtype, sample: Sample, progress: Progress) -> Predictions:
    """The predictions of the model in ``folder`` on a sample."""
    loaded = load(ModelSource(str(folder), str(folder)), dtype, progress)
    length = min(MAX_TOKENS, loaded.context_length or MAX_TOKENS)
    with progress.step("predicting the sample"), quiet():
        token_ids = loaded.tokenizer(sample.text, truncation=True, max_length=length, return_tensors="pt").input_ids
        if token_ids.shape[1] < 2:
            raise CommandError(f"--text: {sample.name} must have at least two tokens; give a longer text.")
        loaded.check_vocabulary(token_ids)
        return Predictions(sample.name, token_ids, predict(loaded.model, token_ids))
