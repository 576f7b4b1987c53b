"""Positions with several axes: by which of them each pair of channels rotates."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkv.arguments import described, require_count


def axes_of_pairs(sections: tuple[int, ...], interleaved: bool, device: torch.device) -> Tensor:
    """``(sum(sections),)``, the axis by whose positions each pair rotates."""
    return torch.tensor(_in_turns(sections) if interleaved else _in_blocks(sections), device=device)


def require_sections(caller: str, sections: Any, pairs: int, interleaved: bool) -> tuple[int, ...]:
    """The sections. Raises unless they are the numbers of pairs of at least two axes, ``pairs`` together."""
    required = f"{caller}: sections must be the numbers of pairs of two axes or more, {pairs} together"
    if not isinstance(sections, Sequence) or isinstance(sections, str):
        raise TypeError(f"{required}; got {described(sections)}.")
    for count in sections:
        require_count(caller, "each of sections", count)
    counts = tuple(map(int, sections))
    if len(counts) < 2 or sum(counts) != pairs:
        raise ValueError(f"{required}; got {counts}.")
    if interleaved and [_in_turns(counts).count(axis) for axis in range(len(counts))] != list(counts):
        raise ValueError(
            f"{caller}: sections that are interleaved must give the first axis the most pairs; got {counts}. "
            "Order them so, or pass interleaved_sections=False."
        )
    return counts


def _in_blocks(sections: tuple[int, ...]) -> list[int]:
    """``[0, 0, 0, 1, 1]`` for sections (3, 2)."""
    return [axis for axis, count in enumerate(sections) for _ in range(count)]


def _in_turns(sections: tuple[int, ...]) -> list[int]:
    """``[0, 1, 0, 1, 0]`` for sections (3, 2): axes take turns, and the first one also takes the pairs left over."""
    axes = [0] * sum(sections)
    for axis in range(1, len(sections)):
        for pair in range(axis, len(axes), len(sections))[: sections[axis]]:
            axes[pair] = axis
    return axes
