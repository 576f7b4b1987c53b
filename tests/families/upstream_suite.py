"""transformers' own common model tests on sdpa and on qkv: `PYTHONPATH=tests python -m families.upstream_suite`.

The source distribution of the installed transformers contains the test classes that all its models share, without the
test modules of each model. Small models and inputs come from the rules in this folder instead. The tests run twice, the
second time with our attention and mask functions under the name "sdpa"; no test may fail then that passed before.
"""

import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path
from typing import Any

FAMILIES = ("mistral", "bert", "bart", "t5")
# Mixins that the common tests inherit from and that the source distribution leaves out.
ABSENT = {"tests.exporters.test_export": "ExportTesterMixin", "tests.generation.test_utils": "GenerationTesterMixin"}
# Without heads that ask for more than tokens, or for half of an encoder-decoder.
MODELS = r"^(Mistral|Bert)(Model|ForCausalLM|ForMaskedLM|ForSequenceClassification)$|^(Bart|T5)(Model|ForCond\w+)$"
OUTCOME = re.compile(r"^\S+::(\S+::\S+) (PASSED|FAILED|ERROR|SKIPPED)", re.MULTILINE)


calls = 0


def pytest_configure() -> None:
    """As a plugin of pytest: puts qkv in the place of sdpa."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from qkv.integrations.transformers.attention import attend
    from qkv.integrations.transformers.masks import make_mask

    def counted(*args: Any, **options: Any) -> Any:
        global calls
        calls += 1
        return attend(*args, **options)

    AttentionInterface.register("sdpa", counted)
    AttentionMaskInterface.register("sdpa", make_mask)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"calls of qkv: {calls}")


class ModelTester:
    """What the common tests ask of a model's tester."""

    batch_size, seq_length, encoder_seq_length, is_training = 3, 19, 19, True

    def __init__(self, family: str) -> None:
        from families.inputs import tokens
        from families.registry import candidates
        from families.shrink import shrink

        cls = next(candidates(f"{family}.modeling_{family}"))
        self.config_class, self.shrink = cls.config_class, shrink
        config = self.get_config()
        for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
            setattr(self, name, getattr(config, name))
        names = ["input_ids", "decoder_input_ids"] if config.is_encoder_decoder else ["input_ids"]
        self.inputs = {name: tokens(config, self.seq_length) for name in names}
        for name in names:
            self.inputs[name.replace("input_ids", "attention_mask")] = self.inputs[name].new_ones(3, self.seq_length)

    def get_config(self) -> Any:
        config = self.shrink(self.config_class())
        config.pad_token_id = config.pad_token_id or 0
        return config

    def prepare_config_and_inputs_for_common(self) -> Any:
        return self.get_config(), dict(self.inputs)


def cases() -> dict[str, type]:
    """A test class for each family, made of transformers' common tests."""
    from families.registry import candidates

    for module, mixin in ABSENT.items():
        sys.modules[module] = types.ModuleType(module)
        setattr(sys.modules[module], mixin, type(mixin, (), {}))
    common = importlib.import_module("tests.test_modeling_common").ModelTesterMixin
    made = {}
    for family in FAMILIES:
        models = tuple(cls for cls in candidates(f"{family}.modeling_{family}") if re.search(MODELS, cls.__name__))
        setup = lambda self, family=family: setattr(self, "model_tester", ModelTester(family))
        made[f"Test_{family}"] = type(
            f"Test_{family}", (common, unittest.TestCase), {"setUp": setup, "all_model_classes": models}
        )
    return made


def outcomes(folder: Path, *options: str) -> dict[str, str]:
    """The outcome of each common test."""
    paths = [str(folder), *sorted(map(str, folder.glob("transformers-*/"))), str(Path(__file__).parents[1])]
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-v",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:warnings",
            *options,
            "test_suite.py",
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    (folder / f"log{len(options)}.txt").write_text(run.stdout + run.stderr)
    found = dict(OUTCOME.findall(run.stdout))
    if not found or (options and "calls of qkv: 0" in run.stdout):
        raise RuntimeError(f"no test ran, or none of them called qkv:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return found


def main() -> None:
    """Fetches the tests, runs them twice and compares."""
    import transformers

    folder = Path(tempfile.mkdtemp())
    pip = [sys.executable, "-m", "pip", "--quiet"]
    source = f"transformers=={transformers.__version__}"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(folder), "parameterized"], check=True)
    subprocess.run([*pip, "download", "--no-deps", "--no-binary", ":all:", "-d", str(folder), source], check=True)
    with tarfile.open(next(folder.glob("transformers-*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    for package in folder.glob("transformers-*/src"):
        package.rename(package.with_name("not_imported"))
    (folder / "test_suite.py").write_text("from families.upstream_suite import cases\n\nglobals().update(cases())\n")
    (folder / "pytest.ini").write_text("[pytest]\n")
    before, after = outcomes(folder), outcomes(folder, "-p", "families.upstream_suite")
    for name, found in (("sdpa", before), ("qkv", after)):
        counts = {kind: list(found.values()).count(kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
        print(name, counts)
    worse = [test for test, outcome in after.items() if outcome in ("FAILED", "ERROR") and before.get(test) != outcome]
    print("\n".join(["fails on qkv alone:", *worse]) if worse else "nothing fails on qkv that does not fail on sdpa")
    print(f"logs: {folder}")
    sys.exit(bool(worse))


if __name__ == "__main__":
    main()
