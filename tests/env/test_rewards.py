from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.data.synthetic.road import HALF_WIDTH, LANE_OFFSET
from driving_sim.engine.errors import DriveSimError
from driving_sim.env import DriveEnv, KeepLane, Moment, ProgressWithoutSurprise, never
from driving_sim.env.gauges import Gauges
from driving_sim.env.lane_probe import PROBE_FILE, LaneProbe, _Network
from driving_sim.env.rewards import end_of
from driving_sim.env.starts import find_starts
from driving_sim.world_model import WorldModel
from driving_sim.world_model.actions import CHANNELS
from driving_sim.world_model.training.bits import streamed_token_bits
from tests.fixtures.token_drives import FPS


class KnownGauges(Gauges):
    """Gauges that read the offset off the first pixel, in dm, and know the usual surprise."""

    usual_surprise_nats = 2.0

    class _Probe:
        def read(self, frames: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return (frames[:, 0, 0, 0] - 100.0) / 10, np.zeros(len(frames))

    lane_probe: Any = _Probe()


def moment(world: WorldModel, count: int, **values: Any) -> Moment:
    facts = {
        "frames": np.full((count, 2, 2, 3), 100, np.uint8),
        "tokens": np.zeros((count, 2, 2), np.int64),
        "actions": np.zeros((count, len(CHANNELS))),
        "speed_mps": np.full(count, 8.0),
        "steering": np.zeros(count),
        "surprise_nats": np.full(count, 2.0),
        "recent_surprise_nats": np.full(count, 2.0),
        "entropy_nats": np.full(count, 2.0),
        "time_s": np.full(count, 5.0),
        "step_s": 0.1,
        "contexts": ("a",) * count,
        "gauges": KnownGauges(world, []),
    }
    return Moment(**facts | values)  # type: ignore[arg-type]


def test_progress_is_paid_and_surprise_costs(world: WorldModel) -> None:
    reward = ProgressWithoutSurprise(weight=2.0, tolerance_nats=0.5, limit_nats=1.0)
    surprise = np.array([1.0, 2.4, 3.0])
    assert reward(moment(world, 3, surprise_nats=surprise)) == pytest.approx([0.8, 0.8, 0.8 - 1.0])
    recent = np.array([2.0, 3.1, 9.0, 9.0])
    time_s = np.array([5.0, 5.0, 0.9, 1.0])
    ends = reward.end(moment(world, 4, recent_surprise_nats=recent, time_s=time_s))
    assert ends.tolist() == [False, True, False, True]


def test_the_lane_is_paid_and_leaving_the_road_ends(world: WorldModel) -> None:
    reward = KeepLane(half_width_m=2.0)
    frames = np.full((5, 2, 2, 3), 100, np.uint8)
    frames[:, 0, 0, 0] = [100, 110, 80, 70, 160]  # 0, 1, -2, -3 and 6 m left of the lane's middle
    now = moment(world, 5, frames=frames)
    assert reward(now) == pytest.approx([0.8, 0.8 * 0.75, 0, 0, 0])
    assert reward.end(now).tolist() == [False, False, True, True, True]
    assert now.lane_heading_rad.tolist() == [0] * 5


def test_the_edges_are_those_of_the_synthetic_road() -> None:
    lane = KeepLane()
    assert lane.left_edge_m + LANE_OFFSET == HALF_WIDTH
    assert -lane.right_edge_m + LANE_OFFSET == -HALF_WIDTH


def test_an_end_belongs_to_a_reward(world: WorldModel) -> None:
    lane = KeepLane()
    assert end_of(lane) == lane.end
    assert end_of(lambda moment: moment.speed_mps) is never
    assert never(moment(world, 3)).tolist() == [False] * 3


def test_without_speed_there_is_no_progress(world: WorldModel) -> None:
    for reward in (ProgressWithoutSurprise(), KeepLane()):
        with pytest.raises(DriveSimError, match="trained without speed, so there is no distance"):
            reward(moment(world, 1, speed_mps=np.full(1, np.nan)))


def test_the_usual_surprise_is_that_of_the_contexts(world: WorldModel) -> None:
    starts, first = find_starts(world, None), world.context_frames - 1
    surprise = Gauges(world, starts).usual_surprise_nats
    costs = []
    for start in starts:
        tokens = start.tokens.numpy()
        bits = streamed_token_bits(
            world.transformer,
            tokens,
            np.pad(start.actions, ((0, 1), (0, 0)))[None],
            np.pad(start.valid, ((0, 1), (0, 0)))[None],
        )
        costs += [float(frame.bits.mean()) for frame in bits][first:]
    assert len(costs) == len(starts) * (starts[0].frames - first)
    assert surprise == pytest.approx(np.mean(costs) * np.log(2))


def test_a_model_without_a_lane_probe_says_so(world: WorldModel, run: Path) -> None:
    env = DriveEnv(world, reward=KeepLane())
    env.reset(seed=0)
    with pytest.raises(DriveSimError, match=rf"has no lane probe \({PROBE_FILE}\)") as error:
        env.step([0.0, 0.0])
    assert "\n" not in str(error.value)
    LaneProbe(_Network()).save(run / PROBE_FILE)
    try:
        env = DriveEnv(world, reward=KeepLane(), end=never)
        env.reset(seed=0)
        _, reward, *_ = env.step([0.0, 0.0])
        assert 0 < reward <= 11 / FPS
    finally:
        (run / PROBE_FILE).unlink()
