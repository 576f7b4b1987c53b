"""`qkv doctor`: kernel, threads, versions and registration, as text and JSON, whatever is missing."""

import importlib.metadata
import json
import platform
import re

import pytest
import torch

import qkv
from qkv import kernels
from qkv.cli import doctor, main


def report(capsys) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_json(capsys):
    found = report(capsys)
    assert found["qkv"] == qkv.__version__
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["threads"]["cores"] >= 1
    versions = {each["name"]: each for each in found["versions"]}
    python = {"name": "python", "found": platform.python_version(), "tested": ">=3.10", "is_tested": True}
    assert versions["python"] == python
    assert versions["torch"] == {"name": "torch", "found": torch.__version__, "tested": ">=2.9,<3", "is_tested": True}
    assert {"transformers", "matplotlib", "typer", "rich", "gguf", "accelerate"} < versions.keys()
    assert not versions.keys() & {"pytest", "onnxruntime", "qkv"}
    assert found["transformers"]["attention"] == ["qkv"] and found["transformers"]["error"] is None
    assert {"qkv_t5", "qkv_latent_llama"} < set(found["transformers"]["model_types"])


@pytest.mark.skipif(kernels.absence() is not None, reason="the kernel is of another architecture")
def test_the_kernel_and_the_instruction_sets_of_the_machine(capsys):
    kernel = report(capsys)["kernel"]
    assert (kernel["isa"], kernel["compiler"]) == (kernels.loaded().isa, kernels.loaded().compiler)
    assert re.fullmatch(r"(GCC|Clang) \d+\.\d+\.\d+", kernel["compiler"])
    assert kernel["isa"] in kernel["supported"] and kernel["supported"][-1] in ("generic", "neon")
    assert kernel["absence"] is None


def test_text(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"qkv {qkv.__version__}"
    names = ["kernel", "built by", "fast path", "threads", "attention", "model types"]
    assert [line[2:15].strip() for line in lines[1:7]] == names
    assert any(line.split() == ["torch", torch.__version__, ">=2.9,<3"] for line in lines)


def test_what_is_missing_or_of_another_version_is_said(capsys, monkeypatch):
    installed = importlib.metadata.version
    missing = importlib.metadata.PackageNotFoundError("gguf")

    def version(package: str) -> str:
        if package == "gguf":
            raise missing
        return "6.1.0" if package == "transformers" else installed(package)

    def fail(**options):
        raise ImportError("no AttentionInterface")

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr("qkv.integrations.transformers.register", fail)
    with kernels.use("it was not compiled"):
        assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "kernel       none, torch's kernels run instead: it was not compiled\n" in out
    lines = [line.split() for line in out.splitlines()]
    assert lines[3][:3] == ["fast", "path", "no,"]
    assert ["transformers", "ImportError:", "no", "AttentionInterface"] in lines
    assert ["gguf", "-", ">=0.10", "missing"] in lines
    assert ["transformers", "6.1.0", ">=5.20,<6", "not", "tested"] in lines


def test_versions_before_a_release_belong_to_it():
    assert doctor.Version("torch", "2.13.0.dev20261101+cpu", ">=2.9,<3").is_tested
    assert not doctor.Version("torch", None, ">=2.9,<3").is_tested
