import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic import (
    SyntheticConfig,
    SyntheticDrive,
    SyntheticWorld,
    VehicleState,
    drive,
    frame_count,
    load_synthetic_drive,
    write_synthetic_drives,
)
from driving_sim.data.synthetic.drawing.camera import Camera, View
from driving_sim.data.synthetic.drawing.ground import DASH_M, DASH_PERIOD_M
from driving_sim.data.synthetic.drawing.palette import PALETTES
from driving_sim.data.synthetic.drawing.shapes import Canvas, rgb
from driving_sim.data.synthetic.hashing import uniform
from driving_sim.data.synthetic.motion.traffic import Traffic
from driving_sim.data.synthetic.motion.vehicle import MAX_STEERING_RAD, WHEELBASE_M, step_vehicle
from driving_sim.data.synthetic.road import HALF_WIDTH, LANE_OFFSET, Road
from driving_sim.data.synthetic.scenery import VISIBLE_M, Scenery
from driving_sim.engine.errors import DriveSimError

SMALL = SyntheticConfig(height=48, width=96)
TINY = SyntheticConfig(height=16, width=32)


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return float(10 * np.log10(255**2 / error))


def curvature(road: Road, station: NDArray[np.floating[Any]]) -> NDArray[np.floating[Any]]:
    """The road's turn per metre (left positive) at stations."""
    before, after = (road.place(station + step, np.zeros_like(station)) for step in (-0.5, 0.5))
    length = np.hypot(after[0] - before[0], after[1] - before[1])
    return np.asarray((after[2] - before[2]) / length)


def four_futures(world: SyntheticWorld, seconds: float) -> dict[str, NDArray[np.uint8]]:
    """The true futures from 10 m/s in the lane, frames [N, H, W, 3] by name of the action."""
    time = (np.arange(round(seconds * world.config.fps)) + 0.5) / world.config.fps
    actions = {
        "straight": (np.full_like(time, 10.0), 0.0),
        "left": (np.full_like(time, 10.0), 0.12),
        "right": (np.full_like(time, 10.0), -0.12),
        "brake": (np.maximum(10.0 - 4.0 * time, 0.0), 0.0),
    }
    start = world.reset(200.0)
    return {
        name: world.replay(
            start, np.stack([speed, np.full_like(time, steering)], 1).astype(np.float32)
        )[0]
        for name, (speed, steering) in actions.items()
    }


class TestHashing:
    def test_a_place_has_one_number_however_it_is_asked_for(self) -> None:
        cells = np.arange(-50, 50)
        whole = uniform(7, cells[:, None], cells[None, :])
        assert whole[3, 90] == uniform(7, -47, 40)[0]
        assert len(np.unique(whole)) == whole.size
        assert not np.isin(uniform(8, cells[:, None], cells[None, :]), whole).any()

    def test_the_numbers_are_uniform(self) -> None:
        counts, _ = np.histogram(uniform(1, np.arange(20_000)), bins=10, range=(0, 1))
        assert abs(counts - 2000).max() < 5 * math.sqrt(2000)


class TestRoad:
    def test_project_undoes_place(self) -> None:
        rng = np.random.default_rng(0)
        road = Road(rng)
        station, offset = rng.uniform(-3000, 3000, 2000), rng.uniform(-8, 8, 2000)
        x, y, heading = road.place(station, offset)
        found_station, found_offset, slope = road.project(x, y)
        np.testing.assert_allclose(found_station, station, atol=0.05)
        np.testing.assert_allclose(found_offset, offset, atol=0.01)
        np.testing.assert_allclose(np.arctan(slope), heading, atol=0.01)

    def test_no_road_appears_where_there_is_none(self) -> None:
        rng = np.random.default_rng(1)
        road = Road(rng)
        x, y = rng.uniform(-500, 500, (2, 1000))
        centre_x, centre_y, _ = road.place(np.arange(-700, 700, 0.25), np.zeros(5600))
        true = np.hypot(x[:, None] - centre_x, y[:, None] - centre_y).min(axis=1)
        _, offset, _ = road.project(x, y)
        assert (np.abs(offset) > true - 0.05).all()

    def test_it_bends_both_ways_and_never_too_sharply(self) -> None:
        bends = curvature(Road(np.random.default_rng(2)), np.arange(0.0, 2000.0, 0.5))
        assert bends.max() > 0.008
        assert bends.min() < -0.008
        assert np.abs(bends).max() < 1 / 30
        assert np.abs(np.diff(bends)).max() < 2e-3


