"""`HeadShare`: the heads of an `Attention` that one rank computes, as `qkv.parallel.Heads` gives them out."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import stateless

from qkv.layers.head_norm import HeadNorm
from qkv.layers.instance_forward import InstanceForward
from qkv.layers.jagged import nested_like
from qkv.layers.projection import linear_projections, product
from qkv.parallel.agreement import agreed, digest
from qkv.parallel.exchange import Route
from qkv.parallel.sums import copied, of_first_rank, summed
from qkv.scores import Draw, ScoreOptions, new_seed

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from qkv.layers.attention import Attention

_CALLER = "Heads"
_OF_KEYS = ("k_proj", "v_proj")
_OF_HEADS = ("q_proj", *_OF_KEYS, "gate_proj")
"""Projections whose rows are those of heads."""


class HeadShare:
    """The query heads and KV heads of a rank, and what it does of a layer's call in which others have a part."""

    def __init__(self, mesh: "DeviceMesh", num_heads: int, num_kv_heads: int) -> None:
        ranks, rank = mesh.size(), mesh.get_local_rank()
        self.mesh = mesh
        self.num_heads = num_heads
        self.query_heads = slice(rank * num_heads // ranks, (rank + 1) * num_heads // ranks)
        self.has_shared_keys = ranks > num_kv_heads
        first = rank * num_kv_heads // ranks
        self.kv_heads = slice(first, first + max(1, num_kv_heads // ranks))

    def __deepcopy__(self, memo: object) -> "HeadShare":
        return self  # nothing changes it, and process groups have no copies

    @property
    def group(self) -> Any:
        return self.mesh.get_group()

    def enter(
        self, x: Tensor, context: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The inputs of a call, whose gradients are summed over ranks: once, however many projections read them."""
        if not torch.compiler.is_compiling():
            given = {"x": x, "context": context, "bias": bias}
            agreed(_CALLER, Route(self.group, self.mesh.get_local_rank(), self.mesh.size()), lambda: given, _described)
        return (
            self._enter(x),
            None if context is None else self._enter(context),
            None if bias is None else self._enter(bias),
        )

    def _enter(self, x: Tensor) -> Tensor:
        if isinstance(x, Tensor) and x.is_nested and x.layout is torch.jagged:
            return nested_like(x, copied(x.values(), self.group)[None])
        return copied(x, self.group) if isinstance(x, Tensor) else x

    def shared(self, parameter: Tensor) -> Tensor:
        """What all ranks read alike, such as a gain of all heads: its gradient is summed over ranks."""
        return copied(_local(parameter), self.group)

    def call(self, module: nn.Module, *args: Any) -> Any:
        """A module's call that serves all heads. It may be part of other layers too, so it is not changed itself."""
        shared = {name: self.shared(parameter) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, shared, args)

    def of_rank(self, scores: ScoreOptions) -> ScoreOptions:
        """The score options of all heads, for those of the rank."""
        alibi, bias, sinks = scores["alibi"], scores["bias"], scores["sink_logits"]
        draw = None
        if scores["dropout"]:
            seed = of_first_rank(new_seed(), self.group, self.mesh.device_type)
            draw = Draw(seed, first_head=self.query_heads.start)
        if bias is not None and bias.dim() > 2 and bias.shape[-3] == self.num_heads:
            bias = bias[..., self.query_heads, :, :]
        return {
            **scores,
            "alibi": None if alibi is None else alibi[self.query_heads],
            "bias": bias,
            "sink_logits": None if sinks is None else _local(sinks),
            "draw": draw,
        }

    def join(self, weights: Tensor) -> Tensor:
        """``(B, H, Lq, Lk)`` of all ranks from that of each."""
        from torch.distributed.tensor import DTensor, Shard

        return DTensor.from_local(weights, self.mesh, [Shard(1)], run_check=False).full_tensor()

    def to_rank(self, layer: nn.Module, state_dict: dict[str, Any], prefix: str) -> None:
        """Replaces tensors of the whole layer in a state dict by the rank's parts of them."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        for name, parameter in layer.named_parameters():
            given = state_dict.get(prefix + name)
            if not isinstance(given, Tensor) or isinstance(given, DTensor) or not isinstance(parameter, DTensor):
                continue
            if parameter.device_mesh == self.mesh and given.shape == parameter.shape:
                own = distribute_tensor(given, self.mesh, parameter.placements, src_data_rank=None)
                state_dict[prefix + name] = own

    @contextlib.contextmanager
    def whole(self, layer: nn.Module) -> Iterator[None]:
        """The layer with whole parameters, to be written as by one process; those of the mesh's first rank count."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        parts = {name: one for name, one in layer.named_parameters() if isinstance(one, DTensor)}
        whole: dict[str, Any] = {
            name: torch.empty(one.shape, dtype=one.dtype, device=one.to_local().device) for name, one in parts.items()
        }
        with stateless._reparametrize_module(layer, whole):
            yield
        with torch.no_grad():
            for name, part in parts.items():
                part.copy_(distribute_tensor(whole[name], part.device_mesh, part.placements))


def share_heads(layer: "Attention", mesh: "DeviceMesh", source: int | None) -> HeadShare:
    """Cuts a layer's parameters, in place, and returns the rank's share. Documented in `qkv.parallel.Heads`."""
    from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

    _require_divisible(layer, mesh)
    modules = {name: module for name, module in layer.named_children() if name != "position_bias"}
    parameters = {
        name: parameter
        for name, parameter in layer.named_parameters()
        if "." not in name or name.partition(".")[0] in modules
    }
    cut = [name for name, parameter in parameters.items() if isinstance(parameter, DTensor)]
    if cut:
        raise ValueError(
            f"{_CALLER}: the parameters of the {type(layer).__name__} must be whole; got DTensors for "
            f"{', '.join(cut)}. Leave its projections out of the plan, and apply FSDP after it."
        )
    projections = linear_projections(_CALLER, layer)
    norms = {name: module for name, module in modules.items() if "norm" in name}
    for name, norm in norms.items():
        if type(norm) is not HeadNorm or "forward" in norm.__dict__:
            raise TypeError(f"{_CALLER}: {name} must be that of the constructor; got another {type(norm).__name__}.")
    share = HeadShare(mesh, layer.num_heads, layer.num_kv_heads)

    def placement(name: str) -> Placement:
        module, _, part = name.rpartition(".")
        if module == "out_proj":
            return Shard(1) if part == "weight" else Replicate()
        if name == "sink_logits" or (module in _OF_HEADS and not (module in _OF_KEYS and share.has_shared_keys)):
            return Shard(0)
        return Replicate()

    for name, parameter in parameters.items():
        owner, _, part = name.rpartition(".")
        own = distribute_tensor(parameter.detach(), mesh, [placement(name)], src_data_rank=source)
        layer.get_submodule(owner).register_parameter(part, nn.Parameter(own, parameter.requires_grad))
    for name, linear in projections.items():
        width = layer.head_dim if name in ("q_proj", "k_proj") else layer.value_dim
        heads = share.kv_heads if share.has_shared_keys and name in _OF_KEYS else None
        rows = None if heads is None else slice(heads.start * width, heads.stop * width)
        forward = ColumnsOfRank(linear, share) if name == "out_proj" else RowsOfRank(linear, share, rows)
        linear.__dict__["forward"] = forward
    for norm in norms.values():
        norm.__dict__["forward"] = NormOfRanks(norm, share)
    return share


def _require_divisible(layer: "Attention", mesh: "DeviceMesh") -> None:
    """Raises ValueError unless each rank of the mesh gets whole heads, as many as any other."""
    if mesh.ndim != 1:
        raise ValueError(
            f"{_CALLER}: the mesh must have one dimension; got {mesh.ndim}. Pass one of them, such as mesh['tp']."
        )
    heads, kv_heads, ranks = layer.num_heads, layer.num_kv_heads, mesh.size()
    if heads % ranks or (kv_heads % ranks and ranks % kv_heads):
        raise ValueError(
            f"{_CALLER}: ranks must divide the query heads, and divide the KV heads or be a multiple of them; got "
            f"{ranks} ranks for {heads} query heads on {kv_heads} KV heads. Take another number of ranks."
        )


class _OfRank(InstanceForward):
    """A forward with the rank's part of the module's parameters."""

    def __init__(self, module: nn.Module, share: HeadShare) -> None:
        super().__init__(module)
        self.share = share

    def in_program(self, x: Tensor) -> Any:
        return self.call(x)


class RowsOfRank(_OfRank):
    """A projection to the rank's heads."""

    def __init__(self, module: nn.Module, share: HeadShare, rows: slice | None) -> None:
        super().__init__(module, share)
        self.rows = rows
        """those of shared KV heads, whose weights are whole on each rank"""

    def call(self, x: Tensor) -> Tensor:
        linear: Any = self.module
        weight, bias = (None if one is None else self._own(one) for one in (linear.weight, linear.bias))
        assert weight is not None
        return product(x, weight, bias)

    def _own(self, parameter: Tensor) -> Tensor:
        return _local(parameter) if self.rows is None else self.share.shared(parameter)[self.rows]


class ColumnsOfRank(_OfRank):
    """The output projection of the rank's heads, summed over ranks; the bias is added once."""

    def call(self, x: Tensor) -> Tensor:
        linear: Any = self.module
        out = summed(product(x, _local(linear.weight), None), self.share.group)
        return out if linear.bias is None else out + _local(linear.bias).to(out.dtype)


class NormOfRanks(_OfRank):
    """A norm of each head, whose gains are those of all ranks."""

    def call(self, x: Tensor) -> Tensor:
        norm: Any = self.module
        normalised: Tensor = norm.normalise(x, self.share.shared(norm.weight))
        return normalised


def _described(given: dict[str, Any]) -> dict[str, str]:
    """What all ranks must pass alike."""
    values = {name: x.values() if isinstance(x, Tensor) and x.is_nested else x for name, x in given.items()}
    return {name: digest(x) if isinstance(x, Tensor) else repr(x) for name, x in values.items()}


def _local(parameter: Any) -> Tensor:
    """The rank's part of a parameter. Raises RuntimeError for one that is sharded in a further way, as by FSDP."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return parameter  # type: ignore[no-any-return]
    if len(parameter.placements) != 1:
        raise RuntimeError(
            f"{_CALLER}: parameters must be gathered by FSDP before a layer reads them; got {parameter.placements} "
            "on a mesh of several dimensions. Call the module that fully_shard was applied to, and not its parts."
        )
    return parameter.to_local()
