import numpy as np

from driving_sim.data.arrays import Pixels
from driving_sim.world_model.panels import contact_sheet, draw_panel, side_by_side


def panel(frame: Pixels, steering: float, title: str = "left", speed: float = 3.0) -> Pixels:
    action = np.array([speed, steering], np.float32)
    return draw_panel(frame, title, action, np.ones(2, np.bool_), 0.4)


def test_the_caption_does_not_cover_the_frame() -> None:
    frame = np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8)
    drawn = panel(frame, 0.1)
    scale = drawn.shape[1] // 64
    np.testing.assert_array_equal(drawn[-32 * scale :: scale, ::scale], frame)


def test_left_steering_grows_the_bar_to_the_left() -> None:
    frame = np.zeros((32, 64, 3), np.uint8)
    neutral = panel(frame, 0.0).astype(int)
    beside_the_number = int(neutral.shape[1] * 0.8)

    def bar_columns(steering: float) -> np.ndarray[tuple[int], np.dtype[np.intp]]:
        changed = np.abs(panel(frame, steering) - neutral).sum(axis=(0, 2))
        return np.flatnonzero(changed[:beside_the_number])

    assert len(bar_columns(0.3)) > beside_the_number / 4
    assert bar_columns(0.3).max() <= bar_columns(-0.3).min()


def test_a_frame_of_256_pixels_is_not_enlarged_and_a_long_title_does_not_reach_the_speed() -> None:
    frame = np.zeros((32, 256, 3), np.uint8)
    panels = [panel(frame, 0.0, title, 12.3) for title in ("", "w" * 99)]
    assert panels[0].shape[1] == 256
    title = np.flatnonzero((panels[0] != panels[1]).any(axis=(0, 2)))
    speed = np.flatnonzero((panels[0][:16] != panels[0][0, 0]).any(axis=(0, 2)))
    assert title.max() < speed.min()


def test_side_by_side_keeps_every_panel() -> None:
    panels = [np.full((10, 20, 3), value, np.uint8) for value in (1, 2, 3, 4, 5)]
    grid = side_by_side(panels)
    assert {1, 2, 3, 4, 5} <= set(np.unique(grid).tolist())


def test_contact_sheet_has_a_row_for_each_future() -> None:
    frames = [np.full((16, 32, 3), value, np.uint8) for value in (50, 60)]
    sheet = contact_sheet([("a", frames), ("b", frames)], ["now", "later"])
    single = contact_sheet([("a", frames)], ["now", "later"])
    assert sheet.shape[0] > single.shape[0]
    assert sheet.shape[1] == single.shape[1]
