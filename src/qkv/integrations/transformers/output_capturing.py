"""The hooks by which transformers captures hidden states and weights. They stay after the first call that does."""

import importlib
from typing import Any

MODULE = "transformers.utils.output_capturing"
"""The module of these hooks."""


def is_capturing() -> bool:
    """Whether transformers captures hidden states or weights in this call."""
    try:
        return bool(importlib.import_module(MODULE)._active_collector.get())
    except (ImportError, AttributeError):
        return True


def is_idle(hook: Any) -> bool:
    """Whether a hook of a module is one of these, and does nothing in this call."""
    return getattr(hook, "__module__", None) == MODULE and not is_capturing()
