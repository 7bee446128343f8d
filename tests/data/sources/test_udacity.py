from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from tests.data.sources.recordings import only_drive, reason, row, shared, write_log

SIZE = FrameSize(height=16, width=32)


def test_a_plain_recording_has_nothing_to_say(tmp_path: Path) -> None:
    write_log(tmp_path, [row(n * 100) for n in range(5)])
    assert only_drive(tmp_path).notices == ()


def test_further_cells_do_not_count(tmp_path: Path) -> None:
    rows = [row(0, 0.25), row(100, 0.25, 10, ",,data,IMG,7,jpg,"), row(200, 0.25, 10, ",5")]
    write_log(tmp_path, rows)
    drive = only_drive(tmp_path)
    assert drive.notices == (
        "2 of the 3 rows of driving_log.csv have more than 7 cells; only the first 7 count",
    )
    np.testing.assert_allclose(sample(drive).actions[:, 0], 4.4704, rtol=1e-5)


def test_decimal_commas_are_not_taken_for_further_cells(tmp_path: Path) -> None:
    rows = [row(0, "0,25", "30,18"), row(100, "0,25", "30,18")]
    write_log(tmp_path, rows)
    assert "line 1: its numbers seem to have decimal commas" in reason(tmp_path)


def test_rows_without_a_picture_are_left_out_and_cut_the_drive(tmp_path: Path) -> None:
    pictures = write_log(tmp_path, [row(n * 100) for n in range(12)])
    for number in (4, 5, 11):
        pictures[number].unlink()
    drive = only_drive(tmp_path)
    assert drive.notices == ("3 of 12 pictures are missing; they are left out, which leaves gaps",)
    np.testing.assert_allclose(drive.timestamps, [0, 0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9, 1.0])
    assert sample(drive).segments == [(0, 4), (4, 9)]
    assert drive.reader.files(np.array([4])) == [pictures[6]]
    for picture in pictures[1:]:
        picture.unlink(missing_ok=True)
    assert "only 1 of its 12 pictures are in" in reason(tmp_path)


def test_each_take_is_a_drive(tmp_path: Path) -> None:
    starts = (60_000, 75_000, 0)  # A pause of more than 10 s, and a time that goes back.
    rows = [row(start + n * 100) for start in starts for n in range(20)]
    write_log(tmp_path / "sim", rows)
    for paths in ([tmp_path], [tmp_path / "sim"], [tmp_path / "sim" / "driving_log.csv"]):
        drive_set = find_drives(paths)
        assert [drive.id for drive in drive_set.drives] == [f"sim/take_{n}" for n in (1, 2, 3)]
    for drive in drive_set.drives:
        np.testing.assert_allclose(drive.timestamps, np.arange(20) / 10)
        assert sample(drive).action_valid.all()
    stamps = [drive.reader.files(np.array([0]))[0].name for drive in drive_set.drives]
    assert [stamp[-13:] for stamp in stamps] == ["00_59_000.jpg", "01_14_000.jpg", "59_59_000.jpg"]
    assert drive_set.notices == [
        "driving_log.csv contains 3 takes, because the times of its rows go back or jump by more "
        "than 10 s; each take is a drive (sim/take_1 and 2 more)"
    ]


def test_many_takes_stay_in_order_and_single_rows_are_left_out(tmp_path: Path) -> None:
    starts = [20_000 * n for n in range(12)]
    rows = [row(start + step) for start in starts for step in (0, 100)]
    write_log(tmp_path / "sim", rows[:3] + rows[4:])
    drive_set = find_drives([tmp_path])
    names = [f"sim/take_{n:02}" for n in (1, *range(3, 13))]
    assert [drive.id for drive in drive_set.drives] == names
    assert "1 of the takes have a single row and are left out" in drive_set.drives[0].notices


def test_a_pause_within_a_take_leaves_its_id(tmp_path: Path) -> None:
    write_log(tmp_path / "sim", [row(t) for t in (0, 100, 200, 10_200, 10_300)])
    drive = only_drive(tmp_path)
    assert (drive.id, drive.notices) == ("sim", ())


