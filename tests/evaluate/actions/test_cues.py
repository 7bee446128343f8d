import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.evaluate.actions import cues
from driving_sim.evaluate.actions.cues import CELLS, DISPLACEMENTS, mirrored_motion, motion_cues

HEIGHT, WIDTH = 64, 128
Frames = NDArray[np.uint8]


def moving(down: int, right: int, count: int = 3) -> Frames:
    """A texture that moves by so many pixels from frame to frame, [T, H, W, 3]."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, size=(2 * HEIGHT, 2 * WIDTH)).repeat(2, 0).repeat(2, 1)
    places = [(HEIGHT - t * down, WIDTH - t * right) for t in range(count)]
    frames = [coarse[y : y + HEIGHT, x : x + WIDTH] for y, x in places]
    return np.stack(frames)[..., None].repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("down", "right"), [(0, 0), (-2, 0), (4, 0), (8, 0), (0, 6), (0, -10), (2, 6)]
)
def test_a_planted_motion_is_found_and_the_turn_taken_out(down: int, right: int) -> None:
    """Where the picture turns as a whole, what is left is the motion down the picture."""
    turns, motion = motion_cues(moving(down, right))
    np.testing.assert_allclose(turns.numpy(), right / WIDTH, atol=0.3 / WIDTH)
    likest = motion.argmax(dim=2)
    # Half the pixels: rows 1 up to 4 down, columns 6 left to 6 right.
    expected = (down // 2 + 1) * 13 + 6
    assert (likest == expected).float().mean() > 0.8
    assert motion.shape == (1, 2, DISPLACEMENTS, 8, CELLS // 8)


def test_a_mirror_image_moves_in_a_mirror() -> None:
    frames = moving(1, 3, count=5)
    turns, motion = motion_cues(frames)
    turns_back, motion_back = motion_cues(frames[:, :, ::-1])
    assert torch.equal(turns_back, -turns)
    assert (turns > 0).all()
    torch.testing.assert_close(motion_back, mirrored_motion(motion), atol=1e-4, rtol=0)
    assert not torch.allclose(motion_back, motion, atol=0.1)


def test_soft_pictures_come_beside_the_sharp_ones() -> None:
    frames = moving(2, 0)
    turns, motion = motion_cues(frames)
    turns_of_both, motion_of_both = motion_cues(frames, soften=True)
    assert torch.equal(turns_of_both[:1], turns)
    assert torch.equal(motion_of_both[:1], motion)
    assert not torch.allclose(motion_of_both[1], motion_of_both[0], atol=0.01)


def test_pieces_are_measured_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(2).integers(256, size=(8, 48, 96, 3), dtype=np.uint8)
    _, whole = motion_cues(frames)
    monkeypatch.setattr(cues, "_PAIRS_AT_ONCE", 3)
    _, pieces = motion_cues(frames)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=0)
    assert motion_cues(frames[:1])[1].shape == (1, 0, *whole.shape[2:])
