import numpy as np
import pytest

from driving_sim.evaluate.intervals import interval


def test_interval_holds_the_mean_and_shrinks_with_data() -> None:
    rng = np.random.default_rng(0)
    few, many = (interval(rng.normal(1.0, 1.0, n)) for n in (20, 2000))
    for found in (few, many):
        assert found["low"] < found["mean"] < found["high"]
    assert many["high"] - many["low"] < (few["high"] - few["low"]) / 3


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    found = [interval(rng.normal(3.0, 1.0, 60)) for _ in range(200)]
    held = np.mean([each["low"] < 3.0 < each["high"] for each in found])
    assert held == pytest.approx(0.95, abs=0.05)


def test_of_nothing_there_is_no_mean() -> None:
    with pytest.raises(ValueError, match="no values"):
        interval([])
    assert interval([2.0]) == {"mean": 2.0, "low": 2.0, "high": 2.0}
