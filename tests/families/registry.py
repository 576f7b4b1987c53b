"""Which families there are, and which class stands for each: read from transformers, not picked."""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto import modeling_auto

MODELS = Path(transformers.__file__).parent / "models"

# Whole models with the head they are trained with come first, bare models last.
PREFERENCE = (
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_CTC_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "MODEL_MAPPING_NAMES",
)


def families() -> list[str]:
    """Modules under ``transformers.models`` that call attention through the interface, by their dotted name."""
    files = sorted(MODELS.glob("*/modeling_*.py"))
    return [f"{f.parent.name}.{f.stem}" for f in files if "ALL_ATTENTION_FUNCTIONS" in f.read_text()]


def short(family: str) -> str:
    """The name of a family in tables: its folder, with the file's name where a folder holds several."""
    folder, file = family.split(".")
    return folder if file == f"modeling_{folder}" else file.removeprefix("modeling_")


def candidates(family: str) -> Iterator[Any]:
    """The model classes of a family's own module, the preferred first."""
    module = importlib.import_module(f"transformers.models.{family}")
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, transformers.PreTrainedModel)
        and value.__module__ == module.__name__
        and not name.endswith("PreTrainedModel")
        and getattr(value, "config_class", None) is not None
    ]
    return iter(sorted(classes, key=lambda cls: _rank(cls.__name__)))


def _rank(name: str) -> tuple[int, bool]:
    for place, mapping in enumerate(PREFERENCE):
        for names in getattr(modeling_auto, mapping).values():
            if name in ((names,) if isinstance(names, str) else names):
                return place, False
    return len(PREFERENCE), not name.endswith("Model")
