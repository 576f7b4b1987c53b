"""`call`: a function that compilers do not follow. Imported where there is a compiler: torch imports it for this."""

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable(  # type: ignore[untyped-decorator]
    reason="qkv: calls over ranks must be outside of graphs, as each rank has its own; got one inside, under "
    "fullgraph=True. Compile without fullgraph: what is before and after the call is compiled then"
)
def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """``function(*args, **kwargs)``."""
    return function(*args, **kwargs)
