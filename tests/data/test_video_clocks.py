"""Videos without times take them from their CSV; a CSV must fit a clock that starts again."""

import re
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.sources import find_drives
from tests.fixtures.video_files import read_numbers, write_numbered, write_streams

NO_RATE = {"x265-params": "log-level=none:vui-timing-info=0"}


def raw(folder: Path) -> Path:
    return write_numbered(
        folder / "a.hevc", codec="libx265", container="hevc", codec_options=NO_RATE
    )


def write_csv(path: Path, times: np.ndarray, unit: str = "s") -> None:
    rows = [f"{time:.3f},{number / 4}" for number, time in enumerate(times)]
    path.write_text("\n".join([f"timestamp_{unit},speed_mps", *rows, ""]))


@pytest.mark.parametrize(
    ("start", "unit", "scale"), [(0, "s", 1), (5, "s", 1), (1.7e9, "ms", 1000)]
)
def test_a_row_for_each_frame_gives_the_frames_their_times(
    tmp_path: Path, start: float, unit: str, scale: float
) -> None:
    raw(tmp_path)
    times = np.cumsum(np.random.default_rng(0).integers(40, 70, 40)) / 1000
    write_csv(tmp_path / "a.csv", (start + times) * scale, unit)
    (drive,) = find_drives([tmp_path]).drives
    np.testing.assert_allclose(drive.timestamps, times - times[0], atol=2e-3)
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, drive.timestamps, atol=2e-3)
    (notice,) = drive.notices
    assert "the times of its frames are those of a.csv" in notice
    assert read_numbers(drive.stream(None, [0, 39])) == [0, 39]


def test_other_csvs_and_a_given_rate_do_not_change_the_frames_times(tmp_path: Path) -> None:
    raw(tmp_path)
    write_csv(tmp_path / "a.csv", np.arange(41) / 20)
    (drive,) = find_drives([tmp_path]).drives
    np.testing.assert_allclose(drive.timestamps, np.arange(40) / 25)
    assert "25 frames/s are assumed" in drive.notices[0]
    write_csv(tmp_path / "a.csv", np.arange(40) / 20)
    (drive,) = find_drives([tmp_path], Reading(video_fps=10)).drives
    np.testing.assert_allclose(drive.timestamps, np.arange(40) / 10)
    assert "10 frames/s are taken" in drive.notices[0]


def test_a_video_with_times_keeps_them(tmp_path: Path) -> None:
    write_numbered(tmp_path / "a.mp4")
    write_csv(tmp_path / "a.csv", np.arange(40) / 19)
    (drive,) = find_drives([tmp_path]).drives
    np.testing.assert_allclose(drive.timestamps, np.arange(40) / 20, atol=1e-3)
    assert drive.notices == ()


def test_the_stream_of_the_settings_is_read(tmp_path: Path) -> None:
    write_streams(tmp_path / "a.mp4", [range(40), range(100, 140)])
    for number in (0, 1):
        (drive,) = find_drives([tmp_path], Reading(stream=number)).drives
        assert read_numbers(drive.stream(None, [5])) == [5 + 100 * number]
        assert read_numbers(drive.frames([5])) == [5 + 100 * number]
        assert f"stream {1 - number} (h264" in drive.notices[0]
    (skipped,) = find_drives([tmp_path], Reading(stream=7)).skipped
    assert "has no video stream 7" in skipped.reason


def test_times_of_actions_do_not_fit_a_clock_that_starts_again(tmp_path: Path) -> None:
    part = write_numbered(tmp_path / "a.ts", container="mpegts").read_bytes()
    (tmp_path / "a.ts").write_bytes(part * 2)
    write_csv(tmp_path / "a.csv", np.arange(80) / 20)
    (skipped,) = find_drives([tmp_path]).skipped
    says = r"a\.csv: its times cannot be matched, .* a\.ts starts again after (1\.9|2\.0) s; number"
    assert re.search(says, skipped.reason)
    rows = [f"{number},{number / 8}" for number in range(80)]
    (tmp_path / "a.csv").write_text("\n".join(["frame,speed_mps", *rows, ""]))
    (drive,) = find_drives([tmp_path]).drives
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, drive.timestamps)
    assert any("its clock starts again" in notice for notice in drive.notices)
