"""Every cache in any order of operations, against tokens kept beside it: `fuzz.caches` and `fuzz.rows`, shrunk."""

from typing import Any

import pytest
from fuzz import caches, rows
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

examples = pytest.mark.parametrize("examples", [20, pytest.param(200, marks=pytest.mark.long)])


@examples
@pytest.mark.parametrize("kind", caches.KINDS)
def test_a_cache_equals_concatenation(kind: str, examples: int) -> None:
    play(caches.World, kind, examples, steps=25)


@examples
@pytest.mark.parametrize("kind", rows.NAMES)
def test_each_row_of_a_cache_is_a_list_of_its_tokens(kind: str, examples: int) -> None:
    play(rows.World, kind, examples, steps=20)


def play(world_of: Any, kind: str, examples: int, steps: int) -> None:
    class Machine(RuleBasedStateMachine):
        @initialize(seed=st.integers(0, 2**31))
        def begin(self, seed: int) -> None:
            self.world = world_of(kind, seed)

        @rule(operation=st.sampled_from(world_of.OPERATIONS), data=st.data())
        def step(self, operation: str, data: st.DataObject) -> None:
            self.world.step(operation, lambda n: data.draw(st.integers(0, n - 1)))

    how = settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(Machine, settings=how)  # type: ignore[no-untyped-call]
