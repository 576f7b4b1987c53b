"""docs/log.md: steps are numbered without a gap, and whatever refers to one finds it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOG = (ROOT / "docs" / "log.md").read_text()
ENTRIES = re.findall(r'^### <a id="([\w-]+)"></a>(.+)$', LOG, flags=re.MULTILINE)
STEPS = [int(number) for number in re.findall(r'^### <a id="step-(\d+)"></a>Step \1: ', LOG, flags=re.MULTILINE)]

NUMBERS = r"\d+(?:(?:, | and | to )\d+)*"
# "docs/log.md, step 83", "docs/log.md, 49 and 50", "log 99", "docs/log.md#step-83". In prose on the kernel also "(83)".
REFERENCE = re.compile(rf"\blog(?:\.md)?(?:,? (?:steps? )?|#step-)({NUMBERS})\b")
SHORT_REFERENCE = re.compile(rf"(?<=\s)\(({NUMBERS})\)")

FOLDERS = ("src", "tests", "native", "benchmarks", "docs", "studies", "examples")
PATHS = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
FILES = [path for path in PATHS if path.suffix in {".md", ".py", ".h", ".cpp"}]


def referred_to() -> set[tuple[str, int]]:
    """(file, step) for every reference."""
    found: set[tuple[str, int]] = set()
    for path in FILES:
        text = path.read_text()
        references = REFERENCE.findall(text)
        if path.name == "DESIGN.md" or path.is_relative_to(ROOT / "native"):
            references += SHORT_REFERENCE.findall(text)
        found |= {(str(path.relative_to(ROOT)), int(step)) for some in references for step in re.findall(r"\d+", some)}
    return found


def test_steps_are_numbered_in_order() -> None:
    assert list(range(1, len(STEPS) + 1)) == STEPS
    assert len(STEPS) >= 102


def test_every_reference_to_a_step_finds_it() -> None:
    references = referred_to()
    assert "DESIGN.md" in {file for file, _ in references}
    for file, step in references:
        assert step in STEPS, f"{file} refers to step {step} of docs/log.md, which it does not have"


def test_links_within_the_log_lead_to_its_anchors() -> None:
    anchors = [anchor for anchor, _ in ENTRIES]
    assert len(set(anchors)) == len(anchors)
    links = set(re.findall(r"\]\(#([\w-]+)\)", LOG))
    assert links == set(anchors), "the table by subject lists every entry"


def test_steps_that_the_log_mentions_exist() -> None:
    for some in re.findall(rf"\bsteps? ({NUMBERS})", LOG, flags=re.IGNORECASE):
        assert {int(step) for step in re.findall(r"\d+", some)} <= set(STEPS)


@pytest.mark.parametrize(("anchor", "title"), ENTRIES)
def test_every_entry_has_a_verdict(anchor: str, title: str) -> None:
    assert re.search(r"\b(taken|replaced|undone|measurement)\b", title), f"{anchor} does not say whether it was taken"


def test_tables_have_a_header_and_no_stray_rows() -> None:
    lines = LOG.splitlines()
    for before, line, after in zip(lines, lines[1:], lines[2:], strict=False):
        if line.startswith("|") and not before.startswith("|"):
            assert re.fullmatch(r"\|(?:-+\|)+", after), f"a table's row stands apart from its table: {line}"
