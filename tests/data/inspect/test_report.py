"""What the report says about frame rates, gaps, assumptions and what cannot be told."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.inspect.drift import Drift
from driving_sim.data.inspect.inspection import inspect_drives
from driving_sim.data.inspect.report import Report
from driving_sim.data.inspect.steering_check import Synchrony
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import DriveSimError
from tests.fixtures.video_files import smooth_noise, write_numbered


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A drive of 5 s at 20 frames/s, in which 1 s is missing after 3.5 s, and a steady one."""
    folder = tmp_path / "videos"
    folder.mkdir()
    times = [*range(0, 3550, 50), *range(4550, 5050, 50)]
    write_numbered(folder / "gap.mp4", times_ms=times, count=len(times))
    write_numbered(folder / "steady.mp4", count=100)
    return folder


def test_a_frame_rate_shows_what_is_usable_at_it(videos: Path, tmp_path: Path) -> None:
    report = inspect_drives([videos], tmp_path / "out", fps=10)
    gap, steady = report.drives
    # The last run has only 0.45 s.
    assert gap.usable_share == pytest.approx(3.5 / 5, abs=0.01)
    assert (gap.gaps, steady.gaps) == (1, 0)
    assert gap.longest_gap_s == pytest.approx(1.05, abs=0.06)
    assert steady.usable_share == pytest.approx(1, abs=0.02)
    assert gap.fps == pytest.approx(20, rel=0.01)
    (line,) = [line for line in gap.notices if "gap" in line]
    assert line.startswith("1 gap without frames at this rate, ")
    assert f"{line} (gap)" in report.notices
    head, row, _, *rest = report.table().splitlines()
    at = head.index("usable")
    assert row[at:].split()[0] == "70%"
    assert sum(line.startswith("usable  ") for line in rest) == 1
    assert f"  {line} (gap)" in rest
    written = json.loads((tmp_path / "out" / "inspection.json").read_text())
    assert written["drives"][0]["usable_share"] == gap.usable_share
    assert line in written["drives"][0]["notices"]


def test_a_rate_that_cuts_the_frames_anew_is_a_notice_of_all_drives(
    videos: Path, tmp_path: Path
) -> None:
    report = inspect_drives([videos], tmp_path / "out", fps=8)
    (line,) = [line for line in report.notices if "resampled to 8" in line]
    assert line.endswith("(gap and 1 more)")
    # A stride is a frame rate too: one of two frames is missing in no gap.
    assert inspect_drives([videos], tmp_path / "out", every=2).drives[1].gaps == 0


def test_a_gap_belongs_to_the_frame_rate(tmp_path: Path) -> None:
    """One frame of 20 per second is missing: 10 per second need it not."""
    times = [time for time in range(0, 5000, 50) if time != 2050]
    video = write_numbered(tmp_path / "a.mp4", times_ms=times, count=len(times))
    (own,) = inspect_drives([video], tmp_path / "out").drives
    (sampled,) = inspect_drives([video], tmp_path / "out", fps=10).drives
    assert (own.gaps, sampled.gaps) == (1, 0)
    assert sampled.usable_share == pytest.approx(1, abs=0.02)


def test_without_a_frame_rate_nothing_is_resampled(videos: Path, tmp_path: Path) -> None:
    report = inspect_drives([videos], tmp_path / "out")
    gap, _ = report.drives
    assert (gap.gaps, gap.usable_share, gap.notices) == (1, None, ())
    assert "usable" not in report.table()
    assert report.notices == []


def test_a_wrong_frame_rate_is_an_error(videos: Path, tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="`fps` and `every` are both given"):
        inspect_drives([videos], tmp_path / "out", fps=10, every=2)
    with pytest.raises(DriveSimError, match="`fps` 0"):
        inspect_drives([videos], tmp_path / "out", fps=0)
    assert not (tmp_path / "out").exists()


def test_a_drives_own_notices_are_in_its_report(videos: Path, tmp_path: Path) -> None:
    rows = [f"{t / 20},5" for t in range(101)]
    (videos / "steady.csv").write_text("\n".join(["t,speed", *rows]))
    report = inspect_drives([videos], tmp_path / "out", every=2)
    assert any("speed is taken to be in m/s" in line for line in report.drives[1].notices)


def test_what_cannot_be_told_is_listed_apart_from_the_problems(
    videos: Path, tmp_path: Path
) -> None:
    report = inspect_drives([videos], tmp_path / "out")
    unknown = Synchrony(notices=("lag and sign are unknown: the car hardly turns",))
    drives = [replace(drive, synchrony=unknown) for drive in report.drives]
    table = Report(drives=drives, skipped=[], notices=[]).table()
    assert (
        "cannot tell (1)\n  lag and sign are unknown: the car hardly turns (gap and 1 more)"
    ) in table
    assert "problems (" not in table


def test_the_row_of_a_drift_has_both_lags(videos: Path, tmp_path: Path) -> None:
    report = inspect_drives([videos], tmp_path / "out")
    drift = Drift(lags=(1, 6), lags_s=(0.05, 0.3), measured_s=100)
    synchrony = Synchrony(lag_frames=4, lag_s=0.2, drift=drift, sign=1, correlation=0.9)
    drives = [replace(drive, synchrony=synchrony) for drive in report.drives]
    table = Report(drives=drives, skipped=[], notices=[]).table()
    assert " ".join(table.splitlines()[1].split()).endswith("0% +1 to +6 left + 0.90 none")


def test_a_drive_filmed_from_above_is_not_judged(tmp_path: Path) -> None:
    ground = smooth_noise(np.random.default_rng(1), 700, 256)
    frames = np.stack([ground[500 - 4 * t :][:128] for t in range(100)])
    pictures = frames[..., None].repeat(3, axis=-1).astype(np.uint8)
    write_video(tmp_path / "a.mp4", pictures, 10)
    rows = [f"{t / 10},8,{0.1 * np.sin(t / 5)}" for t in range(101)]
    (tmp_path / "a.csv").write_text("\n".join(["t,speed,steering", *rows]))
    reading = Reading(steering_kind="road_wheel")
    (drive,) = inspect_drives([tmp_path / "a.mp4"], tmp_path / "out", reading).drives
    assert drive.problems == ()
    assert "the camera looks at the ground from above" in drive.synchrony.notices[0]
