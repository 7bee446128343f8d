from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.contexts import write_contexts
from driving_sim.data.synthetic.true_future import load_synthetic_drive, replay
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine.errors import DriveSimError
from tests.fixtures.synthetic_worlds import SMALL, psnr


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the JSON files of two drives of 6 seconds."""
    out = tmp_path_factory.mktemp("drives") / "drives"
    videos = write_synthetic_drives(out, drives=2, seconds=6.0, config=SMALL)
    return [video.with_suffix(".json") for video in videos]


def test_a_context_is_a_part_of_its_drive(drives: list[Path], tmp_path: Path) -> None:
    videos = write_contexts(tmp_path, {"b": (drives[0], 1.2), "a": (drives[1], 2.9)})
    assert videos == [tmp_path / "b.mp4", tmp_path / "a.mp4"]
    for video, path, begin in ((videos[0], drives[0], 12), (videos[1], drives[1], 29)):
        part, driven = load_synthetic_drive(video.with_suffix(".json")), load_synthetic_drive(path)
        assert part.states == driven.states[begin : begin + 31]
        np.testing.assert_array_equal(part.actions, driven.actions[begin : begin + 31])
        (recorded,) = find_drives([video]).drives
        frames = np.stack(list(recorded.stream()))
        assert frames.shape == (31, 48, 96, 3)
        last = part.world.render(part.states[-1])
        assert psnr(frames[-1], last) > 28 > psnr(frames[0], last)
        sampled = sample(recorded)
        assert sampled.action_valid.all()
        np.testing.assert_allclose(sampled.actions, part.actions, atol=1e-4)


def test_the_true_future_of_a_context_is_that_of_its_drive(
    drives: list[Path], tmp_path: Path
) -> None:
    write_contexts(tmp_path, {"a": (drives[0], 1.2)})
    part, driven = load_synthetic_drive(tmp_path / "a.json"), load_synthetic_drive(drives[0])
    future = replay(part.world, part.states[-1], driven.actions[42:47])
    np.testing.assert_array_equal(future, driven.between(43, 48).frames)


@pytest.mark.parametrize("start_s", [3.0, 99.0, -0.1])
def test_a_context_must_lie_inside_its_drive(
    start_s: float, drives: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(
        DriveSimError, match=r"drive_000\.json: has no 3 s .*from 0 to 5\.9 s.* for a"
    ):
        write_contexts(tmp_path / "out", {"a": (drives[0], start_s)})
    assert not (tmp_path / "out").exists()
