import numpy as np
import pytest

from driving_sim.evaluate.report.intervals import (
    block_frames,
    bootstrap,
    interval,
    mean_of_sums,
    unit_sums,
)


def width(found: dict[str, float | None]) -> float:
    assert found["low"] is not None
    assert found["high"] is not None
    return found["high"] - found["low"]


def test_interval_holds_the_mean_and_shrinks_with_data() -> None:
    rng = np.random.default_rng(0)
    few, many = (interval(rng.normal(1.0, 1.0, n)) for n in (20, 2000))
    for found in (few, many):
        assert found["low"] < found["mean"] < found["high"]  # type: ignore[operator]
    assert width(many) < width(few) / 3


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [interval(rng.normal(3.0, 1.0, 60)) for _ in range(100)]
    held = np.mean([(each["low"] or 0) < 3.0 < (each["high"] or 0) for each in found])
    assert held == pytest.approx(0.95, abs=0.05)


def test_of_nothing_there_is_no_mean_and_of_one_unit_no_interval() -> None:
    assert interval([2.0]) == {"mean": 2.0, "low": None, "high": None}
    nothing = {"mean": None, "low": None, "high": None}
    assert bootstrap([[0.0, 0.0], [0.0, 0.0]], mean_of_sums) == nothing


def test_a_mean_of_sums_is_weighted_by_their_counts() -> None:
    """A block of one frame counts a hundredth of one of a hundred: it moves the interval as little
    as the mean."""
    blocks = np.array([[100.0 * level, 100.0] for level in (1.0, 2.0, 3.0, 2.0)] + [[50.0, 1.0]])
    found = bootstrap(blocks, mean_of_sums)
    assert found["mean"] == pytest.approx((800 + 50) / 401)
    assert found["high"] is not None
    assert found["high"] < 4


def test_units_without_data_make_no_interval_wider_or_narrower() -> None:
    sums = np.random.default_rng(0).normal(np.array([5, 100]), 1, (8, 2))
    assert bootstrap(np.concatenate([sums, np.zeros((50, 2))]), mean_of_sums) == bootstrap(
        sums, mean_of_sums
    )
    alone = bootstrap([[3.0, 2.0], [0.0, 0.0]], mean_of_sums)
    assert alone == {"mean": 1.5, "low": None, "high": None}


def test_what_belongs_to_one_unit_is_resampled_together() -> None:
    """Copies under the label of their original tell nothing new; under labels of their own they
    would halve the interval."""
    values = np.random.default_rng(0).normal(size=(30, 1))
    pairs = np.concatenate([values, np.ones_like(values)], axis=1)
    copies, labels = np.tile(pairs, (4, 1)), np.tile(np.arange(30), 4)
    once = bootstrap(pairs, mean_of_sums)
    assert width(bootstrap(unit_sums(labels, copies), mean_of_sums)) == pytest.approx(width(once))
    assert width(bootstrap(copies, mean_of_sums)) < 0.7 * width(once)


def test_unit_sums() -> None:
    found = unit_sums(["b", "a", "b"], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert found.tolist() == [[3.0, 4.0], [6.0, 8.0]]


def test_a_block_is_three_seconds_or_the_window() -> None:
    assert block_frames(14) == 42
    assert block_frames(10, window=16) == 30
    assert block_frames(5, window=16) == 16
