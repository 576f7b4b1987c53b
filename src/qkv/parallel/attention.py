"""`attention`, `attention_with_lse`, `merge` and `explain` over ranks: validate, choose a scheme, run it."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh
from typing_extensions import Unpack

from qkv import backends, functional
from qkv.arguments import require_tensors
from qkv.backends.result import accumulation_dtype
from qkv.functional import Options
from qkv.parallel.agreement import agreed, digest
from qkv.parallel.compiling import between_graphs
from qkv.parallel.exchange import Route, exchange
from qkv.parallel.plan import stacking
from qkv.parallel.schemes import SCHEMES, Call, PieceOptions, Solve, bytes_sent, scores_computed
from qkv.parallel.sums import of_first_rank
from qkv.parallel.tokens import Tokens, Whole
from qkv.partial import Partial, merge_stacked
from qkv.problem import Problem, make_problem
from qkv.scores import Draw, new_seed


class ShardedOptions(Options, total=False):
    """The keywords of `qkv.attention`."""

    backend: str


@between_graphs
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    *,
    key_tokens: Tokens | Whole | None = None,
    scheme: str = "auto",
    **options: Unpack[ShardedOptions],
) -> Tensor:
    """`qkv.attention` of a sequence that is cut over ranks: each passes its rows, and gets those of the output.

    All ranks of the mesh must make the same call, and its backward pass if any does. Masks, biases, documents and
    offsets are those of the whole sequence, as if one process computed all of it, and whole on each rank.

    - ``gather`` sends each rank the keys that its queries may see: of a full mask all, of a causal one half, of a
      window the window, of documents what is left of them. On the kernel, output and dq have the bits of one process,
      if runs have two rows or more.
    - ``heads`` sends each rank all rows of some heads, and outputs back. On the kernel, everything has the bits of one
      process, dk and dv too, if the KV heads are a multiple of the ranks.
    - ``merge`` sends queries to the ranks whose keys they may see, and partial results in fp32 back.

    Sums over ranks are in their order and in fp32, so all gradients have the same bits each time.

    Gradients of what each rank has a copy of (``sink_logits``, ``alibi``, ``bias``, weights) are those of its own rows
    or heads: their sum over ranks is that of one process.

    Args:
        q: ``(B, H, rows, D)``, the queries of this rank.
        k, v: ``(B, Hkv, rows, D)`` and ``(B, Hkv, rows, Dv)``, the keys and values of this rank.
        tokens: the layout of the queries.
        key_tokens: the layout of keys and values, of the same mesh; that of the queries if None; ``WHOLE`` if each rank
            has all of them.
        scheme: one of the above, which is used without fallback; or ``"auto"``, the one that sends the fewest bytes in
            all. See `explain`.
        **options: the keywords of `qkv.attention`, apart from ``pages``. Dropout drops the same weights for any number
            of ranks: those of a ``draw``, or of one from the generator of the first rank.

    Returns:
        ``(B, H, rows, Dv)`` in the dtype of q.

    Raises:
        TypeError, ValueError, BackendError: as `qkv.attention`, and for layouts of other meshes, other rows than the
            layout gives to this rank, an unknown scheme and dropout. What follows from arguments that are equal on all
            ranks raises on all of them before anything is sent. With the environment variable ``QKV_CHECK=1``, ranks
            first compare the call, so that all raise if they differ.

    Example:
        >>> from qkv import Mask, parallel
        >>> from torch.distributed.device_mesh import init_device_mesh
        >>> mesh = init_device_mesh("cpu", (4,))  # doctest: +SKIP
        >>> mask = Mask.causal(window=512)
        >>> tokens = parallel.Tokens.best(65536, mesh, mask)  # doctest: +SKIP
        >>> out = parallel.attention(q, k, v, tokens, mask=mask)  # doctest: +SKIP

    Source: DeepSpeed-Ulysses for ``heads``; Llama 3, section 3.3.2, for ``gather``; the pass-Q variant of Yang et al.
    2024, "Context Parallelism for Scalable Million-Token Inference", for ``merge``. Matches one process, unlike torch's
    ``context_parallel``, which has masks none and causal, and pads to multiples of 2 P.
    """
    call, chosen = _prepared("parallel.attention", (q, k, v), tokens, key_tokens, scheme, False, options)
    return SCHEMES[chosen](call)[0]


@between_graphs
def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    *,
    key_tokens: Tokens | Whole | None = None,
    scheme: str = "auto",
    **options: Unpack[ShardedOptions],
) -> Partial:
    """`attention` and the log-sum-exp of each row, ``(B, H, rows)``, as `qkv.attention_with_lse`.

    Args:
        q, k, v, tokens, key_tokens, scheme, **options: as in `attention`.

    Raises:
        As `attention`.

    Example:
        >>> out, lse = parallel.attention_with_lse(q, k, v, tokens, mask=Mask.causal())  # doctest: +SKIP
    """
    call, chosen = _prepared("parallel.attention_with_lse", (q, k, v), tokens, key_tokens, scheme, True, options)
    out, lse = SCHEMES[chosen](call)
    assert lse is not None
    return Partial(out, lse)


class Explanation(NamedTuple):
    """What a call over ranks would send and compute, by scheme."""

    chosen: str
    sent: dict[str, tuple[int, ...]]
    """bytes that each rank sends to others in the forward pass; a scheme that cannot solve the call is missing"""
    scores: dict[str, tuple[int, ...]]
    """scores that each rank computes, those that positions show"""
    reasons: dict[str, str]
    """against each other scheme"""

    def __str__(self) -> str:
        lines = []
        for name in SCHEMES:
            if name not in self.sent:
                lines.append(f"{name:<6}  {self.reasons[name]}")
                continue
            verdict = "chosen" if name == self.chosen else self.reasons[name]
            sent, scores = self.sent[name], self.scores[name]
            lines.append(
                f"{name:<6}  {verdict}: sends {sum(sent):,} bytes, {max(sent):,} of them by one rank; "
                f"computes {sum(scores):,} scores, {max(scores):,} of them on one rank"
            )
        return "\n".join(lines)


@between_graphs
def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tokens: Tokens,
    *,
    key_tokens: Tokens | Whole | None = None,
    scheme: str = "auto",
    **options: Unpack[ShardedOptions],
) -> Explanation:
    """The scheme that `attention` would take for this call, what each would cost, and the reasons against the others.

    Nothing is sent. A backward pass of ``gather`` and ``heads`` sends as much as the forward pass.

    Args:
        q, k, v, tokens, key_tokens, scheme, **options: as in `attention`.

    Raises:
        As `attention`.

    Example:
        >>> print(parallel.explain(q, k, v, tokens, mask=Mask.causal(window=512)))  # doctest: +SKIP
    """
    call = _validated("parallel.explain", (q, k, v), tokens, key_tokens, scheme, False, options)
    sent, scores = bytes_sent(call), scores_computed(call)
    chosen = _chosen(scheme, sent)
    reasons = {}
    for name in SCHEMES:
        if name not in sent:
            reasons[name] = "not for keys that each rank has whole"
        elif name != chosen:
            sends_more = sum(sent[name]) > sum(sent[chosen])
            reasons[name] = "sends more" if sends_more else "comes later in the order"
            if scheme != "auto":
                reasons[name] = "not asked for"
    return Explanation(chosen, sent, scores, reasons)


@between_graphs
def merge(partial: Partial | tuple[Tensor, Tensor], group: DeviceMesh | Any) -> Partial:
    """`qkv.merge` over ranks: each has the result of the same queries over its own keys, and gets that over all keys.

    Partial results travel in fp32 or higher and are merged in the order of ranks, so all ranks get the same bits.

    Args:
        partial: ``(out, lse)`` of this rank, as `qkv.attention_with_lse` returns them. Sink logits must be passed on
            one rank only.
        group: a DeviceMesh of one dimension, or a process group; None for all processes.

    Returns:
        ``out`` in the dtype of this rank's, and the ``lse`` over all keys. Both are differentiable; gradients are
        those of the sum of all ranks' losses.

    Raises:
        TypeError: for anything but a pair of tensors, and a group of another type.
        ValueError: for other shapes than ``(B, H, Lq, Dv)`` and ``(B, H, Lq)``, and a mesh of more dimensions.

    Example:
        >>> partial = qkv.attention_with_lse(q, k_of_rank, v_of_rank)  # doctest: +SKIP
        >>> out, lse = parallel.merge(partial, mesh)  # doctest: +SKIP

    Source: Tree attention (Shyam et al. 2024), with one exchange in place of three sums, whose order is a library's.
    """
    if not isinstance(partial, (tuple, list)) or len(partial) != 2:
        raise TypeError(f"parallel.merge: partial must be a pair of tensors (out, lse); got {type(partial).__name__}.")
    out, lse = partial
    require_tensors("parallel.merge", out=out, lse=lse)
    if out.dim() != 4 or lse.shape != out.shape[:3]:
        raise ValueError(
            "parallel.merge: partial must be out (B, H, Lq, Dv) and lse (B, H, Lq); "
            f"got {tuple(out.shape)} and {tuple(lse.shape)}."
        )
    route = _route_of(group)
    wide = accumulation_dtype(out.dtype)
    plan = stacking(out.shape[1], out.shape[2], route.ranks)
    parts = exchange(plan, route, [out.to(wide), lse.to(wide)[..., None]]).kinds[0]
    merged = merge_stacked(torch.stack([part[0] for part in parts]), torch.stack([part[1][..., 0] for part in parts]))
    return Partial(merged.out.to(out.dtype), merged.lse)


def _route_of(group: Any) -> Route:
    if not (group is None or isinstance(group, (DeviceMesh, distributed.ProcessGroup))):
        raise TypeError(
            "parallel.merge: group must be a DeviceMesh, a process group, or None for all processes; "
            f"got {type(group).__name__}."
        )
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"parallel.merge: group must have one dimension; got a mesh of {group.ndim}. Take one of them by its "
                "name: mesh['cp']."
            )
        return Route(group.get_group(), group.get_local_rank(), group.size())
    return Route(group, distributed.get_rank(group), distributed.get_world_size(group))


@between_graphs
def attend(
    caller: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    tokens: Tokens,
    key_tokens: Tokens | Whole | None,
    options: ShardedOptions,
    *,
    rows: Callable[[int, int], Tensor] | None = None,
    carried: tuple[Tensor, ...] | None = None,
    solve: Solve | None = None,
) -> Tensor:
    """`attention` for a layer ``caller``, which error messages name.

    Args:
        caller, qkv, tokens, key_tokens, options: as in `attention`.
        rows: a further bias, of the query rows from one number up to another.
        carried: what is sent in place of keys and values, for ``solve``; k and v are their shapes then.
        solve: in place of `qkv.attention`.
    """

    def make() -> tuple[Call, str]:
        call = _validated(caller, qkv, tokens, key_tokens, "auto", False, options)
        call = call._replace(bias=_sum_of(call.bias, rows))
        if carried is not None and solve is not None:
            return call._replace(keys=carried, solve=solve), "gather"
        return call, _chosen("auto", bytes_sent(call))

    call, scheme = agreed(caller, tokens.route, make, _described)
    return SCHEMES[scheme](_drawn(call))[0]


def _sum_of(
    first: Callable[[int, int], Tensor] | None, second: Callable[[int, int], Tensor] | None
) -> Callable[[int, int], Tensor] | None:
    """The sum of two biases by rows."""
    if first is None or second is None:
        return second if first is None else first
    return lambda start, stop: first(start, stop) + second(start, stop)


def _prepared(
    caller: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    tokens: Tokens,
    key_tokens: Tokens | Whole | None,
    scheme: str,
    wants_lse: bool,
    options: ShardedOptions,
) -> tuple[Call, str]:
    """The call and its scheme, on which all ranks agree."""
    _require_tokens(caller, tokens)

    def make() -> tuple[Call, str]:
        call = _validated(caller, qkv, tokens, key_tokens, scheme, wants_lse, options)
        return call, _chosen(scheme, bytes_sent(call)) if scheme == "auto" else scheme

    call, chosen = agreed(caller, tokens.route, make, _described)
    return _drawn(call), chosen


def _drawn(call: Call) -> Call:
    """The call with one draw of dropout for all ranks."""
    if not call.scores.dropout:
        return call
    tokens, draw = call.tokens, call.scores.draw or Draw(new_seed())  # one of `Heads` is of another mesh
    assert draw.seed is not None
    seed = of_first_rank(draw.seed, tokens.route.group, tokens.mesh.device_type)
    return call._replace(scores=call.scores._replace(draw=draw._replace(seed=seed)))


def _chosen(scheme: str, sent: dict[str, tuple[int, ...]]) -> str:
    return min(sent, key=lambda name: sum(sent[name])) if scheme == "auto" else scheme


def _require_tokens(caller: str, tokens: object) -> None:
    if not isinstance(tokens, Tokens):
        raise TypeError(
            f"{caller}: tokens must be a qkv.parallel.Tokens; got {type(tokens).__name__}. "
            "Use Tokens.even(n, mesh), Tokens.zigzag(n, mesh) or Tokens.best(n, mesh, mask)."
        )


def _validated(
    caller: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    tokens: Tokens,
    key_tokens: Tokens | Whole | None,
    scheme: str,
    wants_lse: bool,
    options: ShardedOptions,
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
    layout, n_keys = _require_layouts(caller, qkv, tokens, key_tokens, scheme)
    q, k, v = _autocast(qkv)
    stand_ins = [_stand_in(x, n) for x, n in ((q, tokens.length), (k, n_keys), (v, n_keys))]
    given = {name: value for name, value in options.items() if name not in ("backend", "k_scale", "v_scale")}
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
    if torch._C._are_functorch_transforms_active():
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


def _described(made: tuple[Call, str]) -> dict[str, str]:
    """What all ranks must have in common."""
    call, scheme = made
    offset = call.offset
    mask = " & ".join([repr(call.mask), *(digest(tensor) for _, tensor in call.mask.tensors())])
    tensors = [(x.shape[0], x.shape[1], x.shape[3], x.dtype, x.requires_grad) for x in (call.q, *call.keys)]
    return {
        "scheme": scheme,
        "tokens": repr(call.tokens.runs),
        "key_tokens": repr(call.key_layout),
        "mask": mask,
        "offset": digest(offset) if isinstance(offset, Tensor) else str(offset),
        "q and keys": repr(tensors),
        "scores": repr([digest(x) if isinstance(x, Tensor) else x for x in call.scores._replace(draw=None)]),
        "draw": repr([digest(x) if isinstance(x, Tensor) else x for x in call.scores.draw or ()]),
        "bias": repr(call.bias is not None),
        "lse": repr(call.wants_lse),
    }
