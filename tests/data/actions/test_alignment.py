from itertools import pairwise

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from driving_sim.data.actions.action_log import ActionLog, Channel
from driving_sim.data.actions.alignment import align, check_coverage
from driving_sim.engine.errors import DriveSimError


def make_log(
    times: npt.NDArray[np.float64], speed: npt.NDArray[np.float64], *, steering: bool = True
) -> ActionLog:
    values = np.stack([speed, -speed], axis=1)
    return ActionLog.on_one_clock(times, values, "road_wheel" if steering else None)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1))
def test_an_action_is_the_mean_of_the_interpolated_log(seed: int) -> None:
    random = np.random.default_rng(seed)
    log = make_log(np.cumsum(random.uniform(0.005, 0.2, 80)) - 0.1, random.uniform(-20, 20, 80))
    frames = np.cumsum(random.uniform(0.02, 0.3, 15))
    assert log.speed is not None
    frames = frames[frames < log.speed.times[-1] - 0.5]
    actions, valid = align(log, frames)
    fine = [np.linspace(a, b, 20001) for a, b in pairwise(frames)]
    expected = [np.interp(at, log.speed.times, log.speed.values).mean() for at in fine]
    np.testing.assert_allclose(actions[:-1, 0], expected, atol=2e-3)
    np.testing.assert_allclose(actions[:, 1], -actions[:, 0])
    assert valid[:-1].all()


def test_a_constant_log_gives_that_constant_far_from_zero_time() -> None:
    times = 1.7e9 + np.arange(100) / 50
    actions, valid = align(make_log(times, np.full(100, 13.5)), 1.7e9 + np.arange(10) / 10)
    np.testing.assert_allclose(actions[:, 0], 13.5, rtol=1e-6)
    assert valid.all()


def test_coarser_frames_average_the_finer_actions() -> None:
    random = np.random.default_rng(0)
    log = make_log(np.arange(200) / 20, random.uniform(0, 20, 200))
    frames = np.arange(80) / 10
    fine, coarse = align(log, frames)[0], align(log, frames[::4])[0]
    np.testing.assert_allclose(coarse, fine.reshape(-1, 4, 2).mean(axis=1), atol=1e-5)


def test_the_ends_hold_for_a_tenth_of_a_second_only() -> None:
    log = make_log(np.arange(1.0, 2.01, 0.1), np.linspace(1, 2, 11))
    frames = np.arange(0.81, 2.3, 0.1)
    actions, valid = align(log, frames)
    # Frame 0.81 is 0.19 s before the log. The interval of frame 2.01 ends 0.11 s after the log.
    assert valid[:, 0].tolist() == [False] + [True] * 11 + [False] * 3
    assert actions[1, 0] == pytest.approx(1.0, abs=1e-3)
    assert (actions[~valid] == 0).all()


def test_an_interval_that_touches_a_gap_is_invalid() -> None:
    times = np.array([0, 0.1, 0.2, 0.3, 0.7, 0.8, 0.9, 1.0])
    _, valid = align(make_log(times, np.ones(8)), np.arange(10) / 10)
    assert valid[:, 0].tolist() == [True] * 3 + [False] * 4 + [True] * 3


def test_samples_a_quarter_of_a_second_apart_are_no_gap() -> None:
    times = np.arange(9) / 4
    assert align(make_log(times, np.ones(9)), np.arange(20) / 10)[1].all()


def test_a_slow_channel_has_longer_gaps_but_none_over_a_second_and_a_half() -> None:
    frames = np.arange(100) / 10
    times = np.delete(np.arange(10.0), [4, 5])
    _, valid = align(make_log(times, np.ones(8)), frames)
    assert frames[~valid[:, 0]].min() == pytest.approx(3.0)
    assert frames[~valid[:, 0] & (frames < 8)].max() == pytest.approx(5.9)
    assert not align(make_log(2 * np.arange(6.0), np.ones(6)), frames)[1][1:-1].any()


def test_each_channel_has_its_own_gaps() -> None:
    fast, slow = np.arange(50) / 10, np.arange(5.0)
    log = ActionLog(
        speed=Channel(times=slow, values=slow.astype(np.float32)),
        steering=Channel(times=np.delete(fast, [20, 21, 22]), values=np.ones(47, np.float32)),
        steering_kind="road_wheel",
    )
    actions, valid = align(log, fast[:40])
    assert valid[:, 0].all()
    np.testing.assert_allclose(actions[:, 0], fast[:40] + 0.05, atol=1e-6)
    assert np.flatnonzero(~valid[:, 1]).tolist() == [19, 20, 21, 22]


def test_a_channel_that_is_missing_is_invalid_everywhere() -> None:
    log = make_log(np.arange(20) / 10, np.ones(20), steering=False)
    _, valid = align(log, np.arange(10) / 10)
    assert valid.all(axis=0).tolist() == [True, False]
    assert not valid[:, 1].any()
    assert not align(None, np.arange(10) / 10)[1].any()


def test_a_log_that_does_not_fit_the_video_is_an_error() -> None:
    frames = np.arange(100) / 10
    log = make_log(1.7e9 + np.arange(100) / 10, np.ones(100))
    with pytest.raises(DriveSimError, match="`time_offset`") as raised:
        check_coverage(log, frames)
    assert "such as -1700000000.00" in str(raised.value)
    with pytest.raises(DriveSimError, match=r"100 s apart.*timestamp_ms"):
        check_coverage(make_log(np.linspace(0, 9900, 100), np.ones(100)), frames)
    with pytest.raises(DriveSimError, match="covers 30% of the video's frames"):
        check_coverage(make_log(np.arange(30) / 10, np.ones(30)), frames)
    assert check_coverage(make_log(np.arange(60) / 10, np.ones(60)), frames) == []


def test_a_channel_that_is_hardly_known_is_named() -> None:
    fast, slow = np.arange(100) / 10, np.arange(0, 10, 2.0)
    log = ActionLog(
        speed=Channel(times=fast, values=np.ones(100, np.float32)),
        steering=Channel(times=slow, values=np.ones(5, np.float32)),
        steering_kind="road_wheel",
    )
    (line,) = check_coverage(log, fast)
    assert line.startswith("steering is known in only ")
