"""Norms and gated MLPs of models: which are taken, that they compute the same, and that what is changed is called."""

import ast
import copy
import functools
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from budget import assert_within_budget
from integrations.transformers.one_line import generated, model
from layers.test_projection import CHANGES, NAMES, Counted, Recorded, double
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import parametrize
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nRMSNorm
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedMLP
from transformers.models.lfm2.modeling_lfm2 import Lfm2MLP
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm
from transformers.models.moshi.modeling_moshi import MoshiRMSNorm
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.phi3.modeling_phi3 import Phi3MLP
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import Qwen2MLP
from transformers.models.t5.modeling_t5 import T5LayerNorm

import qkv
from qkv import kernels
from qkv.layers import gated_forward, normed_forward
from qkv.layers.known_code import is_copy_of

pytestmark = pytest.mark.skipif(
    kernels.absence() is not None or kernels.loaded().fast_gated_mlp is None,
    reason=kernels.absence() or "this torch has no DLPack exchange functions",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTH, FEATURES = 32, 48
X = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(0))

NORMS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: LlamaRMSNorm(WIDTH),
    "t5": lambda: T5LayerNorm(WIDTH),
    "olmo2": lambda: Olmo2RMSNorm(WIDTH),
    "nemotron": lambda: NemotronHRMSNorm(WIDTH),
    "gemma": lambda: GemmaRMSNorm(WIDTH),
    "gemma3n": lambda: Gemma3nRMSNorm(WIDTH),
    "gemma3n without gains": lambda: Gemma3nRMSNorm(WIDTH, with_scale=False),
    "moshi": lambda: MoshiRMSNorm(WIDTH),
    "llama4": lambda: Llama4TextRMSNorm(WIDTH),
    "torch": lambda: nn.RMSNorm(WIDTH, eps=1e-6),
}


def llama_mlp(activation: str = "silu", bias: bool = False) -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": FEATURES}
    return LlamaMLP(transformers.LlamaConfig(**sizes, hidden_act=activation, mlp_bias=bias))


def of_phi3() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "intermediate_size": FEATURES}
    return Phi3MLP(transformers.Phi3Config(**sizes))


def of_granite() -> nn.Module:
    sizes = {"hidden_size": WIDTH, "shared_intermediate_size": FEATURES}
    return GraniteMoeSharedMLP(transformers.GraniteMoeSharedConfig(**sizes))


def of_lfm2() -> nn.Module:
    return Lfm2MLP(
        transformers.Lfm2Config(hidden_size=WIDTH, intermediate_size=FEATURES, block_auto_adjust_ff_dim=False)
    )


def of_qwen() -> nn.Module:
    sizes = SimpleNamespace(hidden_size=WIDTH, intermediate_size=FEATURES, hidden_act="silu")
    return Qwen2MLP(sizes)


MLPS: dict[str, Callable[[], nn.Module]] = {
    **{name: functools.partial(llama_mlp, name) for name in ("silu", "swish", "gelu", "gelu_pytorch_tanh", "relu")},
    "with biases": lambda: llama_mlp(bias=True),
    "phi3": of_phi3,
    "granite": of_granite,
    "lfm2": of_lfm2,
    "qwen": of_qwen,
}


