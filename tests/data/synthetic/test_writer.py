from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.synthetic.drives import frame_count
from driving_sim.data.synthetic.true_future import load_synthetic_drive
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine.errors import DriveSimError
from tests.fixtures.synthetic_worlds import SMALL, TINY, psnr


def assert_same_drives(written: Path, expected: Path) -> None:
    """Check that two folders hold the same files, with the same actions and pictures.

    Pictures are compared after decoding: x264 sometimes encodes the same tiny frames with slightly
    different quantisers, once in some thousand videos.
    """
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in written.iterdir()) == names
    for name in names:
        own, other = written / name, expected / name
        if own.suffix == ".mp4":
            pictures, others = (
                np.stack(list(find_drives([path]).drives[0].stream())) for path in (own, other)
            )
            assert pictures.shape == others.shape
            assert np.array_equal(pictures, others) or psnr(pictures, others) > 30, name
        else:
            assert own.read_bytes() == other.read_bytes(), name


def test_written_drives_round_trip(tmp_path: Path) -> None:
    out = tmp_path / "out"
    seen: list[int] = []
    videos = write_synthetic_drives(
        out, drives=2, seconds=2.0, seed=4, config=SMALL, progress=seen.append
    )
    assert sum(seen) == 2 * frame_count(2.0, SMALL) == 40
    drive_set = find_drives([out])
    assert [d.id for d in drive_set.drives] == ["drive_000", "drive_001"]
    assert not drive_set.skipped
    for video, recorded in zip(videos, drive_set.drives, strict=True):
        driven = load_synthetic_drive(video.with_suffix(".json"))
        sampled = sample(recorded)
        assert recorded.log is not None
        assert recorded.log.steering_kind == "road_wheel"
        assert sampled.action_valid.all()
        np.testing.assert_allclose(sampled.actions, driven.actions, atol=1e-4)
        np.testing.assert_allclose(sampled.timestamps, driven.timestamps, atol=1e-6)
        assert psnr(np.stack(list(recorded.stream())), driven.frames) > 28


def test_an_unfinished_set_is_completed_with_the_same_drives(tmp_path: Path) -> None:
    def write(out: Path, seed: int = 1) -> list[Path]:
        return write_synthetic_drives(out, drives=3, seconds=0.5, seed=seed, config=TINY)

    videos = write(tmp_path / "complete")
    write(tmp_path / "broken")
    (tmp_path / "broken" / "drive_001.json").unlink()
    (tmp_path / "broken" / "drive_001.csv").unlink()
    untouched = (tmp_path / "broken" / "drive_000.mp4").stat().st_mtime_ns
    write(tmp_path / "broken")
    assert (tmp_path / "broken" / "drive_000.mp4").stat().st_mtime_ns == untouched
    assert_same_drives(tmp_path / "broken", tmp_path / "complete")
    assert len({video.read_bytes() for video in videos}) == 3
    with pytest.raises(DriveSimError, match="already holds these 3 drives"):
        write(tmp_path / "complete")
    with pytest.raises(DriveSimError, match="made with other settings"):
        write(tmp_path / "complete", seed=2)


def test_several_processes_write_the_same_drives(tmp_path: Path) -> None:
    seen: list[int] = []
    for name, workers in (("one", 1), ("two", 2)):
        write_synthetic_drives(
            tmp_path / name,
            drives=2,
            seconds=0.5,
            config=TINY,
            workers=workers,
            progress=seen.append,
        )
    assert seen == [1] * 10 + [5, 5]
    assert_same_drives(tmp_path / "two", tmp_path / "one")


def test_drives_with_higher_numbers_equal_those_of_a_larger_set(tmp_path: Path) -> None:
    for name, first, drives in (("all", 0, 3), ("later", 2, 1)):
        write_synthetic_drives(
            tmp_path / name, drives=drives, first=first, seconds=0.5, worlds=1, config=TINY
        )
    for name in ("drive_000", "drive_001"):
        for path in (tmp_path / "all").glob(f"{name}.*"):
            path.unlink()
    for folder in ("all", "later"):
        (tmp_path / folder / "synthetic.json").unlink()
    assert_same_drives(tmp_path / "later", tmp_path / "all")


def test_other_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(DriveSimError, match="other files"):
        write_synthetic_drives(tmp_path, drives=1, seconds=1.0, config=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
    with pytest.raises(DriveSimError, match=r"mine\.txt: is a file, or a folder with other files"):
        write_synthetic_drives(tmp_path / "mine.txt", drives=1, seconds=1.0, config=TINY)


@pytest.mark.parametrize(("drives", "seconds"), [(0, 5.0), (1, 0.1), (1, -3.0)])
def test_too_few_drives_or_frames_are_an_error(tmp_path: Path, drives: int, seconds: float) -> None:
    with pytest.raises(DriveSimError, match="at least one drive"):
        write_synthetic_drives(tmp_path / "x", drives=drives, seconds=seconds, config=TINY)
    assert not (tmp_path / "x").exists()
