import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.evaluate.actions.following import (
    balanced_sign_accuracy,
    follow,
    monotonicity,
)

Values = NDArray[np.float64]
Estimate = dict[str, float | None]
CURVE = 0.3


def mean(estimate: Estimate | None) -> float | None:
    return None if estimate is None else estimate["mean"]


def width(estimate: Estimate | None) -> float:
    assert estimate is not None
    assert estimate["low"] is not None
    assert estimate["high"] is not None
    return estimate["high"] - estimate["low"]


def commands(clips: int = 6, frames: int = 30, seed: int = 0) -> Values:
    """Return smooth commands [C, N] to both sides, of about 1 at most."""
    noise = np.random.default_rng(seed).normal(size=(clips, frames + 4))
    summed: Values = np.sum([noise[:, shift : frames + shift] for shift in range(5)], axis=0)
    return summed / 3


def late(commanded: Values, frames: int) -> Values:
    """Delay the commands by `frames` (negative: advance them), and fill the gap with noise."""
    delayed = np.random.default_rng(9).normal(size=commanded.shape)
    moved = np.roll(commanded, frames, axis=1)
    kept = slice(frames, None) if frames >= 0 else slice(None, frames)
    delayed[:, kept] = moved[:, kept]
    return delayed


def test_obedience_is_perfect() -> None:
    metrics = follow(commands(), commands(), sign_threshold=CURVE)
    assert metrics["transitions"] == 180
    assert metrics["correlation"] == pytest.approx({"mean": 1, "low": 1, "high": 1})
    assert metrics["gain"] == pytest.approx(1)
    assert metrics["mean_absolute_error"] == 0
    assert metrics["delay_frames"] == 0
    assert metrics["sign_accuracy"] == {"mean": 1, "low": 1, "high": 1}


def test_a_planted_sign_flip_is_found() -> None:
    metrics = follow(commands(), -commands(), sign_threshold=CURVE)
    assert mean(metrics["correlation"]) == pytest.approx(-1)
    assert metrics["gain"] == pytest.approx(-1)
    assert mean(metrics["sign_accuracy"]) == 0


@pytest.mark.parametrize("lag", [-5, -3, -1, 0, 1, 2, 5])
def test_a_planted_lag_is_found_exactly(lag: int) -> None:
    noisy = late(commands(), lag) + np.random.default_rng(1).normal(scale=0.1, size=(6, 30))
    assert follow(commands(), noisy)["delay_frames"] == lag
    # A constant offset of a clip does not change its delay.
    offset = 20 * np.arange(6.0)[:, None]
    assert follow(commands() + offset, 0.5 * noisy - offset)["delay_frames"] == lag


def test_half_obedience_is_a_gain_of_a_half_whatever_the_offset() -> None:
    metrics = follow(commands(), 0.5 * commands() + 7)
    assert metrics["gain"] == pytest.approx(0.5)
    assert mean(metrics["correlation"]) == pytest.approx(1)
    assert metrics["mean_absolute_error"] == pytest.approx(np.abs(7 - 0.5 * commands()).mean())


def test_numbers_agree_with_numpy() -> None:
    x, y = commands(), commands() + np.random.default_rng(1).normal(size=(6, 30))
    metrics = follow(x, y)
    assert mean(metrics["correlation"]) == pytest.approx(np.corrcoef(x.ravel(), y.ravel())[0, 1])
    assert metrics["gain"] == pytest.approx(np.polyfit(x.ravel(), y.ravel(), 1)[0])
    assert metrics["mean_absolute_error"] == pytest.approx(np.abs(x - y).mean())
    ends = metrics["gain_interval"]
    assert ends["low"] < metrics["gain"] < ends["high"] < ends["low"] + 1
    assert follow(x[:1], y[:1])["gain_interval"] == {"low": None, "high": None}


def test_always_turning_right_scores_a_half_on_a_drive_that_turns_right() -> None:
    commanded = commands() - 0.5
    rights = (commanded < -CURVE).sum()
    assert rights > 2 * (commanded > CURVE).sum() > 0
    assert balanced_sign_accuracy(commanded, np.full_like(commanded, -1.0), CURVE) == 0.5
    assert balanced_sign_accuracy(commanded, np.zeros_like(commanded), CURVE) == 0
    always_right = follow(commanded, -np.ones_like(commanded), sign_threshold=CURVE)
    assert mean(always_right["sign_accuracy"]) == 0.5


def test_both_sides_count_equally_and_straights_do_not_count() -> None:
    commanded = np.array([1.0, 1.0, 1.0, 1.0, -1.0, 0.1, -0.1])
    realised = np.array([1.0, -1.0, -1.0, -1.0, -1.0, -1.0, 1.0])
    assert balanced_sign_accuracy(commanded, realised, CURVE) == (1 / 4 + 1) / 2
    assert balanced_sign_accuracy(commanded[:4], realised[:4], CURVE) is None
    assert balanced_sign_accuracy(-commanded, -realised, CURVE) == (1 / 4 + 1) / 2


@pytest.mark.parametrize("level", [0.0, 0.1, 13.3])
def test_what_does_not_vary_has_no_correlation(level: float) -> None:
    constant = np.full((6, 30), level, np.float32)
    ignoring = follow(commands(), constant)
    assert ignoring["correlation"] is None
    assert ignoring["delay_frames"] is None
    assert ignoring["gain"] == pytest.approx(0)
    holding = follow(constant, commands())
    assert holding["correlation"] is None
    assert holding["gain"] is None
    assert holding["delay_frames"] is None
    levels = np.repeat(level + np.arange(6.0)[:, None], 30, axis=1)
    assert follow(levels, levels)["delay_frames"] is None
    assert mean(follow(levels, levels)["correlation"]) == pytest.approx(1)