@pytest.fixture(autouse=True)
def computed(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What the kernel computes, of MLPs and norms of whatever size."""
    torch.manual_seed(0)
    torch.compiler.reset()
    results: list[Tensor] = []

    def noted(call: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
        def compute(*arguments: Any) -> Tensor | None:
            out = call(*arguments)
            results.extend([] if out is None else [out])
            return out

        return compute

    monkeypatch.setattr(kernels, "gains_from_rows", lambda x: kernels.has_few_rows(x) and x.numel() <= 16 * x.shape[-1])
    monkeypatch.setattr(kernels, "gains_from_few_rows", lambda x, weight: x.numel() <= 16 * x.shape[-1])
    monkeypatch.setattr(kernels, "fast_gated_mlp", noted(kernels.fast_gated_mlp))
    monkeypatch.setattr(kernels, "fast_rms_norm", noted(kernels.fast_rms_norm))
    return results


def made(make: Callable[[], nn.Module], dtype: torch.dtype = torch.float32) -> nn.Module:
    found = make()
    for parameter in found.parameters():
        nn.init.normal_(parameter, std=0.3)
    return found.to(dtype).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NORMS)
@torch.no_grad()
def test_norms_are_taken_with_their_bits(name: str, dtype: torch.dtype, computed: list[Tensor]) -> None:
    """Where squares add up exactly; of other numbers, up to the order of their sum."""
    theirs = made(NORMS[name], dtype)
    ours = qkv.accelerate(copy.deepcopy(theirs))
    x = torch.randint(-8, 9, (2, 5, WIDTH)).to(dtype)
    assert torch.equal(ours(x), theirs(x)) and len(computed) == 1
    x = torch.randn(2, 5, WIDTH).to(dtype)
    assert_within_budget(ours(x), copy.deepcopy(theirs).double()(x.double()), theirs(x), name, 1e-6)
    assert len(computed) == 2
    qkv.accelerate(ours, enabled=False)
    assert torch.equal(ours(x), theirs(x)) and len(computed) == 2 and vars(ours).keys() == vars(theirs).keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MLPS)
@torch.no_grad()
def test_mlps_are_taken(name: str, dtype: torch.dtype, computed: list[Tensor]) -> None:
    theirs = made(MLPS[name], dtype)
    ours = qkv.accelerate(copy.deepcopy(theirs))
    for count, shape in enumerate([(1, 1, WIDTH), (2, 8, WIDTH), (5, WIDTH), (WIDTH,)], start=1):
        x = torch.randn(shape).to(dtype)
        got = ours(x)
        assert len(computed) == count and got.shape == x.shape
        # Torch's products in 16 bits round as they like.
        assert_within_budget(got, copy.deepcopy(theirs).double()(x.double()), theirs(x), name, 1e-6)
    many = torch.randn(3, 6, WIDTH).to(dtype)
    torch.testing.assert_close(ours(many), theirs(many))
    assert len(computed) == count
    qkv.accelerate(ours, enabled=False)
    assert torch.equal(ours(x), theirs(x)) and len(computed) == count
    assert all("forward" not in vars(module) for module in ours.modules())


@torch.no_grad()
def test_models_generate_the_same_and_report_it(computed: list[Tensor]) -> None:
    for kind, norms in (("llama", 5), ("gemma3_text", 13), ("qwen3", 9)):
        theirs = model(kind)
        want = generated(theirs).sequences
        ours = qkv.accelerate(theirs)
        assert torch.equal(generated(ours).sequences, want) and computed
        text = str(qkv.report(ours))
        assert f"{norms} norms" in text and "2 MLPs" in text and "one call of the kernel" in text
        computed.clear()
    ours.model.layers[0].mlp.down_proj.register_forward_hook(double)
    text = str(qkv.report(ours))
    assert "1 MLP " in text and "called as they are: down_proj is watched, or is not an nn.Linear alone" in text
    qkv.accelerate(ours, enabled=False)
    ours.model.layers[1].mlp.forward = ours.model.layers[0].mlp.forward
    text = str(qkv.report(ours))
    assert "called as they are: with another forward" in text and "not: qkv.accelerate(model) takes them" in text


@torch.no_grad()
def test_copies_and_pickles_stay_accelerated(computed: list[Tensor]) -> None:
    for make in (NORMS["llama"], MLPS["silu"]):
        ours = qkv.accelerate(made(make))
        want = ours(X)
        for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            nn.init.zeros_(next(ours.parameters()))
            before = len(computed)
            assert torch.equal(other(X), want) and len(computed) == before + 1
            other_state = other.state_dict()
            ours.load_state_dict(other_state)


# Ways to change an MLP, beside those to change a linear layer.
MLP_CHANGES: dict[str, Callable[[Any], Any]] = {
    "another activation": lambda mlp: setattr(mlp, "act_fn", nn.Tanh()),
    "a function as activation": lambda mlp: (delattr(mlp, "act_fn"), setattr(mlp, "act_fn", torch.tanh)),
    "a hook of the activation": lambda mlp: mlp.act_fn.register_forward_hook(double),
    "a forward of the activation": lambda mlp: setattr(mlp.act_fn, "forward", torch.tanh),
    "a subclass of the activation": lambda mlp: setattr(
        mlp, "act_fn", type("Mine", (nn.SiLU,), {"forward": lambda self, x: torch.tanh(x)})()
    ),
    "a function as projection": lambda mlp: mlp.__dict__.update(
        gate_proj=lambda x: 2 * F.linear(x, mlp.up_proj.weight)
    ),
    "a forward of its own": lambda mlp: setattr(mlp, "forward", lambda x: 2 * mlp.down_proj(mlp.up_proj(x))),
    "another class": lambda mlp: setattr(
        mlp, "__class__", type("Mine", (LlamaMLP,), {"forward": lambda self, x: 2 * LlamaMLP.forward(self, x)})
    ),
    "a hook of its own": lambda mlp: mlp.register_forward_hook(double),
    "a pre-hook of its own": lambda mlp: mlp.register_forward_pre_hook(lambda _, args: (2 * args[0],)),
}


def of_projections(change: Callable[[Any], None], name: str) -> Callable[[Any], Any]:
    """A change of linear layers, of one projection of an MLP."""

    def apply(mlp: Any) -> None:
        others = {other: nn.Linear(WIDTH, WIDTH) for other in NAMES[1:]}
        holder = nn.ModuleDict({"q_proj": getattr(mlp, name), **others})
        change(holder)  # type: ignore[arg-type]
        setattr(mlp, name, holder["q_proj"])

    return apply


# Lora and some others make square layers.
LINEAR_CHANGES = {
    f"{name}: {change}": of_projections(CHANGES[change], name)
    for index, change in enumerate(CHANGES)
    for name in [("gate_proj", "up_proj", "down_proj")[index % 3]]
}
ALL_CHANGES = {**MLP_CHANGES, **LINEAR_CHANGES}


def square_mlp() -> nn.Module:
    return LlamaMLP(transformers.LlamaConfig(hidden_size=WIDTH, intermediate_size=WIDTH, mlp_bias=True))


@pytest.mark.parametrize("name", ALL_CHANGES)
@pytest.mark.filterwarnings("ignore")  # torch's own, of quantisation
@torch.no_grad()
def test_what_is_changed_of_an_mlp_is_called(name: str, computed: list[Tensor]) -> None:
    """Whether it was changed before or after."""

    def changed(*steps: Callable[[Any], Any]) -> Tensor:
        torch.manual_seed(0)
        mlp = made(square_mlp)
        for step in steps:
            torch.manual_seed(1)
            step(mlp)
        return mlp(X)  # type: ignore[no-any-return]

    plain, want = changed(), changed(ALL_CHANGES[name])
    assert not torch.allclose(plain, want) and not computed
    for steps in ((qkv.accelerate, ALL_CHANGES[name]), (ALL_CHANGES[name], qkv.accelerate)):
        torch.testing.assert_close(changed(*steps), want)
    is_plain = name in ("a hook of its own", "a pre-hook of its own") or name.endswith("no bias any more")
    assert len(computed) == 2 * is_plain


def of_gain(norm: Any) -> None:
    value = 2 * norm.weight.detach()
    del norm.weight
    norm.weight = value


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


NORM_CHANGES: dict[str, Callable[[Any], Any]] = {
    "a parametrization": lambda norm: parametrize.register_parametrization(norm, "weight", Doubled()),
    "plain attributes": of_gain,
    "an attribute before the parameter": lambda norm: norm.__dict__.update(weight=2 * norm.weight),
    "gains of a class of their own": lambda norm: setattr(norm, "weight", nn.Parameter(norm.weight.as_subclass(Twice))),
    "no number for eps": lambda norm: setattr(norm, "eps", torch.tensor(1.0)),
    "a norm of its own": lambda norm: norm.__dict__.update(_norm=lambda x: 2 * x),
    "a forward of its own": lambda norm: setattr(norm, "forward", lambda x: 2 * x),
    "another class": lambda norm: setattr(norm, "__class__", type("Mine", (GemmaRMSNorm,), {"_norm": double})),
    "a hook": lambda norm: norm.register_forward_hook(double),
    "a pre-hook": lambda norm: norm.register_forward_pre_hook(lambda _, args: (args[0] ** 3,)),
    "another eps": lambda norm: setattr(norm, "eps", 10.0),
}


class Twice(Tensor):
    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[misc]
        return 2 * out if func is Tensor.float else out


@pytest.mark.parametrize("name", NORM_CHANGES)
@torch.no_grad()
def test_what_is_changed_of_a_norm_is_called(name: str, computed: list[Tensor]) -> None:
    def changed(*steps: Callable[[Any], Any]) -> Tensor:
        torch.manual_seed(0)
        norm = made(NORMS["gemma"])
        for step in steps:
            step(norm)
        return norm(X)  # type: ignore[no-any-return]

    plain, want = changed(), changed(NORM_CHANGES[name])
    assert not torch.allclose(plain, want) and not computed
    for steps in ((qkv.accelerate, NORM_CHANGES[name]), (NORM_CHANGES[name], qkv.accelerate)):
        torch.testing.assert_close(changed(*steps), want)
    assert len(computed) == 2 * (name in ("a hook", "a pre-hook", "another eps"))


def with_gradient_of_x(module: nn.Module) -> Tensor:
    return module.requires_grad_(False)(X.clone().requires_grad_())  # type: ignore[no-any-return]


def within(context: Callable[[], Any]) -> Callable[[nn.Module], Tensor]:
    def call(module: nn.Module) -> Tensor:
        with torch.no_grad(), context():
            return module(X)  # type: ignore[no-any-return]

    return call


def with_forward_gradient(module: nn.Module) -> Tensor:
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, torch.ones_like(X))
        out = torch.autograd.forward_ad.unpack_dual(module(dual))
        assert out.tangent is not None
        return out.primal.clone()


def without_gradient(call: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], Tensor]:
    return torch.no_grad()(call)  # type: ignore[no-any-return]


WATCHED: dict[str, Callable[[nn.Module], Tensor]] = {
    "gradients of weights": lambda module: module(X),
    "a gradient of x": with_gradient_of_x,
    "autocast": within(lambda: torch.autocast("cpu", dtype=torch.bfloat16)),
    "a function mode": within(Counted),
    "a dispatch mode": within(Recorded),
    "a forward gradient": with_forward_gradient,
    "vmap": without_gradient(lambda module: torch.func.vmap(module)(X)),
    "traced": without_gradient(lambda module: traced(module.requires_grad_(False))),
    "exported": without_gradient(lambda module: torch.export.export(module, (X,)).module()(X)),
    "compiled": without_gradient(lambda module: torch.compile(module, backend="eager", fullgraph=True)(X)),
    "fp64": without_gradient(lambda module: module.double()(X.double()).float()),
    "x of a class of its own": without_gradient(lambda module: module(X.as_subclass(Twice)).as_subclass(Tensor)),
    "x negated": without_gradient(lambda module: module(torch.complex(X * 0, -X).conj().imag)),
    "without the kernel": without_gradient(lambda module: without_kernel(module)),
}


def traced(module: nn.Module) -> Tensor:
    out: Tensor = torch.jit.trace(lambda x: module(x), (X,), check_trace=False)(X)
    return out


def without_kernel(module: nn.Module) -> Tensor:
    with kernels.use("no kernel"):
        return module(X)  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", WATCHED)
@pytest.mark.parametrize("make", [NORMS["llama"], NORMS["torch"], MLPS["silu"]], ids=["norm", "torch's norm", "mlp"])
@pytest.mark.filterwarnings("ignore")  # torch's own, of tracing and forward mode
def test_torch_computes_what_is_watched(
    name: str, make: Callable[[], nn.Module], computed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = made(make)
    ours = qkv.accelerate(copy.deepcopy(theirs))
    if name == "x of a class of its own":
        monkeypatch.setattr(kernels, "has_few_rows", lambda x: True)
    got, want = WATCHED[name](ours), WATCHED[name](theirs)
    assert not computed
    torch.testing.assert_close(got, want)
    assert got.requires_grad == want.requires_grad


@torch.no_grad()
def test_arguments_by_name_and_errors_are_those_of_the_module(computed: list[Tensor]) -> None:
    for make, name in ((NORMS["llama"], "hidden_states"), (MLPS["silu"], "x")):
        theirs = made(make)
        ours = qkv.accelerate(copy.deepcopy(theirs))
        torch.testing.assert_close(ours(**{name: X}), theirs(**{name: X}))
        for wrong in ((), (X, X), (X[..., :5],), ("x",)):
            with pytest.raises((TypeError, RuntimeError, AttributeError)) as expected:
                theirs(*wrong)
            with pytest.raises(expected.type, match=re.escape(str(expected.value))):
                ours(*wrong)
        assert torch.equal(ours(X[:0]), theirs(X[:0]))
    assert not computed


@torch.no_grad()
def test_patches_of_classes_and_functions_are_in_effect(
    computed: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp, norm = qkv.accelerate(made(MLPS["silu"])), qkv.accelerate(made(NORMS["gemma"]))
    plain = mlp(X), norm(X)
    computed.clear()
    for target, name, patch in (
        (F, "silu", torch.tanh),
        (F, "linear", lambda *args: 2 * torch._C._nn.linear(*args)),
        (LlamaMLP, "forward", lambda self, x: 2 * self.down_proj(self.up_proj(x))),
        (type(mlp.act_fn), "forward", lambda self, x: 2 * x),
        (nn.Linear, "forward", lambda self, x: 2 * torch._C._nn.linear(x, self.weight)),
    ):
        with monkeypatch.context() as patching:
            patching.setattr(target, name, patch)
            assert not torch.allclose(mlp(X), plain[0]), name
    for name in ("forward", "_norm"):
        with monkeypatch.context() as patching:
            patching.setattr(GemmaRMSNorm, name, lambda self, x: 2 * x)
            assert not torch.allclose(norm(X), plain[1])
    of_torch = qkv.accelerate(made(NORMS["torch"]))
    normed = of_torch(X)
    computed.clear()
    with monkeypatch.context() as patching:
        patching.setattr(F, "rms_norm", lambda x, *_: 2 * x)
        assert not torch.allclose(of_torch(X), normed)
    handle = torch_module.register_module_forward_hook(lambda module, _, out: 2 * out)
    try:
        assert not torch.allclose(mlp(X), plain[0])
    finally:
        handle.remove()
    assert not computed
    assert torch.equal(mlp(X), plain[0]) and torch.equal(norm(X), plain[1])


@pytest.mark.parametrize("activation", ["gelu_python", "gelu_python_tanh", "gelu_new", "quick_gelu", "relu2", "tanh"])
@torch.no_grad()
def test_other_activations_are_called(activation: str, computed: list[Tensor]) -> None:
    theirs = made(functools.partial(llama_mlp, activation))
    torch.testing.assert_close(qkv.accelerate(copy.deepcopy(theirs))(X), theirs(X))
    assert not computed


@torch.no_grad()
def test_large_weights_go_as_torch_reads_them(computed: list[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    threads = torch.get_num_threads()
    small, large = torch.empty(64, 64), torch.empty(1024, 1024)
    with kernels.use(kernels.loaded()._replace(isa="avx2")):
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                assert kernels.gains_from_few_rows(torch.empty(1, 64), small)
                assert kernels.gains_from_few_rows(torch.empty(1, 1024), large) == (count > 1)
                assert kernels.gains_from_few_rows(torch.empty(2, 1024), large)
                assert kernels.gains_from_few_rows(torch.empty(1, 1024).bfloat16(), large.bfloat16())
        finally:
            torch.set_num_threads(threads)
        for x in (torch.empty(17, 64), torch.empty(0, 64), torch.empty(1, 64).double(), torch.empty(17, 64).half()):
            assert not kernels.gains_from_few_rows(x, small)
    for isa, rows in (("avx512", 5), ("generic", 1)):
        with kernels.use(kernels.loaded()._replace(isa=isa)):
            assert not kernels.gains_from_few_rows(torch.empty(rows, 64), small)


def sources() -> Iterator[tuple[str, ast.ClassDef]]:
    """Each class of transformers' models whose text may be that of a norm or a gated MLP, by model."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for text in re.split(r"\n(?=class |@|def )", path.read_text()):
            is_norm = "rsqrt" in text or "torch.pow(" in text
            is_mlp = "_proj(" in text or "w2(" in text or "output_linear(" in text
            if text.startswith("class ") and "(nn.Module)" in text and (is_norm or is_mlp) and len(text) < 4000:
                definition = ast.parse(text).body[0]
                assert isinstance(definition, ast.ClassDef)
                yield path.parent.name, definition


def of_source(text: str) -> Any:
    names: dict[str, Any] = {}
    exec(text, names)
    return names["forward"]


def test_forwards_that_differ_are_no_copies() -> None:
    own = "import torch\ndef forward(self, x):\n    return torch.pow(x.mean(-1, keepdim=True) * self.weight, -0.5)\n"
    known = of_source(own)
    assert is_copy_of(of_source(own.replace("x", "hidden")), known)
    for old, new in (
        ("-0.5", "-0.25"),
        ("(-1", "(1"),
        ("True", "1"),
        ("weight", "scale"),
        ("self, x", "self, x=None"),
        ("self, x", "self, *x"),
        ("* self", "+ self"),
        ("import torch", "import math as torch"),
        ("def", "async def"),
    ):
        assert old in own and not is_copy_of(of_source(own.replace(old, new)), known), new
    for other in (
        functools.wraps(known)(lambda *args: known(*args)),
        functools.partial(known),
        None,
        nn.Module.forward,
    ):
        assert not is_copy_of(other, known)


IMPORTS = ast.parse("import torch\nimport torch.nn.functional as F\nfrom torch import nn").body
"""Bytecode depends on whether a name is imported by the file."""


def methods(definition: ast.ClassDef) -> dict[str, Any]:
    """Functions of a class that have no defaults, compiled without annotations."""
    found: dict[str, Any] = {}
    for node in definition.body:
        is_plain = isinstance(node, ast.FunctionDef) and not (node.decorator_list or node.args.defaults)
        if is_plain and node.name in ("forward", "_norm") and not (node.args.kwarg or node.args.vararg):
            for argument in node.args.args:
                argument.annotation = None
            node.returns = None
            names: dict[str, Any] = {}
            exec(compile(ast.Module([*IMPORTS, node], []), "transformers", "exec"), names)
            found[node.name] = names[node.name]
    return found


# Models of the release that is pinned whose norms, gated MLPs or both have known forwards.
WITH_BOTH = """
afmoe aimv2 aria axk1 axk2 bailing_hybrid bamba blt chameleon cohere2_moe csm cwm deepseek_ocr2 deepseek_v2
deepseek_v3 deepseek_v32 deimv2 dia diffllama diffusion_gemma doge dots1 dots3_note embedding_gemma2 emu3 ernie4_5
ernie4_5_moe ernie4_5_vl_moe eurobert evolla exaone4 exaone4_5 exaone_moe flex_olmo flint gemma gemma2 gemma3 gemma4
gemma4_unified glm glm4 glm4_moe glm4_moe_lite glm4v glm4v_moe glm_image glm_moe_dsa glm_ocr granite granite4_vision
granite_docling granite_swa granitemoe_swa granitemoehybrid granitemoeshared helium higgs_audio_v2 hunyuan_v1_dense
hunyuan_v1_moe hunyuan_vl hy_v3 hy_v4 hyperclovax idefics idefics2 jamba kimi_linear kolibri1 laguna lfm2 lfm2_moe
lfm3 lfm3_vl llama longcat_flash mellum mimo_v2_flash minicpm3 ministral ministral3 mistral mistral4 mistral_large4
mllama molmo2 muse_glimmer muse_glimmer_assistant muse_spark olmo2 olmo3 olmo_hybrid olmoe ovis2 paddleocr_vl pe_audio
pe_audio_video pe_video phi3 phi4_multimodal pixtral qwen2 qwen2_5_omni qwen2_5_vl qwen2_moe qwen2_vl qwen3 qwen3_5
qwen3_5_moe qwen3_moe qwen3_next qwen3_omni_moe qwen3_vl qwen3_vl_moe sapiens2 smollm3 solar_open ultrabert
unlimited_ocr vaultgemma vibevoice voxtral_realtime youtu zamba
"""
WITH_NORMS = """
apertus arcee beam bitnet clvp cosmos3_edge deepseek_v4 falcon_h1 falcon_mamba gemma3n glm5_next gpt_oss granitemoe
idefics3 inkling inkling2 internvl jetmoe kosmos2_5 kyutai_speech_to_text lighton_ocr llama4 longt5 mamba mamba2
minimax minimax_m2 minimax_m3_vl mistral3 mixtral moshi mt5 nemotron_h nemotron_h_omni neomme neucodec
openai_privacy_filter pix2struct pop2piano qianfan_ocr recurrent_gemma seed_oss step3p7 switch_transformers t5 t5gemma
t5gemma2 timesfm timesfm2_5 udop ultravbert umt5 vibevoice_acoustic_tokenizer vibevoice_asr xcodec2 zamba2 zaya
"""
WITH_MLPS = """
cohere cohere2 cohere_compass dinov2 dinov2_with_registers dinov3_vit eomt eomt_dinov3 esmc esmfold2 hrm_text
moonshine_streaming nomic_bert olmo qwen4_exp radio rf_detr stablelm tipsv2 videomt
"""


def test_models_with_known_forwards() -> None:
    """Other releases may have changed theirs, which are not taken then."""
    norms: dict[str, set[str]] = {form.forward.__name__: set() for form in normed_forward._FORMS}
    mlps: dict[str, set[str]] = {form.forward.__name__: set() for form in gated_forward._FORMS}
    for name, definition in sources():
        own = methods(definition)
        for norm in normed_forward._FORMS:
            calls_same = norm.norm is None or is_copy_of(own.get("_norm"), norm.norm)
            if calls_same and is_copy_of(own.get("forward"), norm.forward):
                norms[norm.forward.__name__].add(name)
        for mlp in gated_forward._FORMS:
            if is_copy_of(own.get("forward"), mlp.forward):
                mlps[mlp.forward.__name__].add(name)
    assert all(norms.values()) and all(mlps.values())
    constraints = (Path(__file__).parents[3] / "constraints.txt").read_text()
    if f"transformers=={transformers.__version__}\n" in constraints:
        assert set().union(*norms.values()) == {*WITH_BOTH.split(), *WITH_NORMS.split()}
        assert set().union(*mlps.values()) == {*WITH_BOTH.split(), *WITH_MLPS.split()}
