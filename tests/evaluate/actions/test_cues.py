import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from driving_sim.evaluate.actions import cues
from driving_sim.evaluate.actions.cues import CELLS, DISPLACEMENTS, mirrored_motion, motion_cues

HEIGHT, WIDTH = 64, 128
Frames = NDArray[np.uint8]


def moving(down: int, right: int, count: int = 3) -> Frames:
    """Return frames [T, H, W, 3] of a texture that moves by so many pixels per frame."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, size=(2 * HEIGHT, 2 * WIDTH)).repeat(2, 0).repeat(2, 1)
    corners = [(HEIGHT - t * down, WIDTH - t * right) for t in range(count)]
    frames = [coarse[y : y + HEIGHT, x : x + WIDTH] for y, x in corners]
    return np.stack(frames)[..., None].repeat(3, -1).astype(np.uint8)


@pytest.mark.parametrize(
    ("down", "right"), [(0, 0), (-2, 0), (4, 0), (8, 0), (0, 6), (0, -10), (2, 6)]
)
def test_a_planted_motion_is_split_into_turn_and_motion_down(down: int, right: int) -> None:
    """The sideways shift of the whole picture is the turn; the shift downwards remains."""
    turns, motion = motion_cues(moving(down, right))
    np.testing.assert_allclose(turns.numpy(), right / WIDTH, atol=0.3 / WIDTH)
    best = motion.argmax(dim=2)
    # At half the size, displacements go from 1 pixel up to 4 down, each from 6 left to 6 right.
    expected = (down // 2 + 1) * 13 + 6
    assert (best == expected).float().mean() > 0.8
    assert motion.shape == (1, 2, DISPLACEMENTS, 8, CELLS // 8)


def test_mirrored_frames_have_the_mirrored_motion() -> None:
    frames = moving(1, 3, count=5)
    turns, motion = motion_cues(frames)
    turns_of_mirrored, motion_of_mirrored = motion_cues(frames[:, :, ::-1])
    assert torch.equal(turns_of_mirrored, -turns)
    assert (turns > 0).all()
    torch.testing.assert_close(motion_of_mirrored, mirrored_motion(motion), atol=1e-4, rtol=0)
    assert not torch.allclose(motion_of_mirrored, motion, atol=0.1)


def test_soften_adds_a_second_version() -> None:
    frames = moving(2, 0)
    turns, motion = motion_cues(frames)
    two_turns, two_motions = motion_cues(frames, soften=True)
    assert torch.equal(two_turns[:1], turns)
    assert torch.equal(two_motions[:1], motion)
    assert not torch.allclose(two_motions[1], two_motions[0], atol=0.01)


def test_cues_do_not_depend_on_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    frames = np.random.default_rng(2).integers(256, size=(8, 48, 96, 3), dtype=np.uint8)
    _, in_one_chunk = motion_cues(frames)
    monkeypatch.setattr(cues, "_PAIRS_AT_ONCE", 3)
    _, in_chunks = motion_cues(frames)
    torch.testing.assert_close(in_chunks, in_one_chunk, atol=1e-5, rtol=0)
    assert motion_cues(frames[:1])[1].shape == (1, 0, *in_one_chunk.shape[2:])
