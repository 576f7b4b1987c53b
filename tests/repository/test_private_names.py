"""Every private name of torch and transformers that the library reads is listed, with what happens where it is gone."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from qkv import torch_internals

SOURCE = Path(__file__).parents[2] / "src" / "qkv"

_PRIVATE = re.compile(r"_[a-zA-Z]\w*")
_PYTHONS = {"_asdict", "_fields", "_getframe", "_make", "_replace"}
"""Documented by Python."""
_ENDINGS = {"_bias", "_proj_weight", "_size", "_weight"}
"""Strings that are ends of names of ours."""

IMPORT = "`import qkv` or the first call of a layer fails: no release in the range is without it"
QUESTIONS = {
    **dict.fromkeys(
        ["_are_functorch_transforms_active", "_functorch"],
        "a transform counts as active: the kernel is called as an operator, caches concatenate",
    ),
    **dict.fromkeys(
        ["_len_torch_dispatch_stack", "_len_torch_function_stack"], "a mode counts as active: layers run in parts"
    ),
    "_current_level": "derivatives count as computed in forward mode, which backend='native' refuses",
    "_get_tracing_state": "nothing counts as traced",
    "_current_graph_task_id": "gradient checkpoints around a layer with a cache are not refused",
    "_is_zerotensor": "`accelerate` leaves calls to torch",
    "_fused_sdp_choice": "`accelerate` returns contiguous outputs",
    "_has_any_global_hook": "counts as hooked: every module is called",
}
"""Read in qkv.torch_internals alone, which has an answer where a release lacks one."""
TORCH = {
    **QUESTIONS,
    **dict.fromkeys(["_C", "_nn"], "as the names in it"),
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
    "_native_multi_head_attention": "`accelerate` of torch's attention fails",
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


def test_questions_to_torch_are_asked_in_one_module() -> None:
    readers = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if {*read(ast.parse(path.read_text()))} & QUESTIONS.keys()
    }
    assert readers == {"torch_internals.py"}


CAUTION: dict[str, tuple[str, str, Any]] = {
    "_are_functorch_transforms_active": ("torch._C", "transforms_are_active()", True),
    "_functorch": ("torch._C", "is_batched(torch.zeros(1))", True),
    "_len_torch_dispatch_stack": ("torch._C", "dispatch_modes()", 1),
    "_len_torch_function_stack": ("torch._C", "function_modes()", 1),
    "_current_level": ("torch.autograd.forward_ad", "forward_mode_is_active()", True),
    "_get_tracing_state": ("torch._C", "tracing_state()", None),
    "_current_graph_task_id": ("torch._C", "graph_task()", -1),
    "_is_zerotensor": ("torch", "is_zero_tensor(torch.zeros(1))", True),
    "_fused_sdp_choice": ("torch", "choice_of_kernel()", 0),
    "_has_any_global_hook": ("torch.nn.modules.module", "has_global_hooks()", True),
}
"""Where each of `QUESTIONS` is, what asks it, and the answer without it."""


def test_each_question_has_an_answer_of_caution() -> None:
    assert CAUTION.keys() == QUESTIONS.keys()


@pytest.mark.parametrize("name", CAUTION)
def test_a_question_that_torch_does_not_answer(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, question, answer = CAUTION[name]
    path = SOURCE / "torch_internals.py"
    monkeypatch.delattr(importlib.import_module(owner), name)
    names: dict[str, Any] = {}
    exec(compile(path.read_text(), str(path), "exec"), names)
    assert eval(question, names) == answer


def test_questions_that_torch_answers() -> None:
    assert not torch_internals.transforms_are_active()
    assert not torch_internals.forward_mode_is_active()
    assert torch_internals.dispatch_modes() == torch_internals.function_modes() == 0
    assert torch_internals.graph_task() == -1
    assert not torch_internals.is_zero_tensor(torch.zeros(1))
    assert torch_internals.is_zero_tensor(torch._efficientzerotensor((1,)))
    found = []

    def see(x: torch.Tensor) -> torch.Tensor:
        found.append((torch_internals.transforms_are_active(), torch_internals.is_batched(x)))
        return x

    torch.vmap(see)(torch.zeros(2))
    torch.func.grad(lambda x: see(x).sum())(torch.zeros(2))
    assert found == [(True, True), (True, False)]


def test_names_of_torch_are_there() -> None:
    """Those that have no fallback: this fails first on a release without one."""
    owners = [torch, torch._C, torch.ops.aten, torch.Tensor, torch.nn.Linear(1, 1)]
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
