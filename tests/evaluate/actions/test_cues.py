import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.evaluate.actions import cues as motion_cues
from driving_sim.evaluate.actions.cues import CELLS, DISPLACEMENTS, MotionCues, mirrored_motion

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
    cues = MotionCues.of(moving(down, right))
    np.testing.assert_allclose(cues.turns.numpy(), right / WIDTH, atol=0.3 / WIDTH)
    likest = cues.motion.argmax(dim=2)
    # Half the pixels: rows 1 up to 4 down, columns 6 left to 6 right.
    expected = (down // 2 + 1) * 13 + 6
    assert (likest == expected).float().mean() > 0.8
    assert cues.motion.shape == (1, 2, DISPLACEMENTS, 8, CELLS // 8)


def test_a_mirror_image_moves_in_a_mirror() -> None:
    frames = moving(1, 3, count=5)
    there, back = MotionCues.of(frames), MotionCues.of(frames[:, :, ::-1])
    assert torch.equal(back.turns, -there.turns)
    assert (there.turns > 0).all()
    torch.testing.assert_close(back.motion, mirrored_motion(there.motion), atol=1e-4, rtol=0)
    assert not torch.allclose(back.motion, there.motion, atol=0.1)


def test_soft_pictures_come_beside_the_sharp_ones() -> None:
    frames = moving(2, 0)
    sharp, both = MotionCues.of(frames), MotionCues.of(frames, soften=True)
    assert torch.equal(both.turns[:1], sharp.turns)
    assert torch.equal(both.motion[:1], sharp.motion)
    assert not torch.allclose(both.motion[1], both.motion[0], atol=0.01)
    version, stacks = torch.tensor([1, 0]), torch.tensor([[0, 0, 1], [0, 1, 1]])
    turns, motion = both.halved().at(version, stacks)
    assert torch.equal(turns[0], both.turns[1, [0, 0, 1]])
    assert torch.equal(motion[1], both.motion[0, [0, 1, 1]].half().float())


def test_pieces_are_measured_as_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(2).integers(256, size=(8, 48, 96, 3), dtype=np.uint8)
    whole = MotionCues.of(frames)
    monkeypatch.setattr(motion_cues, "_PAIRS_AT_ONCE", 3)
    pieces = MotionCues.of(frames)
    torch.testing.assert_close(pieces.motion, whole.motion, atol=1e-5, rtol=0)
    assert MotionCues.of(frames[:1]).motion.shape == (1, 0, *whole.motion.shape[2:])
