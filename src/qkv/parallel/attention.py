"""`attention` and `attention_with_lse` over ranks, and `attend` for layers."""

from collections.abc import Callable

from torch import Tensor
from typing_extensions import Unpack

from qkv.parallel.calls import CallOptions, ShardedOptions, prepared
from qkv.parallel.compiling import between_graphs
from qkv.parallel.schemes import SCHEMES, Call, Solve
from qkv.parallel.tokens import Tokens, Whole
from qkv.partial import Partial


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
            ranks raises on all of them before anything is sent. Where ranks differ, those that receive rows of another
            call raise; others wait for a rank that has raised until it exits, or until the timeout of the process
            group. With the environment variable ``QKV_CHECK=1``, ranks first compare the call, numbers in masks
            included, so that all raise, and say in what they differ.

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
    given: CallOptions = {**options, "key_tokens": key_tokens, "scheme": scheme}
    call, chosen = prepared("parallel.attention", (q, k, v), tokens, given)
    return SCHEMES[chosen](call)[0]


@between_graphs
def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, **options: Unpack[CallOptions]) -> Partial:
    """`attention` and the log-sum-exp of each row, ``(B, H, rows)``, as `qkv.attention_with_lse`.

    Args:
        q, k, v, tokens, **options: as in `attention`.

    Raises:
        As `attention`.

    Example:
        >>> out, lse = parallel.attention_with_lse(q, k, v, tokens, mask=Mask.causal())  # doctest: +SKIP
    """
    call, chosen = prepared("parallel.attention_with_lse", (q, k, v), tokens, options, wants_lse=True)
    out, lse = SCHEMES[chosen](call)
    assert lse is not None
    return Partial(out, lse)


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

    def complete(call: Call) -> Call:
        call = call._replace(bias=_sum_of(call.bias, rows))
        return call if carried is None or solve is None else call._replace(keys=carried, solve=solve)

    scheme = "auto" if carried is None else "gather"
    given: CallOptions = {**options, "key_tokens": key_tokens, "scheme": scheme}
    call, chosen = prepared(caller, qkv, tokens, given, complete=complete)
    return SCHEMES[chosen](call)[0]


def _sum_of(
    first: Callable[[int, int], Tensor] | None, second: Callable[[int, int], Tensor] | None
) -> Callable[[int, int], Tensor] | None:
    """The sum of two biases by rows."""
    if first is None or second is None:
        return second if first is None else first
    return lambda start, stop: first(start, stop) + second(start, stop)
