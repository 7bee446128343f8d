import numpy as np
from numpy.typing import NDArray

from driving_sim.evaluate.pictures.flicker import flicker, flicker_shares


def two_frames() -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Return tokens and frames of four cells.

    Two cells are still, and the token of one of them changes. The other two move, and both their
    tokens change.
    """
    tokens = np.array([[[1, 2], [3, 4]], [[1, 9], [9, 9]]])
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    frames[1, 2:] -= 7  # a decrease, because unsigned differences would wrap around
    return tokens, frames


def test_changed_tokens_of_still_cells_are_counted() -> None:
    tokens, frames = two_frames()
    counts = flicker(tokens, frames, stride=2)
    assert counts == {"cells": 4, "changed": 3, "still": 2, "still_changed": 1}
    assert flicker_shares(counts) == {
        "flicker": 0.5,
        "still_cells": 2,
        "still_share": 0.5,
        "changed_share": 0.75,
    }


def test_cells_with_a_mean_change_below_the_threshold_are_still() -> None:
    tokens, frames = two_frames()
    assert flicker(tokens, frames, stride=2, threshold=7)["still"] == 2
    assert flicker(tokens, frames, stride=2, threshold=7.01)["still"] == 4
    frames[1, 0, 0] = 107  # one of the cell's four pixels changes by 7, so the mean is 1.75
    assert flicker(tokens, frames, stride=2)["still"] == 2
    assert flicker(tokens, frames, stride=2, threshold=1.75)["still"] == 1


def test_pieces_that_share_a_frame_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (7, 3, 5))
    frames = rng.integers(0, 5, (7, 6, 10, 3)).astype(np.uint8)
    counts = flicker(tokens, frames, stride=2)
    pieces = flicker(tokens[:4], frames[:4], stride=2) + flicker(tokens[3:], frames[3:], stride=2)
    assert pieces == counts
    assert counts["cells"] == 6 * 15
    assert all(0 < counts[name] < counts["cells"] for name in ("changed", "still", "still_changed"))


def test_shares_of_0_cells_are_none() -> None:
    tokens, frames = two_frames()
    frames[1] += 50
    assert flicker_shares(flicker(tokens, frames, stride=2))["flicker"] is None
    of_single_frame = flicker_shares(flicker(tokens[:1], frames[:1], stride=2))
    assert of_single_frame == {
        "flicker": None,
        "still_cells": 0,
        "still_share": None,
        "changed_share": None,
    }
