"""How the soak evaluates samples of memory."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))
import soak

STEPS = 20
# One step per second.
TIMES = [float(second) for second in range(1, STEPS + 1)]


def samples(held):
    """One sample per second of a process that holds `held(second)` MiB."""
    return [(second + 0.5, {"worker 7": held(second) * soak.MIB}) for second in range(STEPS + 5)]


def test_there_is_a_median_for_each_tenth_of_the_run_after_the_warm_up():
    medians = soak.windows(samples(lambda second: second), TIMES, STEPS)
    assert medians == {"worker 7": [4.5, 6.5, 8.5, 10.5, 12.5, 14.5, 16.5, 18.5]}


def test_a_process_that_ended_before_training_is_left_out():
    assert soak.windows([(0.5, {"probe 3": 1})], TIMES, STEPS) == {}


@pytest.mark.parametrize(
    ("medians", "drift", "flat"),
    [
        ([100, 104, None, 96], 0.04, True),
        ([100, 106, 100], 0.06, False),
        ([None, 100, 94], 0.06, False),
        ([19, 20.5, 19], 1.5 / 19, True),
        ([19, 21.5, 19], 2.5 / 19, False),
    ],
)
def test_flat_is_within_five_percent_or_two_mebibytes(medians, drift, flat):
    assert soak.drift(medians) == pytest.approx(drift)
    assert soak.is_flat(medians) == flat
