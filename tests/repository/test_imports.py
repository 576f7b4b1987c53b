"""Imports go in one direction, and importing qkv loads no optional dependency."""

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from qkv.cli import EXTRAS

SOURCE = Path(__file__).parents[2] / "src" / "qkv"

# Each level may import itself and lower levels; the lowest is first.
ORDER = [
    {
        "qkv.starting",
        "qkv.arguments",
        "qkv.torch_internals",
        "qkv.tracing",
        "qkv.bands",
        "qkv.byte_sizes",
        "qkv.drawing",
        "qkv.masks",
        "qkv.scores",
        "qkv.pages",
        "qkv.rotation",
    },
    {"qkv.problem", "qkv.kernels"},
    {"qkv.backends"},
    {"qkv.partial", "qkv.functional", "qkv.sequences", "qkv.cache"},
    {"qkv.look", "qkv.layer_record", "qkv.parallel"},
    {"qkv.layers"},
    {"qkv.integrations"},
    {"qkv.convert"},
    {"qkv.analysis"},
    {"qkv.models"},
    {"qkv.bench"},
    {"qkv.cli", "qkv.plots"},
]


def level(module: str) -> int:
    for height, names in enumerate(ORDER):
        if any(module == name or module.startswith(name + ".") for name in names):
            return height
    raise AssertionError(f"{module} is in no level of ORDER; add it")


def imports(path: Path) -> set[str]:
    """The modules of ours that a file imports, functions' own imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if is_module(name)}
            found |= known or {node.module}
    return {name for name in found if name == "qkv" or name.startswith("qkv.")}


def is_module(name: str) -> bool:
    path = SOURCE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


FILES = sorted(path for path in SOURCE.rglob("*.py") if path != SOURCE / "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_nothing_imports_upward(path: Path) -> None:
    module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
    for imported in imports(path) - {"qkv"}:
        assert level(imported) <= level(module), f"{module} imports {imported}, which stands above it"
    if "qkv" in imports(path):
        assert level(module) >= level("qkv.models"), f"{module} imports the package that imports it"


FOLDERS = {
    "convert": (12, 7),
    "cli": (10, 5),
    "integrations": (5, 4),
    "integrations/transformers": (16, 7),
    "integrations/transformers/steps": (12, 8),
}
"""Files and folders that a folder may have, and how many of them may build on each other."""


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_has_few_modules_and_levels(folder: str) -> None:
    below: dict[str, set[str]] = {}
    for path in (SOURCE / folder).rglob("*.py"):
        name = path.relative_to(SOURCE / folder).parts[0].removesuffix(".py")
        if name == "__init__":
            continue
        inside = f"qkv.{folder.replace('/', '.')}."
        imported = {module[len(inside) :].split(".")[0] for module in imports(path) if module.startswith(inside)}
        below.setdefault(name, set()).update(imported - {name})

    def height(name: str, above: tuple[str, ...] = ()) -> int:
        assert name not in above, f"{folder}: {' -> '.join([*above, name])} is a circle"
        return 1 + max((height(other, (*above, name)) for other in below[name]), default=0)

    width, depth = FOLDERS[folder]
    assert len(below) <= width
    assert max(map(height, below)) <= depth


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_qkv_and_its_command_loads_no_optional_dependency_and_no_compiler() -> None:
    """A process that imports qkv can load exported programs with its operators."""
    names = {*EXTRAS, "matplotlib", "safetensors", "triton"}
    names |= {"sympy", "torch._dynamo"}  # a second or more
    code = f"""
import torch, sys; before = set(sys.modules)
import qkv; print(hasattr(torch.ops.qkv, 'forward'), hasattr(torch.ops.qkv, 'backward'))
import qkv.cli; print({names} & (set(sys.modules) - before))
"""
    assert run(code) == "True True\nset()"


PUBLIC = {
    *("attention", "attention_with_lse", "attention_weights", "merge", "explain", "BackendError", "accelerate"),
    *("Mask", "KVCache", "Int8KVCache", "SlidingKVCache", "CrossKVCache", "LatentKVCache", "PagedKVCache", "PagePool"),
    *("Caches", "RotaryEmbedding", "RotaryEmbedding2d"),
    *("RotaryScaling", "RelativePositionBias", "WindowPositionBias", "ContinuousWindowPositionBias"),
    *("Attention", "ScaledDotProductAttention", "MultiHeadAttention", "CrossAttention", "CausalAttention"),
    *("SlidingWindowAttention", "MultiQueryAttention", "GroupedQueryAttention", "LatentAttention"),
    *("DifferentialAttention", "CrossLayerAttention"),
    *("QKVCache", "register", "report", "unpad", "unregister"),
}


def test_the_public_names_are_these_and_every_one_has_a_docstring() -> None:
    import qkv

    lazy = {"QKVCache"}
    names = {name for name in dir(qkv) if not name.startswith("_")}
    public = {name for name in names if not inspect.ismodule(getattr(qkv, name))}
    assert public == PUBLIC == set(qkv.__all__)
    assert not lazy & vars(qkv).keys()
    with pytest.raises(AttributeError, match="module 'qkv' has no attribute 'QKVCaches'"):
        qkv.QKVCaches  # noqa: B018
    for name in public:
        assert inspect.getdoc(getattr(qkv, name)), f"qkv.{name} has no docstring"


PACKAGES = (
    *("qkv", "qkv.cache", "qkv.convert", "qkv.layers", "qkv.parallel", "qkv.plots"),
    *("qkv.integrations.torch", "qkv.integrations.transformers"),
)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_lists_the_names_that_it_passes_on(package: str) -> None:
    tree = ast.parse((SOURCE.parent.joinpath(*package.split(".")) / "__init__.py").read_text())
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    passed_on = {alias.name for node in imports for alias in node.names if alias.asname == alias.name} - {"starting"}
    listed = importlib.import_module(package).__all__
    assert sorted(listed) == sorted(passed_on)  # ruff has an order of its own for them, constants first
