"""`latent`: makes transformers' models with latent attention decode from latents, without expanding them."""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from qkv import kernels
from qkv.cache.buffer import wants_grad
from qkv.integrations.transformers.attention import NAME, register
from qkv.integrations.transformers.lazy_tensor import LatentTensor
from qkv.layers.instance_method import InstanceMethod
from qkv.layers.latent_heads import LatentHeads, beside
from qkv.layers.projection import plain_weight

Model = TypeVar("Model", bound=nn.Module)

_METHOD = "expand_kv"
"""The method of transformers' modules that computes keys and values of all heads from all cached latents."""


def latent(model: Model, *, enabled: bool = True) -> Model:
    """Makes the attention of DeepSeek-V2, V3 and models like them read latents as they are cached.

    transformers caches latents and expands all of them to keys and values of all heads at every step. With ``latent``,
    attention is that of `LatentAttention`: absorbed for a few queries of a long text, expanded otherwise, whichever
    takes fewer multiplications. Results are the same up to rounding. With `QKVCache`, latents and rotary keys are in
    one memory, and are read from there; another cache is copied at each step.

    transformers' own expansion is kept in training, with a quantised, hooked or adapted ``kv_b_proj``, under compilers
    and tracers, and with other attention implementations.

    Args:
        model: a model of transformers, or a module that contains some. Modified in place, and set to
            ``attn_implementation="qkv"``. Copies and pickles keep the change; parameters and state dict are the same.
        enabled: False undoes an earlier ``latent(model)``, except for the attention implementation.

    Returns:
        the model.

    Raises:
        ModuleNotFoundError: if transformers is not installed.
        TypeError: for a model that is not an ``nn.Module``.
        ValueError: if no module of the model expands latents as DeepSeek's do.

    Example:
        >>> from transformers import DeepseekV3Config, DeepseekV3ForCausalLM
        >>> from qkv.integrations.transformers import QKVCache, latent
        >>> model = latent(DeepseekV3ForCausalLM(DeepseekV3Config()))  # doctest: +SKIP
        >>> model.generate(ids, past_key_values=QKVCache(model.config))  # doctest: +SKIP

    Source: DeepSeek-V2, section 2.1.2, on absorption, and appendix C.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"latent: model must be an nn.Module; got {type(model).__name__}.")
    from transformers import PreTrainedModel

    register()
    modules = [module for module in model.modules() if hasattr(type(module), _METHOD)]
    known = [module for module in modules if enabled and _expands_as_ours(module)]
    if enabled and not known:
        names = ", ".join(sorted({type(module).__name__ for module in modules})) or "none that expands latents"
        raise ValueError(
            "latent: model must have attention modules that expand latents as those of DeepSeek-V3 in transformers do; "
            f"got a {type(model).__name__} with {names}."
        )
    for part in model.modules():
        if enabled and isinstance(part, PreTrainedModel) and part.config._attn_implementation != NAME:
            part.set_attn_implementation(NAME)
    for module in modules:
        module.__dict__.pop(_METHOD, None)
    for module in known:
        read_latents(module)
    return model


def read_latents(module: nn.Module) -> bool:
    """Puts off the expansion of latents of one module; whether that is a change, which `expand_latents` takes back."""
    if _METHOD in module.__dict__ or not hasattr(type(module), _METHOD) or not _expands_as_ours(module):
        return False
    module.__dict__[_METHOD] = _Expansion(module)
    return True


def expand_latents(module: nn.Module) -> None:
    """Lets a module expand its latents as transformers does."""
    module.__dict__.pop(_METHOD, None)


def reads_latents(module: nn.Module) -> bool:
    """Whether the expansion of a module is put off."""
    return _METHOD in module.__dict__


def _heads(module: Any) -> LatentHeads:
    return LatentHeads(module.kv_b_proj, module.kv_lora_rank, module.qk_nope_head_dim, module.v_head_dim)


class _Expansion(InstanceMethod):
    """``expand_kv`` of a module, put off until the attention function knows the number of queries."""

    def __call__(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        module: Any = self.module
        weight = None if kernels.is_tracing() else plain_weight(module.kv_b_proj)
        if weight is None or module.config._attn_implementation != NAME or wants_grad(kv_nope, k_rot, weight):
            expanded: tuple[Tensor, Tensor] = getattr(type(module), _METHOD)(module, kv_nope, k_rot)
            return expanded
        latents, heads = beside(kv_nope, k_rot), _heads(module)
        return LatentTensor(latents, heads, 0), LatentTensor(latents, heads, 1)


@torch.no_grad()
def _expands_as_ours(module: Any) -> bool:
    """Whether keys and values of a module are those of `LatentHeads`, in the same order, for one token."""
    weight = plain_weight(module.kv_b_proj)
    if weight is None or weight.is_meta:
        return False
    heads = _heads(module)
    numbers = torch.linspace(-1, 2, heads.rank + module.qk_rope_head_dim, dtype=weight.dtype, device=weight.device)
    kv_nope, k_rot = numbers[None, None, None].split([heads.rank, module.qk_rope_head_dim], dim=3)
    theirs = getattr(type(module), _METHOD)(module, kv_nope, k_rot)
    ours = heads.expand(torch.cat([kv_nope, k_rot], dim=3))
    error = torch.finfo(weight.dtype).eps * heads.rank * 2 * weight.abs().max().item()  # numbers are up to 2
    return all(
        one.shape == other.shape and torch.allclose(one, other, rtol=0, atol=error)
        for one, other in zip(theirs, ours, strict=True)
    )
