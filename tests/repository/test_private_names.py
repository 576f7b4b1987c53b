"""Every private name of torch and transformers that the library reads is listed, with what happens where it is gone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "qkv"

_PRIVATE = re.compile(r"_[a-zA-Z]\w*")
_PYTHONS = {"_asdict", "_fields", "_getframe", "_make", "_replace"}
"""Documented by Python."""
_ENDINGS = {"_bias", "_proj_weight", "_size", "_weight"}
"""Strings that are ends of names of ours."""

IMPORT = "`import qkv` or the first call of a layer fails: no release in the range is without it"
TORCH = {
    **dict.fromkeys(["_C", "_functorch", "_nn"], "as the names in it"),
    # What a call must know before it goes past the dispatcher. There is no other way to ask, and no safe answer but
    # torch's own kernels for all calls.
    **dict.fromkeys(
        [
            *("_are_functorch_transforms_active", "_current_level", "_get_tracing_state", "_len_torch_dispatch_stack"),
            *("_len_torch_function_stack", "_current_graph_task_id", "_is_zerotensor"),
        ],
        IMPORT,
    ),
    # Where a module keeps its parts; documented attributes are slower, and may be properties of a subclass.
    **dict.fromkeys(["_buffers", "_modules", "_parameters", "_call_impl", "_compiled_call_impl"], IMPORT),
    **dict.fromkeys(
        ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"],
        "layers fail; in `unpadding`, a module without one counts as hooked and runs padded",
    ),
    **dict.fromkeys(
        ["_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"],
        "`price` of fewer KV heads fails",
    ),
    "_torchdynamo_orig_callable": "a model with a compiled forward is recorded without that part",
    "_has_any_global_hook": "counts as hooked: every module is called",
    "_make_wrapper_subclass": "no lazy tensors: masks and int8 caches in transformers fail",
    "_pytree": "importing the integration with transformers fails",
    "_version": "a CrossKVCache fails",
    "_assert_async": "compiled programs with a CrossKVCache fail",
    "_dynamo": "compiled programs that read a cache, and `flex` under a compiler, fail",
    "_i_will_not_complain_if_bc_breaks_InstructionTranslator": "compiled programs that read a cache fail",
    "_reparametrize_module": "compiled programs that compute parameters fail",
    **dict.fromkeys(
        [
            "_scaled_dot_product_flash_attention_for_cpu",
            "_scaled_dot_product_flash_attention_for_cpu_backward",
        ],
        "`sdpa` fails where an lse is asked for on a CPU; the kernel does not need it",
    ),
    **dict.fromkeys(["_fused_sdp_choice", "_native_multi_head_attention"], "`accelerate` of torch's attention fails"),
    **dict.fromkeys(
        ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"],
        "names of layers in `Caches` contain the name of the wrapper",
    ),
}
TRANSFORMERS = {
    "_attn_implementation": "the integration fails; there is no documented way to read it",
    "_attn_implementation_internal": "a changed copy of a configuration keeps its attention implementation",
    "_can_set_attn_implementation": "every model counts as one that can",
    "_supports_default_dynamic_cache": "every model counts as one that does",
    "_prepare_cache_for_generation": "`cache_implementation` is not heeded; the configuration alone decides",
    "_active_collector": "counts as capturing: layers with its hooks run padded, and in parts",
    "_global_mapping": "`register` and `unregister` fail",
    "_norm": "the norm is not taken",
}


def test_all_private_names_are_listed() -> None:
    assert read_in_source() == {*TORCH, *TRANSFORMERS}


def test_names_of_torch_are_there() -> None:
    """Those that have no fallback: this fails first on a release without one."""
    import torch
    from torch import nn
    from torch.autograd import forward_ad

    owners = [torch, torch._C, torch._C._functorch, torch.ops.aten, torch.Tensor, nn.Linear(1, 1), forward_ad]
    gone = [name for name, what in TORCH.items() if what == IMPORT and not any(hasattr(one, name) for one in owners)]
    assert not gone


def read_in_source() -> set[str]:
    """Private names in the source that the source does not define itself."""
    trees = [ast.parse(path.read_text()) for path in sorted(SOURCE.rglob("*.py"))]
    own = {name for tree in trees for name in defined(tree)} | _PYTHONS | _ENDINGS
    found = {name for tree in trees for name in read(tree)}
    return {name for name in found - own if not name.startswith("_qkv_")}


def defined(tree: ast.Module) -> Iterator[str]:
    """Attributes and methods of the classes in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield part.name
                targets = part.targets if isinstance(part, ast.Assign) else [getattr(part, "target", None)]
                yield from (target.id for target in targets if isinstance(target, ast.Name))


def read(tree: ast.Module) -> Iterator[str]:
    """Private names that a file reads: attributes, imports from torch and transformers, and strings."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif (
            isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in ("torch", "transformers")
        ):
            names = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [] if node.value[1:2].isupper() else [node.value]  # a class of ours, in an annotation
        yield from (name for name in names if _PRIVATE.fullmatch(name))
