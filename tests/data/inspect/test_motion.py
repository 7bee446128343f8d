import numpy as np
import numpy.typing as npt
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive, sample
from driving_sim.data.inspect.motion import picture_change, yaw_motion
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from tests import SHARED
from tests.data.inspect.turning_pictures import HEIGHT, WIDTH, turning
from tests.fixtures.video_files import smooth_noise

TRACK = SHARED / "track"
Frames = npt.NDArray[np.uint8]


@pytest.fixture(scope="module")
def shifts() -> npt.NDArray[np.float64]:
    """Shifts to both sides, from a hundredth of a pixel to 15 % of the picture width."""
    sizes = np.array([0.0, 0.00004, 0.001, 0.004, 0.011, 0.02, 0.053, 0.1, 0.15])
    return np.concatenate([sizes, -sizes])


def test_the_shift_is_measured_to_a_fifth_of_a_pixel(shifts: npt.NDArray[np.float64]) -> None:
    np.testing.assert_allclose(yaw_motion(turning(shifts)), shifts, atol=0.2 / WIDTH)


def test_mirrored_and_reversed_pictures_turn_the_other_way(shifts: npt.NDArray[np.float64]) -> None:
    frames = turning(shifts)
    measured = yaw_motion(frames)
    np.testing.assert_allclose(yaw_motion(frames[:, :, ::-1]), -measured, atol=0.1 / WIDTH)
    np.testing.assert_allclose(yaw_motion(frames[::-1])[::-1], -measured, atol=0.3 / WIDTH)


def test_light_blur_and_pitch_change_little(shifts: npt.NDArray[np.float64]) -> None:
    frames = turning(shifts)
    dimmed = (frames * np.linspace(0.5, 1, len(frames))[:, None, None, None]).astype(np.uint8)
    np.testing.assert_allclose(yaw_motion(dimmed), shifts, atol=1 / WIDTH)
    coarse = frames[:, ::4, ::4].repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_allclose(yaw_motion(coarse), shifts, atol=2 / WIDTH)
    pitched = np.stack(
        [np.roll(frame, 3 * (number % 2), axis=0) for number, frame in enumerate(frames)]
    )
    np.testing.assert_allclose(yaw_motion(pitched), shifts, atol=1 / WIDTH)


def test_driving_straight_ahead_is_no_turn() -> None:
    scene = smooth_noise(np.random.default_rng(0), HEIGHT, WIDTH)
    frames = []
    for zoom in 1.02 ** np.arange(6):
        rows = (np.arange(HEIGHT) - HEIGHT * 0.42) / zoom + HEIGHT * 0.42
        columns = (np.arange(WIDTH) - (WIDTH - 1) / 2) / zoom + (WIDTH - 1) / 2
        across = np.stack([np.interp(columns, np.arange(WIDTH), line) for line in scene])
        zoomed = np.stack([np.interp(rows, np.arange(HEIGHT), line) for line in across.T], axis=1)
        frames.append(zoomed)
    picture = np.stack(frames)[..., None].repeat(3, axis=-1).astype(np.uint8)
    assert np.abs(yaw_motion(picture)).max() < 1 / WIDTH


def test_blank_pictures_and_cuts_give_no_motion() -> None:
    grey = np.full((3, HEIGHT, WIDTH, 3), 90, np.uint8)
    np.testing.assert_array_equal(yaw_motion(grey), 0)
    cut = np.stack([turning(np.zeros(0), seed)[0] for seed in range(4)])
    np.testing.assert_array_equal(yaw_motion(cut), 0)
    assert yaw_motion(grey[:1]).shape == (0,)
    assert picture_change(grey[:1]).shape == (0,)


def test_long_videos_are_measured_in_chunks_that_fit_together() -> None:
    frames = turning(np.sin(np.arange(80)) / 40)
    halves = [yaw_motion(part) for part in (frames[:40], frames[39:])]
    np.testing.assert_allclose(yaw_motion(frames), np.concatenate(halves), atol=1e-5)


def test_the_picture_does_not_change_at_a_standstill() -> None:
    frames = turning(np.zeros(6))
    frames[4:] = frames[3]
    change = picture_change(frames)
    assert (change[3:] == 0).all()
    assert (change[:3] > 0.05).all()


def motion_and_expectation(drive: Drive, every: int) -> tuple[npt.NDArray[np.float32], ...]:
    """Return the image motion, and speed times steering one frame earlier, where known."""
    sampled = sample(drive, every=every)
    motion = yaw_motion(
        np.stack(list(drive.stream(FrameSize(height=64, width=128), sampled.indices)))
    )
    known = sampled.action_valid[:, 0] & sampled.action_valid[:, 1]
    known[[start - 1 for start, _ in sampled.segments[1:]]] = False
    expected = sampled.actions[:, 0] * sampled.actions[:, 1]
    usable = known[1:-1] & known[:-2]
    return motion[1:][usable], expected[:-2][usable]


@pytest.mark.parametrize(
    ("name", "least", "largest"),
    [("drive_02", 0.9, 0.061), ("drive_04", 0.5, 0.053), ("drive_07", 0.85, 0.026)],
)
def test_real_turns_follow_the_steering(name: str, least: float, largest: float) -> None:
    if not TRACK.exists():
        pytest.skip(f"{TRACK} is not here")
    (drive,) = find_drives([TRACK / f"{name}.mp4"], Reading(steering_kind="road_wheel")).drives
    motion, expected = motion_and_expectation(drive, every=1)
    assert np.corrcoef(motion, expected)[0, 1] > least
    assert np.abs(motion).max() == pytest.approx(largest, rel=0.1)
