"""`upstream` prints whether a complaint still applies to the installed version; `ranks` is that of ``parallel``."""

from collections.abc import Callable

import pytest
import torch
from parallel.conftest import ranks as ranks


@pytest.fixture
def upstream(request: pytest.FixtureRequest) -> Callable[[Callable[[], bool]], None]:
    """Prints whether the complaint still applies to the installed version; asserts nothing. ``pytest -rP`` shows it."""

    def note(complaint: Callable[[], bool]) -> None:
        try:
            verdict = "still so" if complaint() else "mended"
        except Exception as error:
            verdict = f"still so, raises {type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"torch {torch.__version__}, {request.node.name}: {verdict}")

    return note
