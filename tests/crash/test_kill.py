"""The daemon is killed at every step that an operation takes on disk: the next mount shows the old tree or
the new one, and nothing else.
"""

from __future__ import annotations

import pytest

from layerfs.upper import steps
from tests.support.stack import scratch_root

from .harness import Ground, Scenario, Trial, Zygote
from .scenarios import SCENARIOS, lay_out

reached: set[str] = set()


@pytest.mark.parametrize("scenario", SCENARIOS, ids=str)
def test_old_or_new_after_every_step(zygote: Zygote, scenario: Scenario) -> None:
    trial = Trial(zygote, Ground(scratch_root()), scenario, lay_out)
    try:
        assert trial.steps, "nothing happened on disk"
        reached.update(trial.steps)
        problems = []
        for number, name in enumerate(trial.steps, 1):
            trial.die_at(number)
            try:
                trial.check(f"killed at step {number} of {len(trial.steps)}, {name}")
            except (AssertionError, OSError, RuntimeError) as problem:
                problems.append(f"{type(problem).__name__}: {problem}")
        assert not problems, "\n".join(problems)
    finally:
        trial.remove()


def test_every_step_was_reached() -> None:
    """A step that no scenario reaches is not tested; one that is gone is a stale name."""
    if not reached:
        pytest.skip("runs after all scenarios only")
    assert set(steps.NAMES) == reached