class TestVehicle:
    def test_two_half_steps_are_one_whole_step(self) -> None:
        start = VehicleState(3.0, -2.0, 0.4, 1.0)
        for steering in (-0.3, 0.0, 1e-12, 0.2):
            half = step_vehicle(start, 9.0, steering, 0.05)
            twice = step_vehicle(half, 9.0, steering, 0.05)
            whole = step_vehicle(start, 9.0, steering, 0.1)
            for name in VehicleState.__slots__:
                assert getattr(twice, name) == pytest.approx(getattr(whole, name), abs=1e-9)

    def test_steering_left_drives_an_anticlockwise_circle_of_the_bicycle_s_radius(self) -> None:
        steering, steps = 0.2, 40
        radius = WHEELBASE_M / math.tan(steering)
        state, places = VehicleState(0.0, 0.0, 0.0, 0.0), []
        for _ in range(steps):
            state = step_vehicle(state, 2 * math.pi * radius / steps, steering, 1.0)
            places.append(math.hypot(state.x_m, state.y_m - radius))
        np.testing.assert_allclose(places, radius)
        assert state.heading_rad == pytest.approx(2 * math.pi)
        assert (state.x_m, state.y_m) == pytest.approx((0.0, 0.0), abs=1e-9)

    def test_the_wheels_turn_no_further_than_their_stop(self) -> None:
        start = VehicleState(0.0, 0.0, 0.0, 0.0)
        stop = step_vehicle(start, 5.0, MAX_STEERING_RAD, 0.1)
        assert step_vehicle(start, 5.0, 2.0, 0.1) == stop


class TestShapes:
    """What a shape adds to a black picture is its area, wherever it lies between the pixels."""

    @staticmethod
    def area(draw: str, *shape: object) -> float:
        frame = np.zeros((3, 30, 40), np.float32)
        getattr(Canvas(frame), draw)(*shape, rgb((1, 1, 1)), 1.0)
        return float(frame[0].sum())

    def test_rectangle(self) -> None:
        assert self.area("rectangle", (5.3, 4.6), (8.1, 9.9)) == pytest.approx(2.8 * 5.3, rel=1e-3)
        assert self.area("rectangle", (5.3, 4.0), (5.5, 9.0)) == pytest.approx(0.2 * 5.0, rel=1e-3)

    def test_polygon(self) -> None:
        slanted = [(5.2, 3.1), (17.7, 8.3), (15.0, 20.4), (4.4, 16.6)]
        xs, ys = np.array(slanted).T
        true = 0.5 * abs(np.dot(xs, np.roll(ys, -1)) - np.dot(ys, np.roll(xs, -1)))
        assert self.area("polygon", slanted) == pytest.approx(true, rel=0.02)
        assert self.area("polygon", slanted[::-1]) == pytest.approx(true, rel=0.02)
        sliver = [(3.0, 5.1), (33.0, 5.1), (33.0, 5.3), (3.0, 5.3)]
        assert self.area("polygon", sliver) == pytest.approx(6.0, rel=0.05)

    def test_ellipse(self) -> None:
        big = self.area("ellipse", (20.3, 14.8), (11.0, 7.5))
        assert big == pytest.approx(math.pi * 11.0 * 7.5, rel=0.03)

    def test_cone(self) -> None:
        cone = self.area("cone", (20.3, 3.2), 24.7, 8.0)
        assert cone == pytest.approx(8.0 * 21.5, rel=0.03)

    def test_outside_the_picture_nothing_is_drawn(self) -> None:
        assert self.area("rectangle", (-9.0, 2.0), (-3.0, 9.0)) == 0
        assert self.area("ellipse", (60.0, 5.0), (5.0, 5.0)) == 0
        assert self.area("polygon", [(0.0, 40.0), (9.0, 40.0), (9.0, 50.0)]) == 0
        assert self.area("cone", (20.0, 40.0), 50.0, 5.0) == 0


