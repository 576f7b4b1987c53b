"""Each kind of damage that `fuzz.py` knows, once; by hand, ``python tests/convert/fuzz.py`` draws hundreds."""

import pytest
from convert import fuzz

pytest.importorskip("typer")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return fuzz.make_source(tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("kind", fuzz.FAULTS)
def test_damage_is_refused(tmp_path, valid, kind):
    fuzz.refuse(valid, tmp_path, kind, seed=sum(kind.encode()))


def test_what_is_not_damaged_is_converted(tmp_path, valid):
    code, said = fuzz.convert(valid, tmp_path / "out")
    assert (code, (tmp_path / "out" / "config.json").is_file()) == (0, True), said
