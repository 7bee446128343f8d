import numpy as np
import pytest

from driving_sim.data.synthetic.drives import drive
from driving_sim.data.synthetic.motion.vehicle import VehicleState, step_vehicle
from driving_sim.data.synthetic.world import SyntheticConfig, SyntheticWorld
from tests.fixtures.synthetic_worlds import SMALL, TINY, psnr


def test_a_picture_is_a_function_of_seed_config_and_state() -> None:
    states = [VehicleState(40.0 * i, 3.0 * i, 0.9 * i, 2.0 * i) for i in range(6)]
    world = SyntheticWorld(5, SMALL)
    forth = [world.render(state) for state in states]
    back = [world.render(state) for state in reversed(states)][::-1]
    fresh = [SyntheticWorld(5, SMALL).render(state) for state in states]
    np.testing.assert_array_equal(forth, back)
    np.testing.assert_array_equal(forth, fresh)
    assert psnr(SyntheticWorld(6, SMALL).render(states[1]), forth[1]) < 20


def test_steering_left_moves_the_scene_to_the_right() -> None:
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


def test_a_small_movement_changes_the_picture_little() -> None:
    world = SyntheticWorld(2, SMALL)
    changes = []
    for state in drive(world, 20.0, 4).states[::5]:
        moved = step_vehicle(state, 0.01, 0.0, 1e-3)
        changes.append(np.abs(world.render(moved).astype(float) - world.render(state)).mean())
    assert max(changes) < 0.5


def test_every_place_has_a_sensible_picture() -> None:
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


@pytest.mark.parametrize("size", [(37, 61), (16, 16), (33, 128)])
def test_any_size_works(size: tuple[int, int]) -> None:
    world = SyntheticWorld(0, SyntheticConfig(height=size[0], width=size[1]))
    picture = world.render(world.reset())
    assert picture.shape == (*size, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.c_contiguous


def test_a_larger_picture_shows_the_same_scene() -> None:
    state = VehicleState(0.0, 5.0, 0.3, 4.0)
    small = SyntheticWorld(4, SyntheticConfig(height=48, width=96)).render(state)
    large = SyntheticWorld(4, SyntheticConfig(height=144, width=288)).render(state)
    shrunk = large.reshape(48, 3, 96, 3, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    assert psnr(shrunk, small) > 26


def test_actions_must_be_finite() -> None:
    world = SyntheticWorld(0, TINY)
    with pytest.raises(ValueError, match="nan"):
        world.step(world.reset(), (float("nan"), 0.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 8}, "height: must .*, found 8"),
        ({"fps": 1.0}, "fps: must .*, found 1"),
        ({"horizon": 0.95}, "horizon: must .*, found 0.95"),
        ({"cruise_mps": (8.0, 2.0)}, r"cruise_mps: must .* ascending .* within 1..40, found \(8.0"),
        ({"cruise_mps": (0.0, 8.0)}, "cruise_mps: must"),
        ({"stops_s": (2.0, 1.0)}, "stops_s: must .* ascending .* within 0..60"),
        ({"swerves_rad": (0.1, 0.3)}, "swerves_rad: must .* within 0..0.2"),
        ({"lateral_mps2": 0.0}, "lateral_mps2: must"),
        ({"palettes": ("noon", "night")}, "palettes: must .* evening"),
        ({"palettes": ()}, "palettes"),
    ],
)
def test_config_mistakes_name_the_field(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**change)  # type: ignore[arg-type]


def test_a_world_redrawn_out_of_sight_looks_the_same_ahead_and_different_behind() -> None:
    for seed in range(3):
        world = SyntheticWorld(seed, SMALL)
        state = world.reset(50.0)
        other = world.seen_from(state, 99)
        ahead = other.render(state).astype(float) - world.render(state)
        assert np.abs(ahead).mean() < 0.5
        behind = VehicleState(state.x_m, state.y_m, state.heading_rad + np.pi, state.time_s)
        assert psnr(other.render(behind), world.render(behind)) < 22
        assert other.road is world.road
        np.testing.assert_array_equal(
            world.render(behind), SyntheticWorld(seed, SMALL).render(behind)
        )
