import numpy as np
from numpy.typing import NDArray

from driving_sim.evaluate.pictures.flicker import flicker, flicker_shares


def two_frames() -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Two still cells, one of which changes its token, and two that move and change theirs."""
    tokens = np.array([[[1, 2], [3, 4]], [[1, 9], [9, 9]]])
    frames = np.full((2, 4, 4, 3), 100, np.uint8)
    frames[1, 2:] -= 7  # down: unsigned differences would wrap around
    return tokens, frames


def test_tokens_that_change_where_the_picture_does_not_are_counted() -> None:
    tokens, frames = two_frames()
    found = flicker(tokens, frames, stride=2)
    assert found == {"cells": 4, "changed": 3, "still": 2, "still_changed": 1}
    assert flicker_shares(found) == {
        "flicker": 0.5,
        "still_cells": 2,
        "still_share": 0.5,
        "changed_share": 0.75,
    }


def test_still_is_a_mean_change_below_the_threshold() -> None:
    tokens, frames = two_frames()
    assert flicker(tokens, frames, stride=2, threshold=7)["still"] == 2
    assert flicker(tokens, frames, stride=2, threshold=7.01)["still"] == 4
    frames[1, 0, 0] = 107  # one pixel in four: 1.75 on average
    assert flicker(tokens, frames, stride=2)["still"] == 2
    assert flicker(tokens, frames, stride=2, threshold=1.75)["still"] == 1


def test_pieces_that_share_a_frame_add_up_to_the_whole() -> None:
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 3, (7, 3, 5))
    frames = rng.integers(0, 5, (7, 6, 10, 3)).astype(np.uint8)
    whole = flicker(tokens, frames, stride=2)
    pieces = flicker(tokens[:4], frames[:4], stride=2) + flicker(tokens[3:], frames[3:], stride=2)
    assert pieces == whole
    assert whole["cells"] == 6 * 15
    assert all(0 < whole[name] < whole["cells"] for name in ("changed", "still", "still_changed"))


def test_nothing_still_and_nothing_at_all_have_no_share() -> None:
    tokens, frames = two_frames()
    frames[1] += 50
    assert flicker_shares(flicker(tokens, frames, stride=2))["flicker"] is None
    alone = flicker_shares(flicker(tokens[:1], frames[:1], stride=2))
    assert alone == {
        "flicker": None,
        "still_cells": 0,
        "still_share": None,
        "changed_share": None,
    }
