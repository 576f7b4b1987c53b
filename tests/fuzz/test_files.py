"""The seeds of the file fuzzer are read, and its earlier findings are described or refused."""

import random

import pytest
from fuzz import files

SEEDS = [bytes([kind]) + seed for kind, reader in enumerate(files.READERS) for seed in reader.seeds()]


@pytest.mark.parametrize("path", sorted(files.CORPUS.iterdir()), ids=lambda path: path.name)
def test_earlier_findings_stay_fixed(tmp_path, path):
    files.check(path.read_bytes(), tmp_path)


@pytest.mark.parametrize("number", range(len(SEEDS)))
def test_values_of_other_types(tmp_path, number):
    """A few changes of each seed; ``python -m fuzz.files`` makes thousands, and counts what they reach."""
    messages = {files.check(SEEDS[number], tmp_path)}
    for seed in range(25):
        changed = files.mutate(SEEDS[number], 8192, seed, lambda data, most: flip(data, seed))
        messages.add(files.check(changed, tmp_path))
    assert len(messages) > 3


def flip(data, seed):
    draw = random.Random(seed)
    at = draw.randrange(1, len(data))
    return data[:at] + draw.randbytes(1) + data[at + 1 :]
