"""The README's examples, run in order as a reader would."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[2] / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore")  # of transformers' own making
def test_every_example_runs_and_prints_the_expected_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) >= 6
    namespace: dict[str, object] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    for words in (
        "torch.Size([2, 1, 8, 2048])",
        "cut by 16",
        "offset=7 aligns",
        "[7, 8, 9, 10, 11, 12, 13]",
        "native     chosen: ",
        "Mask.causal(window=4)",
    ):
        assert words in printed


def test_every_mechanism_is_in_the_table_with_its_layer() -> None:
    import qkv

    layers = re.findall(r"\| `(\w+)`[^|]*\|$", README, flags=re.MULTILINE)
    others = [layer for layer in layers if not issubclass(getattr(qkv, layer), qkv.Attention)]
    assert len(layers) == 7 + 3 and others == ["LatentAttention"]