def test_a_log_that_is_not_in_order_of_time_is_an_error(tmp_path: Path) -> None:
    write_log(tmp_path, [row(100 * (n * 7 % 20)) for n in range(20)])
    assert "line 4: the time of the image is not later than in the row above (6 rows" in reason(
        tmp_path
    )
    write_log(tmp_path, [row(0), row(100), row(100), row(200)])
    assert "line 3: the time of the image is the same as in the row above" in reason(tmp_path)


SHADES = [30, 36, 42, 48, 54, 60, 66, 72, 78, 84]


@pytest.mark.parametrize(
    ("shades", "is_reset"),
    [
        ([*SHADES, 31], True),
        (SHADES, False),
        ([*SHADES, 88], False),  # The next picture of the drive.
        ([*SHADES, 140], False),  # A jump, but not back to the beginning.
        ([*SHADES, 72], False),  # The first picture is not far away, but not where it ends.
        ([*SHADES[::-1], 84], True),
        ([90] * 11, False),  # The car stands.
        ([30, 90, 30, 90, 30], False),  # Every step is a jump.
        ([30, 90, 30], False),
    ],
)
def test_a_last_picture_that_is_the_first_again_is_left_out(
    tmp_path: Path, shades: list[int], is_reset: bool
) -> None:
    write_log(tmp_path, [row(n * 100) for n in range(len(shades))], shades)
    drive = only_drive(tmp_path)
    assert len(drive.timestamps) == len(shades) - is_reset
    line = "the last picture is the first one again (a reset); it is left out"
    assert drive.notices == (line,) * is_reset
    assert len(list(drive.stream(SIZE))) == len(drive.timestamps)


def test_the_reset_is_sought_at_the_end_of_each_take(tmp_path: Path) -> None:
    rows = [row(start + n * 100) for start in (0, 60_000) for n in range(11)]
    write_log(tmp_path, rows, [*SHADES, 30, *SHADES, 90])
    assert [len(drive.timestamps) for drive in find_drives([tmp_path]).drives] == [10, 11]


def test_a_damaged_picture_at_the_end_does_not_keep_the_drive_from_being_found(
    tmp_path: Path,
) -> None:
    pictures = write_log(tmp_path, [row(n * 100) for n in range(6)])
    pictures[-1].write_text("no picture")
    assert len(only_drive(tmp_path).timestamps) == 6


@pytest.mark.parametrize("end", ["C:\\sim\\IMG\\center_2018_07", "center_2018_07.jpg,l,r,0.1,1,-"])
@pytest.mark.parametrize("newline", ["", "\n"])
def test_a_last_row_that_was_cut_off_is_left_out(tmp_path: Path, end: str, newline: str) -> None:
    write_log(tmp_path, [row(0), row(100), row(200)])
    log = tmp_path / "driving_log.csv"
    log.write_text(log.read_text() + end + newline)
    drive = only_drive(tmp_path)
    assert len(drive.timestamps) == 3
    assert drive.notices == ("the last row of driving_log.csv was cut off and is left out",)
    log.write_text("\n".join([row(0), end, row(100), row(200)]))
    assert "driving_log.csv, line 2: " in reason(tmp_path)


def test_a_number_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    write_log(tmp_path, [row(0), row(100), row(200, 0.1, "-")])
    assert len(only_drive(tmp_path).timestamps) == 2


def test_a_whole_last_row_that_is_impossible_is_an_error(tmp_path: Path) -> None:
    write_log(tmp_path, [row(0), row(100), row(200, 3.5)])
    assert "line 3: steering 3.5" in reason(tmp_path)


def test_a_real_log_with_further_cells() -> None:
    drive = only_drive(shared("format/udacity_13_cells"))
    assert len(drive.timestamps) == 150
    (line,) = drive.notices
    assert line.startswith("150 of the 150 rows of driving_log.csv have more than 7 cells")
    assert sample(drive).action_valid.all()


def test_a_real_take_that_ends_with_the_reset() -> None:
    drive = only_drive(shared("format/udacity_stray_last"))
    assert len(drive.timestamps) == 98
    assert drive.notices == ("the last picture is the first one again (a reset); it is left out",)
