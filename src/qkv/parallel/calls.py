"""Calls of attention over ranks: arguments that fit together, with the scheme that is taken, the same on all ranks."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qkv import backends, functional
from qkv.arguments import require_tensors
from qkv.functional import Options
from qkv.parallel.agreement import agreed, digest, number_of
from qkv.parallel.plan import PLANS
from qkv.parallel.schemes import SCHEMES, Call, PieceOptions, Solve, bytes_sent
from qkv.parallel.sums import of_first_rank
from qkv.parallel.tokens import Tokens, Whole
from qkv.problem import Problem, make_problem
from qkv.scores import Draw, new_seed
from qkv.torch_internals import transforms_are_active


class ShardedOptions(Options, total=False):
    """The keywords of `qkv.attention`."""

    backend: str


class CallOptions(ShardedOptions, total=False):
    """The keywords of `attention` over ranks."""

    key_tokens: Tokens | Whole | None
    scheme: str


def prepared(
    caller: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    tokens: Tokens,
    options: CallOptions,
    *,
    wants_lse: bool = False,
    complete: Callable[[Call], Call] | None = None,
) -> tuple[Call, str]:
    """The call, on which all ranks agree, and its scheme.

    Args:
        caller: which error messages name.
        qkv, tokens, options: as in `attention`.
        wants_lse: whether the lse is wanted.
        complete: adds what a layer has besides.
    """
    _require_tokens(caller, tokens)
    scheme = options.get("scheme", "auto")

    def make() -> tuple[Call, str]:
        call = validated(caller, qkv, tokens, options, wants_lse=wants_lse)
        call = call if complete is None else complete(call)
        return call, chosen_of(bytes_sent(call)) if scheme == "auto" else scheme

    call, chosen = agreed(caller, tokens.route, make, _described)
    common = _described((call, chosen), _shown)
    del common["requires_grad"]  # which matters in a backward pass alone
    route = tokens.route._replace(caller=caller, call=number_of(common))
    return _drawn(call._replace(route=route)), chosen


def chosen_of(sent: dict[str, tuple[int, ...]]) -> str:
    """The scheme that sends the fewest bytes in all."""
    return min(sent, key=lambda name: sum(sent[name]))


def _drawn(call: Call) -> Call:
    """The call with one draw of dropout for all ranks."""
    if not call.scores.dropout:
        return call
    tokens, draw = call.tokens, call.scores.draw or Draw(new_seed())  # one of `Heads` is of another mesh
    assert draw.seed is not None
    seed = of_first_rank(draw.seed, tokens.route.group, tokens.mesh.device_type)
    return call._replace(scores=call.scores._replace(draw=draw._replace(seed=seed)))


def _require_tokens(caller: str, tokens: object) -> None:
    if not isinstance(tokens, Tokens):
        raise TypeError(
            f"{caller}: tokens must be a qkv.parallel.Tokens; got {type(tokens).__name__}. "
            "Use Tokens.even(n, mesh), Tokens.zigzag(n, mesh) or Tokens.best(n, mesh, mask)."
        )


def validated(
    caller: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    tokens: Tokens,
    options: CallOptions,
    *,
    wants_lse: bool = False,
) -> Call:
    """The call, of arguments that fit together."""
    _require_tokens(caller, tokens)
    if options.get("pages") is not None:
        raise ValueError(f"{caller}: pages must be None in a call over ranks; pass the keys of each rank as k and v.")
    k_scale, v_scale = options.get("k_scale"), options.get("v_scale")
    require_tensors(caller, **dict(zip("qkv", qkv, strict=True)))
    for tensor in qkv:
        if tensor.dim() != 4:
            make_problem(caller, *qkv)
    layout, n_keys = _require_layouts(caller, qkv, tokens, options.get("key_tokens"), options.get("scheme", "auto"))
    for name, x in (("v", qkv[2]), ("k_scale", k_scale), ("v_scale", v_scale)):
        if x is not None:
            _require_rows_of_keys(caller, name, x, qkv[1])
    q, k, v = _autocast(qkv)
    stand_ins = [_stand_in(x, n) for x, n in ((q, tokens.length), (k, n_keys), (v, n_keys))]
    given = {name: value for name, value in options.items() if name not in _OF_THE_CALL}
    scales = [None if x is None else _stand_in(x[..., None], n_keys)[..., 0] for x in (k_scale, v_scale)]
    problem = make_problem(
        caller,
        *stand_ins,
        k_scale=scales[0],
        v_scale=scales[1],
        wants_lse=wants_lse,
        **given,  # type: ignore[arg-type]
    )
    backend = options.get("backend", "auto")
    if backend != "auto":
        backends.choose(caller, problem, backend)
    bias = problem.scores.bias
    return _call(
        problem,
        q,
        tuple(x if x.dim() == 4 else x[..., None] for x in (k, v, k_scale, v_scale) if x is not None),
        tokens,
        layout,
        _solver(caller, backend),
        None if bias is None else lambda start, stop: bias if bias.shape[2] == 1 else bias[:, :, start:stop],
    )


_OF_THE_CALL = ("backend", "k_scale", "v_scale", "key_tokens", "scheme")
"""options that are no options of the problem of all ranks, or not as they are"""


def _call(
    problem: Problem,
    q: Tensor,
    keys: tuple[Tensor, ...],
    tokens: Tokens,
    layout: Any,
    solve: Solve,
    bias: Callable[[int, int], Tensor] | None,
) -> Call:
    """The call of a problem of all ranks, with the tensors of this one."""
    return Call(
        q=q,
        keys=keys,
        value_width=problem.v.shape[3],
        tokens=tokens,
        route=tokens.route,
        key_layout=layout,
        n_keys=problem.lk,
        mask=problem.mask,
        offset=problem.offset,
        scores=problem.scores._replace(bias=None),
        bias=bias,
        solve=solve,
        wants_lse=problem.wants_lse,
    )


def _require_layouts(
    caller: str, qkv: Sequence[Tensor], tokens: Tokens, key_tokens: Tokens | Whole | None, scheme: str
) -> tuple[Any, int]:
    """The layout of keys, None if they are whole, and their number."""
    if scheme not in ("auto", *SCHEMES):
        names = ", ".join(map(repr, SCHEMES))
        raise ValueError(f"{caller}: scheme must be 'auto' or one of {names}; got {scheme!r}.")
    if transforms_are_active():
        raise ValueError(f"{caller}: a call over ranks has no functorch transforms; call it outside of them.")
    q, k, _ = qkv
    if q.device.type != tokens.mesh.device_type:
        raise ValueError(
            f"{caller}: q must be on the device of the mesh, {tokens.mesh.device_type}; got {q.device}. "
            f'Use init_device_mesh("{q.device.type}", ...).'
        )
    _require_rows(caller, "q", q, tokens)
    if isinstance(key_tokens, Whole):
        if scheme not in ("auto", "gather"):
            raise ValueError(
                f"{caller}: scheme must be 'auto' or 'gather' for keys that each rank has whole; got {scheme!r}."
            )
        return None, k.shape[2]
    key_tokens = tokens if key_tokens is None else key_tokens
    if not isinstance(key_tokens, Tokens):
        raise TypeError(
            f"{caller}: key_tokens must be a qkv.parallel.Tokens, parallel.WHOLE or None; "
            f"got {type(key_tokens).__name__}."
        )
    if key_tokens.mesh != tokens.mesh:
        raise ValueError(
            f"{caller}: key_tokens must be of the mesh of tokens, {tokens.mesh}; got one of {key_tokens.mesh}."
        )
    _require_rows(caller, "k", k, key_tokens)
    return key_tokens.runs, key_tokens.length


def _require_rows(caller: str, name: str, x: Tensor, tokens: Tokens) -> None:
    if x.shape[2] != tokens.rows:
        raise ValueError(
            f"{caller}: {name} must have the {tokens.rows} rows that the layout gives rank {tokens.rank} of "
            f"{len(tokens.runs)}; got {x.shape[2]}. Use tokens.take({name}, dim=2) of all {tokens.length} rows."
        )


def _require_rows_of_keys(caller: str, name: str, x: Tensor, k: Tensor) -> None:
    require_tensors(caller, **{name: x})
    if x.dim() < 3 or x.shape[2] != k.shape[2]:
        raise ValueError(
            f"{caller}: {name} must have the {k.shape[2]} rows that k has on this rank, in dimension 2; "
            f"got shape {tuple(x.shape)}."
        )


def _autocast(qkv: tuple[Tensor, Tensor, Tensor]) -> list[Tensor]:
    """The tensors in the dtype of autocast, as `make_problem` would cast them."""
    q = qkv[0]
    if not torch.is_autocast_enabled(q.device.type) or q.dtype == torch.float64:
        return list(qkv)
    dtype = torch.get_autocast_dtype(q.device.type)
    return [x if x.dtype is torch.int8 else x.to(dtype) for x in qkv]


def _stand_in(x: Tensor, rows: int) -> Tensor:
    """A tensor like x with other rows, without their memory: for checks of what all ranks have together."""
    batch, heads, _, width = x.shape
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    return x.detach().new_empty((1, 1, 1, width)).requires_grad_(needs_grad).expand(batch, heads, rows, width)


def _solver(caller: str, backend: str) -> Solve:
    """`qkv.attention` over a piece."""

    def solve(
        q: Tensor, keys: Sequence[Tensor], options: PieceOptions, *, wants_lse: bool
    ) -> tuple[Tensor, Tensor | None]:
        k, v, *scales = keys
        given: dict[str, Any] = {**options, "backend": backend}
        if scales:
            given |= {"k_scale": scales[0][..., 0], "v_scale": scales[1][..., 0]}
        device = q.device.type
        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            # Tensors have the dtype of autocast, or for `merge` a wider one.
            if wants_lse:
                return functional.attend(caller, q, k, v, **given)
            return functional.attention(q, k, v, **given), None

    return solve


def _described(made: tuple[Call, str], written: Callable[[Tensor], str] = digest) -> dict[str, str]:
    """What all ranks must have in common."""
    call, scheme = made
    offset = call.offset
    tensors = (call.q, *call.keys)

    def each(values: Sequence[Any]) -> str:
        return repr([written(x) if isinstance(x, Tensor) else x for x in values])

    return {
        "scheme": scheme,
        "tokens": _runs(call.tokens.runs),
        "key_tokens": _runs(call.key_layout),
        "mask": " & ".join([repr(call.mask), *(written(tensor) for _, tensor in call.mask.tensors())]),
        "offset": written(offset) if isinstance(offset, Tensor) else str(offset),
        "q and keys": repr([(x.shape[0], x.shape[1], x.shape[3], x.dtype) for x in tensors]),
        "requires_grad": repr([x.requires_grad for x in tensors]),
        "scores": each(call.scores._replace(draw=None)),
        "draw": each(call.scores.draw or ()),
        "bias": repr(call.bias is not None),
        "lse": repr(call.wants_lse),
    }


_runs = lru_cache(PLANS)(repr)
"""layouts as text, of which those of many ranks are long"""


def _shown(tensor: Tensor) -> str:
    """A tensor without its numbers."""
    return f"<{tensor.dtype} {tuple(tensor.shape)}>"
