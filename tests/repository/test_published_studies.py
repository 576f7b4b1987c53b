"""The pages of studies are those that their published numbers make."""

import json
from pathlib import Path

import pytest
from repository.studies import STUDIES, modules_of

PUBLISHED = sorted(path.parent.name for path in STUDIES.glob("*/results.json"))


@pytest.mark.parametrize("study", PUBLISHED)
def test_a_page_follows_from_its_numbers(study: str, tmp_path: Path) -> None:
    report, page = modules_of(study)["report"], tmp_path / "README.md"
    results = json.loads((STUDIES / study / "results.json").read_text())
    if study == "multi_query_smollm2":  # all of its page is written
        report.write(results, page)
    else:
        page.write_text((STUDIES / study / "README.md").read_text())
        report.write(results, tmp_path)
    assert page.read_text() == (STUDIES / study / "README.md").read_text()
    assert {path.name for path in tmp_path.glob("*.svg")} == {path.name for path in (STUDIES / study).glob("*.svg")}


def test_the_guide_of_kv_heads_has_the_losses_of_the_study() -> None:
    models = json.loads((STUDIES / "multi_query_smollm2" / "results.json").read_text())["models"]
    guide = (STUDIES.parent / "docs" / "guides" / "kv-heads.md").read_text()
    for name in ("original", "mean", "aligned"):
        losses = models[name]["losses"]
        assert f"| {name} | {losses['converted']:.3f} | {losses['uptrained']:.3f} |" in guide
    assert f"{models['aligned']['steps']} steps of training" in guide
    study = (STUDIES / "grouped_query" / "README.md").read_text()
    assert "| aligned < mean | 9 of 9 | 9 of 9 | 9 of 9 |" in study and "in 9 of 9 comparisons" in guide


def test_the_readme_counts_the_studies() -> None:
    words = {4: "Four", 5: "Five", 6: "Six", 7: "Seven"}
    assert f"{words[len(PUBLISHED)]} [studies](docs/project/studies.md)" in (STUDIES.parent / "README.md").read_text()
