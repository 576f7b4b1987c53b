"""The package on Windows, as far as another system can tell: it imports and runs without what Windows lacks.

mypy, which `make check` runs for Windows too, finds names that do not exist there.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from convert import models

SOURCE = Path(__file__).parents[2] / "src"
FILES = sorted(SOURCE.rglob("*.py"))
POSIX_ONLY = {"crypt", "fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios", "tty"}


def is_of_platform(node: ast.stmt) -> bool:
    """Whether a statement is a choice by `sys.platform`, as mypy knows it."""
    return isinstance(node, ast.If) and "sys.platform ==" in ast.unparse(node.test)


def imported_at_once(body: list[ast.stmt]) -> set[str]:
    """The modules that running a file imports, but for those that its platform chooses."""
    found: set[str] = set()
    for node in body:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
        elif not is_of_platform(node) and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            inner = [each for each in ast.iter_child_nodes(node) if isinstance(each, (ast.stmt, ast.ExceptHandler))]
            found |= imported_at_once(inner)  # type: ignore[arg-type]
    return found


def without_encoding(tree: ast.AST) -> list[int]:
    """The lines that read or write a text file in the encoding of the system, which is not UTF-8 on Windows."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("read_text", "write_text") and not any(k.arg == "encoding" for k in node.keywords):
                lines.append(node.lineno)
            if node.func.attr in ("open", "fdopen") and any(
                isinstance(each, ast.Constant) and each.value in ("r", "w", "a", "x") for each in node.args
            ):
                lines += [] if any(k.arg == "encoding" for k in node.keywords) else [node.lineno]
    return lines


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_nothing_of_posix_and_names_its_encoding(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert not imported_at_once(tree.body) & POSIX_ONLY
    assert not without_encoding(tree)


def test_the_tests_above_find_what_they_look_for() -> None:
    code = (
        "try:\n    import fcntl\nexcept ImportError:\n    import os\nclass A:\n    import pwd\ndef f():\n    import tty"
    )
    assert imported_at_once(ast.parse(code).body) == {"fcntl", "os", "pwd"}
    chosen = "import sys\nif sys.platform == 'win32':\n    import msvcrt\nelse:\n    import fcntl"
    assert imported_at_once(ast.parse(chosen).body) == {"sys"}
    assert without_encoding(
        ast.parse("a.read_text()\nb.write_text('', encoding='ascii')\nc.open('w')\nd.open('rb')")
    ) == [1, 3]


PRETENCE = """
import os, sys, types
import multiprocessing, pathlib, shutil, subprocess, tempfile
import torch, transformers, typer, rich.console, safetensors.torch, accelerate
import gguf, huggingface_hub, packaging.requirements
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, LlamaConfig, PreTrainedTokenizerFast

lacking = {lacking!r}
for name in lacking:
    sys.modules[name] = None  # importing it raises ImportError
for name in ("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "geteuid", "getuid", "sched_getaffinity", "fork", "pread",
             "fchmod", "fchown", "mkfifo"):
    delattr(os, name)
for name in ("open", "mkdir", "stat", "unlink", "rmdir", "rename", "readlink", "replace"):
    def call(*arguments, real=getattr(os, name), **options):
        assert not {{"dir_fd", "src_dir_fd", "dst_dir_fd"}} & set(options), "Windows has no such calls"
        assert not (real.__name__ == "open" and os.path.isdir(arguments[0])), "Windows opens no folders"
        return real(*arguments, **options)
    setattr(os, name, call)
os.O_BINARY = 0
locked = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=lambda *arguments: locked.append(arguments))
sys.platform = "win32"
"""
"""What another system can do to be as Windows for our modules; those of others are loaded before."""


def pretend(code: str, *arguments: object) -> str:
    pretence = PRETENCE.format(lacking=sorted(POSIX_ONLY - {"posix"}))  # os is built on that
    command = [sys.executable, "-c", pretence + code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform == "win32", reason="it is Windows")
def test_everything_is_imported_without_posix() -> None:
    code = """
import importlib, pkgutil, warnings
import qkv
for module in pkgutil.walk_packages(qkv.__path__, "qkv."):
    if module.name != "qkv.kernels.native":  # the library looks like one
        importlib.import_module(module.name)
from qkv.kernels import LIBRARY, absence
print(LIBRARY.name, absence())
q = torch.randn(1, 2, 3, 8)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", RuntimeWarning)
    assert qkv.attention(q, q, q).shape == q.shape
"""
    assert pretend(code).startswith("native.dll this installation of qkv has no compiled kernel")


@pytest.mark.skipif(sys.platform == "win32", reason="it is Windows")
def test_a_model_is_converted_without_posix(tmp_path: Path) -> None:
    """To the same bytes, and again in place of the first."""
    from qkv.convert import convert_checkpoint

    source = models.save(tmp_path / "source", "llama", shards="60KB")
    convert_checkpoint(source, tmp_path / "wanted", 2, how=None)
    code = """
from qkv.cli import main
arguments = ["convert", sys.argv[1], sys.argv[2], "--kv-heads", "2"]
assert main(arguments) == 0
assert main(arguments) == 1 and main([*arguments, "--overwrite"]) == 0
assert len(locked) == 2
assert main(["--help"]) == 0 and main(["doctor"]) == 0 and main(["inspect", sys.argv[2]]) == 0
"""
    assert "Usage: qkv" in pretend(code, source, tmp_path / "out")
    assert models.digest(tmp_path / "out") == models.digest(tmp_path / "wanted")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source", "wanted"]
