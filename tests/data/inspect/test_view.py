"""A camera that looks at the ground from above does not show turns as a camera ahead does."""

import numpy as np
import pytest

from driving_sim.data.arrays import Pixels
from driving_sim.data.inspect.motion import measure_motion
from driving_sim.data.inspect.view import CLEAR, View
from tests.data.inspect.turning_pictures import turning
from tests.fixtures.video_files import smooth_noise

SHIFTS = np.sin(np.arange(60) / 4) / 60


def from_above(rows_per_frame: int, *, north_up: bool) -> Pixels:
    """Draw the ground as a drone sees it, which follows the car or keeps the north up."""
    ground = smooth_noise(np.random.default_rng(1), 700, 700)
    sideways = np.cumsum(np.full(60, 2 if north_up else 0))
    frames = [
        ground[500 - rows_per_frame * t :, 200 + sideways[t] :][:128, :256] for t in range(60)
    ]
    return np.stack(frames)[..., None].repeat(3, axis=-1).astype(np.uint8)


def everywhere(frames: Pixels) -> View:
    motion = measure_motion(frames)
    return View.judge(motion, np.ones(len(motion.sideways), np.bool_))


def test_a_camera_that_looks_ahead_is_clear() -> None:
    assert everywhere(turning(SHIFTS)) == CLEAR
    assert CLEAR.hindrance == ""


@pytest.mark.parametrize("north_up", [False, True])
def test_a_view_from_above_is_found(north_up: bool) -> None:
    for rows in (2, 4):
        view = everywhere(from_above(rows, north_up=north_up))
        assert view == View(is_from_above=True)
    assert "from above" in view.hindrance


def test_a_picture_with_too_little_texture_is_faint() -> None:
    """Wide stripes look alike after a shift by a stripe; grain alone does not move with the car."""
    columns = np.arange(256)
    random = np.random.default_rng(0)
    stripes = np.stack([60 + 4 * np.sin((columns - 3 * t) / 4) for t in range(60)])
    frames = np.repeat(stripes[:, None], 128, axis=1)[..., None].repeat(3, axis=-1)
    frames = frames + random.normal(0, 2, frames.shape)
    view = everywhere(frames.clip(0, 255).astype(np.uint8))
    assert view == View(is_faint=True)
    assert view.hindrance == "the picture has too little texture"


def test_a_still_picture_is_not_judged() -> None:
    assert everywhere(np.full((20, 64, 128, 3), 90, np.uint8)[:1]) == CLEAR
    still = np.repeat(turning(np.zeros(0)), 20, axis=0)
    assert everywhere(still) == CLEAR
