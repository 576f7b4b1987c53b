"""`Heads`: the heads of an attention layer over ranks, as a style of torch's `parallelize_module`."""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle


class Heads(ParallelStyle):
    """Gives each rank whole heads of a `qkv.Attention`: a style for ``torch.distributed.tensor.parallel``.

    With P ranks, a rank has ``H / P`` query heads and the KV heads that these read: ``Hkv / P``, or one if P exceeds
    Hkv, which ``P / Hkv`` ranks then share. It has their rows of q_proj, k_proj, v_proj and gate_proj, their columns of
    out_proj, their sink logits, ALiBi slopes and biases, and caches of their keys. All ranks pass the same inputs and
    get the same output, that of the whole layer: outputs are summed over ranks, and so are the gradients of what all of
    them read, which are x, the context, a bias, gains of norms, a position bias and shared KV heads. After a backward
    pass, each gradient is therefore whole, and nothing is left to sum over the mesh. Dropout draws what one process
    would.

    Parameters become DTensors of the whole layer's shapes: optimisers, ``clip_grad_norm_`` and
    ``torch.distributed.checkpoint`` see those, and a checkpoint of P ranks loads on any other number. Weights of shared
    KV heads are whole on each rank. The weights of the mesh's first rank count, as with torch's styles;
    ``load_state_dict`` also takes the whole layer's tensors, and ``reset_parameters`` draws as one process does.
    Combine it with FSDP and DDP by a mesh of two dimensions, this style first.

    Raises:
        TypeError: for a module that is not a `qkv.Attention`, and projections or norms that are wrapped or replaced.
        ValueError: for a mesh of several dimensions; for heads that P does not divide, and KV heads of which neither
            their number nor P is a multiple of the other; for a layer whose parameters are DTensors already.

    Example:
        >>> import torch, qkv
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> def split(model, mesh):  # on each rank
        ...     return parallelize_module(model, mesh["tp"], {"blocks.*.attention": qkv.parallel.Heads()})

    Source: Megatron-LM (Shoeybi et al. 2019), section 3. torch's ``ColwiseParallel`` and ``RowwiseParallel`` of the
    projections cut anywhere, and leave each rank its own part of the gradients of q_norm and k_norm.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        share = getattr(module, "_share_heads", None)
        if share is None:
            raise TypeError(
                "Heads: the module must be a qkv.Attention, whose heads are computed one by one; got "
                f"{type(module).__name__}. {_REMEDIES.get(type(module).__name__, _REMEDY)}"
            )
        share(device_mesh, self.src_data_rank)
        return module

    def __repr__(self) -> str:
        return "Heads()"


_REMEDY = "Name the attention layers of a model in the plan, such as {'blocks.*.attention': Heads()}."
_REMEDIES = {
    "LatentAttention": "All its heads read one latent, which each rank would have to keep: leave it whole.",
    "MultiheadAttention": "Convert it by qkv.Attention.from_torch.",
}
"""What to do instead, by the class."""
