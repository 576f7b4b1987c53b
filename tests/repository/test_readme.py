"""The README: its examples, run in order as a reader would; its tables, those of the code and of the measurements."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_every_example_runs_and_prints_the_expected_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 3
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    for words in (
        "torch.Size([2, 1, 8, 2048])",
        "native     chosen: ",
        "Mask.causal(window=4)",
    ):
        assert words in printed


def test_every_mechanism_is_in_the_table_with_its_layer() -> None:
    import qkv

    layers = re.findall(r"\| `(\w+)`[^|]*\|$", README, flags=re.MULTILINE)
    others = [layer for layer in layers if not issubclass(getattr(qkv, layer), qkv.Attention)]
    assert len(layers) == 7 + 3 and others == ["LatentAttention"]


def test_its_figures_are_the_newest_of_the_machine_that_it_names() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "intel-xeon" / "one_line.json").read_text())
    names = {"Llama of SmolLM2-135M's sizes": "135 million", "Llama of 1.0 billion parameters": "1.0 billion"}
    rows = []
    for one in measured["measurements"]:
        before, after = one["seconds"]["transformers"], one["seconds"]["accelerated"]
        prefill = [one["tokens"] / seconds["prefill"] for seconds in (before, after)]
        steps = [1 / seconds["step"] for seconds in (before, after)]
        cells = [names[one["model"]], one["dtype"], f"{one['tokens']:,}", *(f"{each:,.0f}" for each in prefill)]
        cells += [f"{prefill[1] / prefill[0]:.2f}", *(f"{each:.1f}" for each in steps), f"{steps[1] / steps[0]:.2f}"]
        rows.append(f"| {' | '.join(cells)} |")
    shown = [line for line in README.splitlines() if re.match(r"\| [\d.]+ (m|b)illion", line)]
    assert len(shown) == 4 and set(shown) <= set(rows)
    machine = measured["machine"]
    release = machine["torch"].partition("+")[0]
    assert f"{machine['date']}, {machine['cores']} cores of an Intel Xeon with AMX, torch {release};" in README
    assert machine["kernel"] == "amx" and "Xeon" in machine["cpu"]


def test_the_figures_of_the_guide_to_speed_are_those_of_the_machine_that_it_names() -> None:
    measured = json.loads((ROOT / "benchmarks" / "results" / "amd-epyc" / "kernel.json").read_text())
    guide = (ROOT / "docs" / "guides" / "speed.md").read_text()
    ratios: dict[str, list[float]] = {}
    for one in measured["measurements"]:
        times = one["times"]
        if "torch" in times:
            ratios.setdefault(one["case"]["name"], []).append(times["torch"]["median_us"] / times["qkv"]["median_us"])
    rows = re.findall(r"^\| ([^|]+) \|((?: [\d.]+ \|){3})$", guide, flags=re.MULTILINE)
    assert len(rows) == 5
    for words, cells in rows:
        case = {"decoding, 4096 keys, 32 heads of 128": "decoding, 4096 keys, 32 heads on 32"}.get(words, words)
        assert cells.strip(" |").split(" | ") == [f"{ratio:.2f}" for ratio in ratios[case]], words
    machine = measured["machine"]
    assert machine["kernel"] == "avx512bf16" and f"AMD EPYC (AVX-512 with bf16), {machine['date']}," in guide
