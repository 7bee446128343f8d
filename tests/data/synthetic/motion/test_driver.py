from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.data.synthetic.drives import SyntheticDrive, drive
from driving_sim.data.synthetic.motion.vehicle import WHEELBASE_M
from driving_sim.data.synthetic.road import HALF_WIDTH
from driving_sim.data.synthetic.world import SyntheticWorld
from tests.fixtures.synthetic_worlds import TINY, curvature


@pytest.fixture(scope="module")
def many_drives() -> list[SyntheticDrive]:
    """Return twenty minutes of driving; no frames are rendered."""
    return [drive(SyntheticWorld(seed, TINY), 60.0, seed) for seed in range(20)]


class TestDriver:
    """The drives contain what a model must see to learn the effect of actions."""

    @staticmethod
    def places(drives: list[SyntheticDrive]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return offset from the road's centre and heading relative to the road at every frame."""
        offsets, headings = [], []
        for driven in drives:
            x = np.array([state.x_m for state in driven.states])
            y = np.array([state.y_m for state in driven.states])
            _, offset, slope = driven.world.road.project(x, y)
            offsets.append(offset)
            headings.append(np.array([s.heading_rad for s in driven.states]) - np.arctan(slope))
        return np.concatenate(offsets), np.concatenate(headings)

    @staticmethod
    def departures(offset: NDArray[np.float64]) -> int:
        """Count how often a drive leaves the asphalt on the side of positive offsets."""
        return int(((offset[:-1] <= HALF_WIDTH) & (offset[1:] > HALF_WIDTH)).sum())

    def test_left_and_right_are_balanced(self, many_drives: list[SyntheticDrive]) -> None:
        steering = np.concatenate([driven.actions[:, 1] for driven in many_drives])
        assert abs(steering.mean()) < 0.1 * steering.std()
        for strong in (0.05, 0.1):
            left, right = (steering > strong).mean(), (steering < -strong).mean()
            assert 0.75 < left / right < 1.33
        # Every excursion steers to both sides, so also count the excursions on each side.
        out_left, out_right = (
            sum(self.departures(sign * self.places([driven])[0]) for driven in many_drives)
            for sign in (1, -1)
        )
        assert min(out_left, out_right) > 1.5 * len(many_drives)
        assert 0.6 < out_left / out_right < 1.6
        assert (np.abs(steering) > 0.1).mean() > 0.08
        assert 0.1 < np.quantile(np.abs(steering), 0.95) < 0.2

    def test_it_steers_hard_to_both_sides_at_speed(self, many_drives: list[SyntheticDrive]) -> None:
        actions = np.concatenate([driven.actions for driven in many_drives])
        lateral = actions[:, 0] ** 2 * np.tan(actions[:, 1]) / WHEELBASE_M
        assert (lateral > 3.0).mean() > 0.02
        assert (lateral < -3.0).mean() > 0.02
        assert np.abs(lateral).max() < 7

    def test_it_stops_brakes_and_starts(self, many_drives: list[SyntheticDrive]) -> None:
        for driven in many_drives:
            speed = driven.actions[:, 0]
            assert speed.min() >= 0
            change = np.diff(speed) * TINY.fps
            assert change.min() > -6
            assert change.max() < 3
        speed = np.concatenate([driven.actions[:, 0] for driven in many_drives])
        change = np.diff(speed) * TINY.fps
        assert 0.02 < (speed < 0.1).mean() < 0.15
        assert (change < -3).mean() > 0.04
        assert (change > 1).mean() > 0.15
        starts = (speed[:-1] == 0) & (speed[1:] > 0)
        assert starts.sum() > len(many_drives)
        assert 6 < np.median(speed) < 11

    def test_it_drives_everywhere_on_the_road_and_leaves_it_to_both_sides(
        self, many_drives: list[SyntheticDrive]
    ) -> None:
        offset, heading = self.places(many_drives)
        on_road = np.abs(offset) < HALF_WIDTH
        assert 0.55 < on_road.mean() < 0.85
        right, left = (on_road & (offset < 0)).mean(), (on_road & (offset > 0)).mean()
        assert right > left > 0.12
        assert (offset > 6).mean() > 0.03
        assert (offset < -6).mean() > 0.03
        assert (np.abs(offset) > 50).mean() < 0.01
        for side in (heading, -heading):
            assert (side > 0.4).mean() > 0.03

    def test_the_road_does_not_predict_the_steering(
        self, many_drives: list[SyntheticDrive]
    ) -> None:
        steering, follows = [], []
        for driven in many_drives:
            x = np.array([state.x_m for state in driven.states])
            y = np.array([state.y_m for state in driven.states])
            station, offset, _ = driven.world.road.project(x, y)
            near = np.abs(offset) < HALF_WIDTH
            steering.append(driven.actions[near, 1])
            follows.append(np.arctan(WHEELBASE_M * curvature(driven.world.road, station[near])))
        correlation = np.corrcoef(np.concatenate(steering), np.concatenate(follows))[0, 1]
        assert 0 < correlation < 0.6

    def test_settings_decide_how_hard_drivers_steer_and_how_long_they_stand(self) -> None:
        wild = replace(
            TINY,
            cruise_mps=(10.0, 18.0),
            stops_s=(4.0, 6.0),
            swerves_rad=(0.18, 0.2),
            lateral_mps2=25.0,
        )
        stood_s: list[float] = []
        fast_turns = 0
        for seed in range(6):
            speed, steering = drive(SyntheticWorld(seed, wild), 60.0, seed).actions.T
            fast_turns += int(((speed > 14) & (np.abs(steering) > 0.17)).sum())
            edges = np.flatnonzero(np.diff(speed == 0, prepend=True, append=True))
            # Drives begin and end with `True`, so the edges are those of the stretches of driving.
            stood_s += ((edges[2::2] - edges[1:-1:2]) / wild.fps).tolist()
        assert fast_turns > 50
        assert stood_s
        assert min(stood_s) > 3.5
        assert max(stood_s) < 6.5
