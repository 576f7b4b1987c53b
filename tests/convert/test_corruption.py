"""Each kind of damage that `faults.py` knows, once; ``make fuzz`` draws thousands."""

import pytest
from convert import faults


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return faults.make_source(tmp_path_factory.mktemp("valid"))


@pytest.mark.parametrize("kind", faults.FAULTS)
def test_damage_is_refused(tmp_path, valid, kind):
    faults.refuse(valid, tmp_path, kind, seed=sum(kind.encode()))


def test_undamaged_checkpoints_are_converted(tmp_path, valid):
    code, stderr = faults.convert(valid, tmp_path / "out")
    assert (code, (tmp_path / "out" / "config.json").is_file()) == (0, True), stderr
