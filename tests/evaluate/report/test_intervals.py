import numpy as np
import pytest

from driving_sim.evaluate.report.intervals import (
    block_frames,
    bootstrap,
    interval,
    mean_of_sums,
    unit_sums,
)


def width(estimate: dict[str, float | None]) -> float:
    assert estimate["low"] is not None
    assert estimate["high"] is not None
    return estimate["high"] - estimate["low"]


def test_an_interval_contains_the_mean_and_shrinks_with_more_data() -> None:
    rng = np.random.default_rng(0)
    few, many = (interval(rng.normal(1.0, 1.0, n)) for n in (20, 2000))
    for estimate in (few, many):
        assert estimate["low"] < estimate["mean"] < estimate["high"]  # type: ignore[operator]
    assert width(many) < width(few) / 3


def test_a_95_percent_interval_contains_the_truth_in_95_percent_of_trials() -> None:
    rng = np.random.default_rng(1)
    trials = [interval(rng.normal(3.0, 1.0, 60)) for _ in range(100)]
    contains = np.mean([(trial["low"] or 0) < 3.0 < (trial["high"] or 0) for trial in trials])
    assert contains == pytest.approx(0.95, abs=0.05)


def test_no_data_has_no_mean_and_one_unit_has_no_interval() -> None:
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None}
    nothing = {"mean": None, "low": None, "high": None}
    assert bootstrap([[0.0, 0.0], [0.0, 0.0]], mean_of_sums) == nothing


def test_a_mean_of_sums_is_weighted_by_their_counts() -> None:
    """A block with 1 frame weighs 1/100 of a block with 100 frames, also in the interval."""
    blocks = np.array([[100.0 * level, 100.0] for level in (1.0, 2.0, 3.0, 2.0)] + [[50.0, 1.0]])
    estimate = bootstrap(blocks, mean_of_sums)
    assert estimate["mean"] == pytest.approx((800 + 50) / 401)
    assert estimate["high"] is not None
    assert estimate["high"] < 4


def test_units_without_data_do_not_change_an_interval() -> None:
    sums = np.random.default_rng(0).normal(np.array([5, 100]), 1, (8, 2))
    assert bootstrap(np.concatenate([sums, np.zeros((50, 2))]), mean_of_sums) == bootstrap(
        sums, mean_of_sums
    )
    alone = bootstrap([[3.0, 2.0], [0.0, 0.0]], mean_of_sums)
    assert alone == {"mean": 1.5, "low": None, "high": None}


def test_values_of_one_unit_are_resampled_together() -> None:
    """Copies with the label of their original leave the interval as wide as before.

    With new labels they would wrongly halve it.
    """
    values = np.random.default_rng(0).normal(size=(30, 1))
    pairs = np.concatenate([values, np.ones_like(values)], axis=1)
    copies, labels = np.tile(pairs, (4, 1)), np.tile(np.arange(30), 4)
    once = bootstrap(pairs, mean_of_sums)
    assert width(bootstrap(unit_sums(labels, copies), mean_of_sums)) == pytest.approx(width(once))
    assert width(bootstrap(copies, mean_of_sums)) < 0.7 * width(once)


def test_unit_sums() -> None:
    sums = unit_sums(["b", "a", "b"], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert sums.tolist() == [[3.0, 4.0], [6.0, 8.0]]


def test_a_block_lasts_three_seconds_or_a_longer_window() -> None:
    assert block_frames(14) == 42
    assert block_frames(10, window=16) == 30
    assert block_frames(5, window=16) == 16
