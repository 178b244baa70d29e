import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods.schedule import DIRECTIONS, Schedule, Stage, constant, dante_fractions, gradual_unfreezing

NAMES = ["head", "decoder.0", "decoder.1", "decoder.2", "decoder.3", "decoder.4", "bottleneck", "encoder.4",
         "encoder.3", "encoder.2", "encoder.1", "encoder.0"]


GROUPS = st.integers(1, 30).map(lambda n: ["head", *(f"block {i}" for i in range(n - 1))])
EPOCHS = st.integers(1, 1000)


@given(GROUPS, EPOCHS, st.sampled_from(DIRECTIONS), st.integers(1, 40), st.floats(0, 1))
def test_stages_only_grow_start_with_the_head_and_end_in_time_with_everything(names, epochs, direction, max_stages, open_by):
    schedule = gradual_unfreezing(names, epochs=epochs, direction=direction, max_stages=max_stages, open_by=open_by)
    stages = [schedule.stage(epoch).trainable for epoch in range(epochs)]
    assert all(set(a) <= set(b) for a, b in zip(stages, stages[1:]))
    assert "head" in stages[0] and all(len(stage) == len(set(stage)) for stage in stages)
    assert set(stages[min(math.ceil(open_by * epochs), epochs - 1)]) == set(names)
    assert len(schedule.stages) <= min(max_stages, epochs, len(names))
    grown = [len(b.trainable) - len(a.trainable) for a, b in zip(schedule.stages, schedule.stages[1:])]
    if open_by * epochs >= max_stages:  # no two openings fall on one epoch
        assert max(grown, default=0) - min(grown, default=0) <= 1


def test_everything_is_open_at_half_time_and_not_before():
    schedule = gradual_unfreezing(NAMES, epochs=100)
    assert set(schedule.stage(50).trainable) == set(NAMES) != set(schedule.stage(49).trainable)
    assert schedule.stage(0).trainable == ("head",) and len(schedule.stages) == 7


def test_the_direction_decides_which_end_opens_first():
    first = gradual_unfreezing(NAMES, epochs=100).stages[1].trainable
    assert first == ("head", "decoder.0", "decoder.1")
    first = gradual_unfreezing(NAMES, epochs=100, direction="input_first").stages[1].trainable
    assert first == ("head", "encoder.0", "encoder.1")


def test_dante_fractions_are_those_of_its_formula():
    """E = 200, f = 0.5: 0.63 at 20, 0.77 at 40, 0.90 at 60, all at 80 (dante-trainer 1.0.3b3)."""
    found = dante_fractions(epochs=200)
    assert [e for e, _ in found] == [0, 20, 40, 60, 80]
    assert [f for _, f in found] == pytest.approx([0.5, 0.633, 0.767, 0.9, 1.0], abs=1e-3)


@given(EPOCHS, st.floats(0, 1))
def test_the_wanted_freeze_holds_at_the_first_epoch_however_short_the_training(epochs, fraction):
    """Dante 1.0.3b3 ignores it for fewer than 20 epochs, and steps parameters twice when nothing is frozen."""
    found = dante_fractions(epochs=epochs, fraction=fraction)
    assert found[0] == (0, 1 - fraction)
    assert all(a < b and e < f < epochs for (e, a), (f, b) in zip(found, found[1:]))


@pytest.mark.parametrize("stages", [(), (Stage(1, ("a",)),), (Stage(0, ("a",)), Stage(0, ("b",))), (Stage(0, ()),)])
def test_impossible_schedules_are_refused(stages):
    with pytest.raises(ConfigurationError):
        Schedule(stages)


def test_constant_is_one_stage():
    assert constant(["a", "b"]).stage(99).trainable == ("a", "b")