class TestWorld:
    def test_a_picture_is_a_function_of_seed_config_and_state(self) -> None:
        states = [VehicleState(40.0 * i, 3.0 * i, 0.9 * i, 2.0 * i) for i in range(6)]
        world = SyntheticWorld(5, SMALL)
        forth = [world.render(state) for state in states]
        back = [world.render(state) for state in reversed(states)][::-1]
        fresh = [SyntheticWorld(5, SMALL).render(state) for state in states]
        np.testing.assert_array_equal(forth, back)
        np.testing.assert_array_equal(forth, fresh)
        assert psnr(SyntheticWorld(6, SMALL).render(states[1]), forth[1]) < 20

    def test_things_are_the_same_from_wherever_they_are_looked_for(self) -> None:
        scenery = Scenery(Road(np.random.default_rng(3)), 3)

        def around(x: float, y: float) -> set[tuple[float, ...]]:
            """What the things near (x, y) are within half the view of (100, 20)."""
            things = scenery.near(x, y)
            near = np.hypot(things.x - 100.0, things.y - 20.0) < 0.5 * VISIBLE_M
            columns = (things.kind, things.x, things.y, things.height, things.tint)
            return set(zip(*(c[near].tolist() for c in columns), strict=True))

        here = around(100.0, 20.0)
        assert len(here) > 20
        assert around(145.0, 50.0) == here
        assert around(60.0, -10.0) == here

    def test_markings_lie_where_the_road_is(self) -> None:
        config = SyntheticConfig(height=192, width=384)
        camera = Camera(192, 384, config.field_of_view_deg, config.horizon, config.camera_height_m)
        contrasts = []
        for seed in range(4):
            world = SyntheticWorld(seed, config)
            state = world.reset(30.0)
            picture = world.render(state).astype(float).mean(axis=2)
            station = np.array([DASH_PERIOD_M * 4 + DASH_M / 2, DASH_PERIOD_M * 4 + 9.0])
            x, y, _ = world.road.place(station, np.zeros(2))
            depth, left = View(state).depth_and_left(x, y)
            rows = camera.row_of(depth, 0.0).astype(int)
            columns = camera.column_of(depth, left).astype(int)
            dash, gap = picture[rows, columns]
            contrasts.append(dash - gap)
        assert min(contrasts) > 60

    def test_steering_left_moves_the_scene_to_the_right(self) -> None:
        for seed in range(3):
            world = SyntheticWorld(seed, SMALL)
            state = world.reset(50.0)
            before = world.render(state)[8:20].astype(float)
            turned = VehicleState(state.x_m, state.y_m, state.heading_rad + 0.12, state.time_s)
            after = world.render(turned)[8:20].astype(float)
            errors = {
                shift: np.abs(after[:, 12 + shift : 84 + shift] - before[:, 12:84]).mean()
                for shift in range(-10, 11)
            }
            assert 3 <= min(errors, key=lambda shift: errors[shift]) <= 9

    def test_a_small_movement_changes_the_picture_little(self) -> None:
        world = SyntheticWorld(2, SMALL)
        changes = []
        for state in drive(world, 20.0, 4).states[::5]:
            moved = step_vehicle(state, 0.01, 0.0, 1e-3)
            changes.append(np.abs(world.render(moved).astype(float) - world.render(state)).mean())
        assert max(changes) < 0.5

    def test_every_place_has_a_sensible_picture(self) -> None:
        rng = np.random.default_rng(0)
        world = SyntheticWorld(1, SMALL)
        for _ in range(60):
            x, y = rng.uniform(-5000, 5000), rng.uniform(-300, 300)
            state = VehicleState(x, y, rng.uniform(-20, 20), rng.uniform(0, 1000))
            picture = world.render(state).astype(float)
            sky, ground = picture[:10].mean(axis=(0, 1)), picture[-15:].mean(axis=(0, 1))
            assert np.abs(sky - ground).max() > 15
            assert 8 < picture.std() < 110
            assert 40 < picture.mean() < 220

    def test_the_futures_of_the_four_actions_are_far_apart(self) -> None:
        for seed in (1, 2, 3):
            world = SyntheticWorld(seed, SyntheticConfig(height=64, width=128))
            futures = four_futures(world, 2.0)
            for a, b in itertools.combinations(futures, 2):
                apart = psnr(futures[a][-10:], futures[b][-10:])
                assert apart < 18, f"seed {seed}: {a} and {b} are within {apart:.1f} dB"
            for a, b in itertools.combinations(("straight", "left", "right"), 2):
                assert psnr(futures[a][9], futures[b][9]) < 18

    @pytest.mark.parametrize("size", [(37, 61), (16, 16), (33, 128)])
    def test_any_size_works(self, size: tuple[int, int]) -> None:
        world = SyntheticWorld(0, SyntheticConfig(height=size[0], width=size[1]))
        picture = world.render(world.reset())
        assert picture.shape == (*size, 3)
        assert picture.dtype == np.uint8
        assert picture.flags.c_contiguous

    def test_a_larger_picture_shows_the_same_scene(self) -> None:
        state = VehicleState(0.0, 5.0, 0.3, 4.0)
        small = SyntheticWorld(4, SyntheticConfig(height=48, width=96)).render(state)
        large = SyntheticWorld(4, SyntheticConfig(height=144, width=288)).render(state)
        shrunk = large.reshape(48, 3, 96, 3, 3).mean(axis=(1, 3)).round().astype(np.uint8)
        assert psnr(shrunk, small) > 26

    def test_oncoming_cars_give_way_on_the_road(self) -> None:
        road = Road(np.random.default_rng(5))
        traffic = Traffic(road, 5, 0.75)
        met = 0
        for time in np.arange(0.0, 300.0, 0.5):
            x, y, _ = road.place(np.array([9.0 * time]), np.array([-LANE_OFFSET]))
            cars = traffic.near(VehicleState(float(x[0]), float(y[0]), 0.0, float(time)))
            nearest = np.hypot(cars.x - x, cars.y - y).min(initial=np.inf)
            met += nearest < 8
            assert nearest > 2.2
        assert met > 5

    def test_actions_must_be_finite(self) -> None:
        world = SyntheticWorld(0, TINY)
        with pytest.raises(ValueError, match="nan"):
            world.step(world.reset(), (float("nan"), 0.0))

    def test_palettes_can_be_chosen(self) -> None:
        def warmth(seed: int, palette: str) -> float:
            config = SyntheticConfig(height=16, width=32, palettes=(palette,))
            world = SyntheticWorld(seed, config)
            red, _, blue = world.render(world.reset())[:6].astype(float).mean((0, 1))
            return float(red - blue)

        for seed in range(4):
            assert warmth(seed, "evening") > warmth(seed, "noon") + 25
        assert set(SyntheticConfig().palettes) == set(PALETTES)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"height": 8}, "height: must .*, found 8"),
            ({"fps": 1.0}, "fps: must .*, found 1"),
            ({"horizon": 0.95}, "horizon: must .*, found 0.95"),
            ({"cruise_mps": (8.0, 2.0)}, r"cruise_mps: must .* rise within 1..40, found \(8.0"),
            ({"cruise_mps": (0.0, 8.0)}, "cruise_mps: must"),
            ({"palettes": ("noon", "night")}, "palettes: must .* evening"),
            ({"palettes": ()}, "palettes"),
        ],
    )
    def test_config_mistakes_name_the_field(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            SyntheticConfig(**change)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def many_drives() -> list[SyntheticDrive]:
    """Twenty minutes of driving; nothing is rendered."""
    return [drive(SyntheticWorld(seed, TINY), 60.0, seed) for seed in range(20)]


class TestDriver:
    """The drives hold what a model must see to learn what the actions do."""

    @staticmethod
    def places(drives: list[SyntheticDrive]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Offset from the road's centre and heading relative to the road, at every frame."""
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
        """How often a drive leaves the asphalt on the side of positive offsets."""
        return int(((offset[:-1] <= HALF_WIDTH) & (offset[1:] > HALF_WIDTH)).sum())

    def test_left_and_right_are_balanced(self, many_drives: list[SyntheticDrive]) -> None:
        steering = np.concatenate([driven.actions[:, 1] for driven in many_drives])
        assert abs(steering.mean()) < 0.1 * steering.std()
        for strong in (0.05, 0.1):
            left, right = (steering > strong).mean(), (steering < -strong).mean()
            assert 0.75 < left / right < 1.33
        # The way back steers against the way out, so the sum alone would not show one-sidedness.
        out_left, out_right = (
            sum(self.departures(sign * self.places([driven])[0]) for driven in many_drives)
            for sign in (1, -1)
        )
        assert min(out_left, out_right) > 1.5 * len(many_drives)
        assert 0.6 < out_left / out_right < 1.6
        assert (np.abs(steering) > 0.1).mean() > 0.08
        assert 0.1 < np.quantile(np.abs(steering), 0.95) < 0.2

    def test_it_steers_hard_at_speed_to_both_sides(self, many_drives: list[SyntheticDrive]) -> None:
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
        own, other = (on_road & (offset < 0)).mean(), (on_road & (offset > 0)).mean()
        assert own > other > 0.12
        assert (offset > 6).mean() > 0.03
        assert (offset < -6).mean() > 0.03
        assert (np.abs(offset) > 50).mean() < 0.01
        for side in (heading, -heading):
            assert (side > 0.4).mean() > 0.03

    def test_the_road_does_not_give_the_steering_away(
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

    def test_a_drive_is_a_function_of_its_seeds(self) -> None:
        first, again, other = (drive(SyntheticWorld(3, TINY), 20.0, seed) for seed in (8, 8, 9))
        assert first.states == again.states
        np.testing.assert_array_equal(first.actions, again.actions)
        assert np.abs(first.actions - other.actions).max() > 0.5


class TestDrives:
    def test_replaying_the_recorded_actions_gives_the_recorded_frames(self, tmp_path: Path) -> None:
        driven = drive(SyntheticWorld(11, SMALL), 3.0, 2)
        driven.save(tmp_path / "drive.json")
        loaded = load_synthetic_drive(tmp_path / "drive.json")
        assert loaded.states == driven.states
        np.testing.assert_array_equal(loaded.actions, driven.actions)
        for start in (0, 17):
            frames, states = loaded.world.replay(loaded.states[start], loaded.actions[start:])
            np.testing.assert_array_equal(frames[:-1], driven.frames[start + 1 :])
            assert tuple(states[:-1]) == driven.states[start + 1 :]
        np.testing.assert_allclose(driven.timestamps, np.arange(30) / 10)

    def test_written_drives_read_back_as_driven(self, tmp_path: Path) -> None:
        out = tmp_path / "out"
        seen: list[int] = []
        videos = write_synthetic_drives(
            out, drives=2, seconds=2.0, seed=4, config=SMALL, progress=seen.append
        )
        assert sum(seen) == 2 * frame_count(2.0, SMALL) == 40
        found = find_drives([out])
        assert [d.id for d in found.drives] == ["drive_000", "drive_001"]
        assert not found.skipped
        for video, recorded in zip(videos, found.drives, strict=True):
            driven = load_synthetic_drive(video.with_suffix(".json"))
            sampled = sample(recorded)
            assert recorded.log is not None
            assert recorded.log.steering_kind == "road_wheel"
            assert sampled.action_valid.all()
            np.testing.assert_allclose(sampled.actions, driven.actions, atol=1e-4)
            np.testing.assert_allclose(sampled.timestamps, driven.timestamps, atol=1e-6)
            assert psnr(np.stack(list(recorded.stream())), driven.frames) > 28

    def test_an_unfinished_set_is_completed_with_the_same_bytes(self, tmp_path: Path) -> None:
        def write(out: Path, seed: int = 1) -> list[Path]:
            return write_synthetic_drives(out, drives=3, seconds=0.5, seed=seed, config=TINY)

        whole = write(tmp_path / "whole")
        write(tmp_path / "broken")
        (tmp_path / "broken" / "drive_001.json").unlink()
        (tmp_path / "broken" / "drive_001.csv").unlink()
        untouched = (tmp_path / "broken" / "drive_000.mp4").stat().st_mtime_ns
        write(tmp_path / "broken")
        assert (tmp_path / "broken" / "drive_000.mp4").stat().st_mtime_ns == untouched
        for path in (tmp_path / "whole").iterdir():
            assert path.read_bytes() == (tmp_path / "broken" / path.name).read_bytes(), path.name
        assert len({video.read_bytes() for video in whole}) == 3
        with pytest.raises(DriveSimError, match="already holds these 3 drives"):
            write(tmp_path / "whole")
        with pytest.raises(DriveSimError, match="another plan"):
            write(tmp_path / "whole", seed=2)

    def test_several_processes_write_the_same_bytes(self, tmp_path: Path) -> None:
        seen: list[int] = []
        for name, workers in (("one", 1), ("two", 2)):
            write_synthetic_drives(
                tmp_path / name,
                drives=2,
                seconds=0.5,
                config=TINY,
                workers=workers,
                progress=seen.append,
            )
        assert seen == [1] * 10 + [5, 5]
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name

    def test_later_drives_are_those_of_a_longer_set(self, tmp_path: Path) -> None:
        for name, first, drives in (("all", 0, 3), ("later", 2, 1)):
            write_synthetic_drives(
                tmp_path / name, drives=drives, first=first, seconds=0.5, worlds=1, config=TINY
            )
        for suffix in (".mp4", ".csv", ".json"):
            later = (tmp_path / "later" / "drive_002").with_suffix(suffix)
            assert later.read_bytes() == (tmp_path / "all" / later.name).read_bytes()

    def test_other_folders_and_files_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "mine.txt").write_text("precious")
        with pytest.raises(DriveSimError, match="other files"):
            write_synthetic_drives(tmp_path, drives=1, seconds=1.0, config=TINY)
        assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
        with pytest.raises(DriveSimError, match=r"mine\.txt: cannot be written"):
            write_synthetic_drives(tmp_path / "mine.txt", drives=1, seconds=1.0, config=TINY)

    @pytest.mark.parametrize(("drives", "seconds"), [(0, 5.0), (1, 0.1), (1, -3.0)])
    def test_nothing_to_write_is_an_error(
        self, tmp_path: Path, drives: int, seconds: float
    ) -> None:
        with pytest.raises(DriveSimError, match="at least one drive"):
            write_synthetic_drives(tmp_path / "x", drives=drives, seconds=seconds, config=TINY)
        assert not (tmp_path / "x").exists()

    @pytest.mark.parametrize("text", ["{}", '{"format": "drivesim synthetic drive 0"}', "[1]", "!"])
    def test_other_json_is_no_drive(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "drive.json"
        path.write_text(text)
        with pytest.raises(DriveSimError, match=r"drive\.json"):
            load_synthetic_drive(path)