def test_unknown_values_are_ignored() -> None:
    x, y = commands(), 0.5 * late(commands(), 2)
    x[0, :4], y[1, 5:9], x[2] = np.nan, np.nan, np.nan
    metrics = follow(x, y, sign_threshold=CURVE)
    known = ~np.isnan(x + y)
    assert metrics["transitions"] == known.sum() == 180 - 4 - 4 - 30
    assert mean(metrics["correlation"]) == pytest.approx(np.corrcoef(x[known], y[known])[0, 1])
    assert metrics["mean_absolute_error"] == pytest.approx(np.abs(x - y)[known].mean())
    assert metrics["delay_frames"] == 2
    assert mean(metrics["sign_accuracy"]) == balanced_sign_accuracy(x[known], y[known], CURVE)
    nothing = follow(np.full((3, 9), np.nan), np.ones((3, 9)), sign_threshold=CURVE)
    assert nothing["transitions"] == 0
    assert nothing["correlation"] is None
    assert nothing["mean_absolute_error"] is None
    assert nothing["sign_accuracy"] is None


def test_intervals_cover_the_truth_and_narrow_with_clips() -> None:
    noise = 0.7
    widths = []
    for clips in (8, 128):
        x = np.random.default_rng(0).normal(size=(clips, 20))
        y = x + np.random.default_rng(1).normal(scale=noise, size=x.shape)
        metrics = follow(x, y, sign_threshold=CURVE)
        for estimate in (metrics["correlation"], metrics["sign_accuracy"]):
            assert estimate is not None
            assert estimate["low"] < estimate["mean"] < estimate["high"]
        assert metrics["correlation"] is not None
        low, high = metrics["correlation"]["low"], metrics["correlation"]["high"]
        assert low < 1 / np.hypot(1, noise) < high
        widths.append(width(metrics["correlation"]))
    assert widths[1] < widths[0] / 2
    single = follow(x[:1], y[:1])["correlation"]
    assert single is not None
    assert single["mean"] is not None
    assert single["low"] is single["high"] is None
    assert follow(x, y) == follow(x, y)


def test_clips_are_resampled_whole() -> None:
    """Repeating every transition 20 times within its clip must not narrow the interval."""
    x = np.random.default_rng(0).normal(size=(8, 10))
    y = x + np.random.default_rng(1).normal(size=x.shape)
    once, often = (follow(np.repeat(x, n, axis=1), np.repeat(y, n, axis=1)) for n in (1, 20))
    assert often["correlation"] == pytest.approx(once["correlation"])


def test_a_clip_and_its_mirror_image_are_one_piece_of_evidence() -> None:
    rng = np.random.default_rng(0)
    x, noise = rng.normal(size=(2, 12, 20))
    y = x + rng.normal(size=(12, 1)) * noise
    pair = np.concatenate([x, -x]), np.concatenate([y, -y])
    as_one = follow(*pair, units=np.tile(np.arange(12), 2), sign_threshold=CURVE)
    as_two = follow(*pair, sign_threshold=CURVE)
    assert mean(as_one["correlation"]) == pytest.approx(mean(as_two["correlation"]))
    assert width(as_two["correlation"]) < 0.85 * width(as_one["correlation"])
    assert width(as_two["sign_accuracy"]) < 0.95 * width(as_one["sign_accuracy"])
    lone = follow(*pair, units=np.zeros(24), sign_threshold=CURVE)
    assert lone["correlation"] is not None
    assert lone["correlation"]["low"] is None


def test_monotonicity() -> None:
    levels = np.array([0.2, -0.2, 0.0, 0.1, -0.1])
    rising = monotonicity(levels, levels**3)
    assert rising["rank_correlation"] == pytest.approx(1)
    assert rising["in_order"] == 1
    falling = monotonicity(levels, -levels)
    assert falling["rank_correlation"] == pytest.approx(-1)
    assert falling["in_order"] == 0
    one_wrong = monotonicity(np.arange(5.0), np.array([0.0, 2.0, 1.0, 3.0, 4.0]))
    assert one_wrong["rank_correlation"] == pytest.approx(0.9)
    assert one_wrong["in_order"] == 3 / 4
    flat = monotonicity(levels, np.ones(5))
    assert flat["rank_correlation"] is None
    assert flat["in_order"] == 0
    ties = monotonicity(np.array([0.0, 0.0, 1.0]), np.array([5.0, 4.0, 6.0]))
    assert ties["rank_correlation"] == pytest.approx(3**0.5 / 2)
    assert ties["in_order"] == 1
    holes = monotonicity(np.array([0.0, 1.0, np.nan, 3.0]), np.array([0.0, np.nan, 9.0, 3.0]))
    assert holes["rank_correlation"] == pytest.approx(1)
    assert holes["in_order"] == 1
    single = monotonicity(np.ones(1), np.ones(1))
    assert single["rank_correlation"] is single["in_order"] is None


def test_short_futures_are_tested_only_for_delays_that_fit() -> None:
    assert follow(commands(frames=4), late(commands(frames=4), 1))["delay_frames"] == 1
    assert follow(commands(frames=1), commands(frames=1))["delay_frames"] is None
