"""Caches whose rows differ in length: each row is the same text alone."""

import pytest
from fuzz.rows import NAMES, World
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test


@pytest.mark.parametrize("kind", NAMES)
def test_each_row_is_a_list_of_its_tokens(kind: str) -> None:
    class Machine(RuleBasedStateMachine):
        @initialize(seed=st.integers(0, 2**31))
        def begin(self, seed: int) -> None:
            self.world = World(kind, seed)

        @rule(operation=st.sampled_from(World.OPERATIONS), data=st.data())
        def step(self, operation: str, data: st.DataObject) -> None:
            self.world.step(operation, lambda n: data.draw(st.integers(0, n - 1)))

    how = settings(
        max_examples=15,
        stateful_step_count=20,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
    )
    run_state_machine_as_test(Machine, settings=how)  # type: ignore[no-untyped-call]
