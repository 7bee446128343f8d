import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import sample
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.inspect.inspection import inspect_drives
from driving_sim.data.sources import find_drives, pictures
from driving_sim.data.sources.pictures.names import Series, find_series, moment
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.engine.errors import BadDriveError, DriveSimError
from tests.data.sources.recordings import (
    greys,
    only_drive,
    reason,
    touch,
    write_csv,
    write_grey,
    write_pictures,
)

COUNT = 12
NUMBERED = [f"frame_{n:04}.png" for n in range(COUNT)]
EPOCH = 1_532_402_927_612_460
STAMPED = [f"cam__{EPOCH + 100_000 * n}.png" for n in range(COUNT)]


def test_the_pictures_of_an_inspection_are_no_drive(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    touch(tmp_path, "inspection.json")
    with pytest.raises(DriveSimError, match=r"passed over 13 other files"):
        find_drives([tmp_path])


def test_numbered_pictures_take_the_rate_that_is_set(tmp_path: Path) -> None:
    write_pictures(tmp_path / "run", NUMBERED)
    drive_set = find_drives([tmp_path], Reading(video_fps=8))
    (drive,) = drive_set.drives
    assert (drive.id, drive.log) == ("run", None)
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 8)
    assert drive_set.passed_over == []
    drive = only_drive(tmp_path)
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 25)
    assert drive.notices == (
        "nothing says when the pictures were taken; 25 frames/s are assumed (set it with "
        "`video_fps`)",
    )


def test_numbers_are_sorted_as_numbers_and_holes_are_gaps(tmp_path: Path) -> None:
    names = [f"{5 * n}.png" for n in range(2, 22)]
    write_pictures(tmp_path, names)
    (tmp_path / names[7]).unlink()
    (tmp_path / names[8]).unlink()
    drive = only_drive(tmp_path, Reading(video_fps=10))
    kept = [n for n in range(20) if n not in (7, 8)]
    assert greys(drive) == kept
    np.testing.assert_allclose(drive.timestamps, np.array(kept) / 10)
    assert sample(drive).segments == [(0, 7), (7, 18)]
    assert drive.notices[1:] == (
        "2 numbers have no picture, which leaves gaps",
        "the numbers of the pictures rise by 5; each is one frame",
    )


def test_times_in_names_are_read(tmp_path: Path) -> None:
    write_pictures(tmp_path, STAMPED)
    rows: list[list[object]] = [[EPOCH + 50_000 + 100_000 * n, n] for n in range(COUNT)]
    write_csv(tmp_path / "log.csv", "timestamp_us,speed_mps", rows)
    drive = only_drive(tmp_path)
    assert drive.notices == ()
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 10, atol=1e-5)
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, np.arange(COUNT) / 10 + 0.05, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("center_2018_07_16_17_12_55_715.jpg", 1531761175.715),
        ("2018-07-16T17:12:55.5.png", 1531761175.5),
        ("20180716_171255_25.png", 1531761175.25),
        ("1531761175.715.png", 1531761175.715),
        ("a_1531761175715.png", 1531761175.715),
        ("a-1531761175715000.png", 1531761175.715),
        ("1531761175715000000.png", 1531761175.715),
        ("20180716_171255.jpg", None),
        ("0000000012.png", None),
        ("2018_17_16_17_12_55_715.jpg", None),
        ("frame_0001.png", None),
    ],
)
def test_the_time_in_a_name(name: str, seconds: float | None) -> None:
    taken = moment(name)
    assert (taken and taken.seconds) == (seconds and pytest.approx(seconds, abs=1e-5))


@pytest.mark.parametrize("first", [0, 1])
def test_a_csv_counts_with_the_pictures(tmp_path: Path, first: int) -> None:
    names = [f"{n + first:03}.png" for n in range(COUNT)]
    write_pictures(tmp_path, names)
    rows: list[list[object]] = [[n + first, n] for n in range(COUNT)]
    write_csv(tmp_path / "a.csv", "frame,speed_mps", rows)
    drive = only_drive(tmp_path, Reading(video_fps=10))
    np.testing.assert_allclose(sample(drive).actions[:-1, 0], np.arange(COUNT - 1) + 0.5, rtol=1e-5)
    assert len(drive.notices) == 1 + first
    if first:
        rows = [[n, n] for n in range(COUNT)]
        write_csv(tmp_path / "a.csv", "frame,speed_mps", rows)
        drive = only_drive(tmp_path, Reading(video_fps=10))
        expected = np.arange(COUNT - 1) + 0.5
        np.testing.assert_allclose(sample(drive).actions[:-1, 0], expected, rtol=1e-5)
        assert "frame 0 of a.csv is 001.png" in drive.notices[1]


def test_a_csv_with_a_row_for_each_picture_gives_the_times(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    rows: list[list[object]] = [[1e9 + n / 8, n] for n in range(COUNT)]
    write_csv(tmp_path / "a.csv", "timestamp_s,speed_mps", rows)
    drive = only_drive(tmp_path)
    np.testing.assert_allclose(drive.timestamps, np.arange(COUNT) / 8, atol=1e-6)
    np.testing.assert_allclose(sample(drive).actions[:-1, 0], np.arange(COUNT - 1) + 0.5, atol=1e-4)
    assert drive.notices == (
        "the times of the pictures are those of a.csv, which has a row for each",
    )


@pytest.mark.parametrize(
    "names",
    [
        [f"IMG_{n:04}.jpg" for n in range(30)],
        [f"DSC{n:05}.jpg" for n in range(30)],
        [f"P10100{n:02}.jpg" for n in range(30)],
        [f"20180716_{n:02}1255.jpg" for n in range(20)],
        [f"20180716_1712{n:02}_000.jpg" for n in range(0, 40, 3)],  # 3 s apart
        [f"IMG_20180716_171255_{n:03}.jpg" for n in range(1, 13)],  # a burst
        [f"20180716_171255_{n:03}.jpg" for n in range(1, 13)],
        [f"trip {n * n}.jpg" for n in range(30)],
        [f"{n}.jpg" for n in range(9)],
        ["cat.jpg", "dog.png", "10.jpg", "11.jpg"],
    ],
)
def test_photos_are_no_drive(tmp_path: Path, names: list[str]) -> None:
    touch(tmp_path / "photos", *names)
    write_grey(tmp_path / "a.mp4")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["a"]
    assert f"passed over {len(names)} other files" in drive_set.passed_over[0]


def test_numbered_photos_of_different_sizes_are_no_drive(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    Image.new("L", (32, 64)).save(tmp_path / NUMBERED[-1])
    with pytest.raises(DriveSimError, match=r"passed over 12 other files: 12 \.png"):
        find_drives([tmp_path])


def test_several_cameras_and_videos_in_one_folder(tmp_path: Path) -> None:
    for camera in ("left", "right"):
        write_pictures(tmp_path / "x", [f"{camera}_{n:02}.png" for n in range(COUNT)])
    write_grey(tmp_path / "x" / "a.mp4")
    write_pictures(tmp_path / "x" / "more", NUMBERED)
    touch(tmp_path / "x", "odd.jpg")
    drive_set = find_drives([tmp_path])
    # Beside a video, pictures without a CSV are thumbnails.
    assert [d.id for d in drive_set.drives] == ["x/a", "x/more"]
    line = f"{tmp_path}: passed over 25 other files: 24 .png, 1 .jpg"
    assert drive_set.passed_over == [line]
    (tmp_path / "x" / "a.mp4").unlink()
    drive_set = find_drives([tmp_path])
    assert [d.id for d in drive_set.drives] == ["x/left", "x/more", "x/right"]
    assert drive_set.passed_over == [f"{tmp_path}: passed over 1 other file: 1 .jpg"]


def test_a_csv_beside_the_folder_of_the_pictures_holds_their_actions(tmp_path: Path) -> None:
    rows: list[list[object]] = [[n, n] for n in range(COUNT)]
    write_pictures(tmp_path / "drive" / "frames", NUMBERED)
    write_csv(tmp_path / "drive" / "actions.csv", "frame,speed_mps", rows)
    for name in ("a", "b"):
        write_pictures(tmp_path / "set" / name, NUMBERED)
        doubled: list[list[object]] = [[n, 2 * n if name == "b" else n] for n in range(COUNT)]
        write_csv(tmp_path / "set" / f"{name}.csv", "frame,speed_mps", doubled)
    write_pictures(tmp_path / "set" / "c", NUMBERED)
    drive_set = find_drives([tmp_path], Reading(video_fps=10))
    assert drive_set.skipped == []
    assert drive_set.passed_over == []
    ids = ["drive/frames", "set/a", "set/b", "set/c"]
    assert [drive.id for drive in drive_set.drives] == ids
    for drive, factor in zip(drive_set.drives, (1, 1, 2, None), strict=True):
        assert greys(drive) == [*range(COUNT)]
        assert (drive.log is None) == (factor is None)
        if factor is not None:
            expected = factor * (np.arange(COUNT - 1) + 0.5)
            np.testing.assert_allclose(sample(drive).actions[:-1, 0], expected, rtol=1e-5)


def test_a_bad_csv_does_not_keep_stamped_pictures_from_training_a_tokenizer(tmp_path: Path) -> None:
    write_pictures(tmp_path, STAMPED)
    (tmp_path / "a.csv").write_text("t,speed_mps\n0,x\n1,y\n")
    assert "a.csv, line 2: " in reason(tmp_path)
    assert len(find_drives([tmp_path], actions=False).drives) == 1


def test_several_csvs_for_one_series_are_an_error(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    for name in ("a.csv", "b.csv"):
        write_csv(tmp_path / name, "t,speed_mps", [[0, 1], [1, 1]])
    assert "several CSVs may belong to its pictures (a.csv, b.csv)" in reason(tmp_path)


def test_a_damaged_picture_costs_one_frame(tmp_path: Path) -> None:
    write_pictures(tmp_path / "in", NUMBERED)
    (tmp_path / "in" / NUMBERED[5]).write_bytes(b"\x89PNG\r\n\x1a\n broken")
    drive = only_drive(tmp_path / "in", Reading(video_fps=10))
    size = FrameSize(height=16, width=32)
    lost = [number for number, frame in enumerate(drive.stream_with_losses(size)) if frame is None]
    assert lost == [5]
    with pytest.raises(DriveSimError, match=r"frame_0005\.png: cannot be read as an image"):
        drive.frames([5], size)
    report = inspect_drives([tmp_path / "in"], tmp_path / "out", Reading(video_fps=10))
    assert any("damaged at 0.50 s" in line for line in report.notices)
    (tmp_path / "in" / NUMBERED[5]).unlink()
    with pytest.raises(DriveSimError, match=r"frame_0005\.png: cannot be read"):
        list(drive.stream(size))


def test_pictures_of_several_sizes_need_a_size(tmp_path: Path) -> None:
    write_pictures(tmp_path, NUMBERED)
    Image.new("L", (32, 64)).save(tmp_path / NUMBERED[5])
    frames = ImageFrames(tuple(tmp_path / name for name in NUMBERED))
    for read in (lambda: frames.read(np.arange(COUNT), None), lambda: [*frames.stream(None, None)]):
        with pytest.raises(BadDriveError, match=r"has 32×64 pixels, but .* 64×32"):
            read()
    assert frames.read(np.arange(COUNT), FrameSize(height=16, width=32)).shape[0] == COUNT
    rows: list[list[object]] = [[name, n / 10] for n, name in enumerate(NUMBERED)]
    write_csv(tmp_path / "a.csv", "image,t", rows)
    Image.new("L", (32, 64)).save(tmp_path / NUMBERED[-1])
    assert "different sizes, such as 64×32 and 32×64" in only_drive(tmp_path).notices[-1]


def test_pictures_are_turned_as_their_tags_say_and_deep_ones_are_refused(tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 32))
    exif = picture.getexif()
    exif[0x0112] = 6  # The camera was held upright.
    picture.save(tmp_path / "a.jpg", exif=exif)
    assert ImageFrames((tmp_path / "a.jpg",)).read(np.array([0]), None).shape == (1, 64, 32, 3)
    Image.new("I;16", (64, 32), 300).save(tmp_path / "b.png")
    with pytest.raises(BadDriveError, match="more than 8 bits"):
        ImageFrames((tmp_path / "b.png",)).read(np.array([0]), None)


def test_the_text_before_a_time_tells_cameras_apart(tmp_path: Path) -> None:
    for camera in ("cam0", "cam1", "LEFT"):
        write_pictures(tmp_path, [f"{camera}_{EPOCH + 100_000 * n}.png" for n in range(COUNT)])
    drive_set = find_drives([tmp_path])
    assert [drive.id.split("/")[1] for drive in drive_set.drives] == ["LEFT", "cam0", "cam1"]
    assert [len(drive.timestamps) for drive in drive_set.drives] == [COUNT] * 3


def test_frames_count_past_a_missing_picture(tmp_path: Path) -> None:
    names = [f"{n:03}.png" for n in range(1, COUNT + 1)]
    write_pictures(tmp_path, names)
    (tmp_path / names[4]).unlink()
    write_csv(tmp_path / "a.csv", "frame,speed_mps", [[n, n] for n in range(1, COUNT + 1)])
    drive = only_drive(tmp_path, Reading(video_fps=10))
    assert drive.log is not None
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, np.arange(COUNT) / 10)
    np.testing.assert_allclose(drive.timestamps[3:5], [0.3, 0.5])
    write_csv(tmp_path / "a.csv", "frame,speed_mps", [[n, n] for n in range(COUNT - 1)])
    assert "does not count as the names of the pictures do" in reason(tmp_path)


def test_an_unclear_csv_names_the_folders_that_it_may_belong_to(tmp_path: Path) -> None:
    for folder in ("left", "right"):
        write_pictures(tmp_path / folder, NUMBERED)
    write_csv(tmp_path / "log.csv", "frame,speed_mps", [[n, n] for n in range(COUNT)])
    drive_set = find_drives([tmp_path])
    assert [drive.log for drive in drive_set.drives] == [None, None]
    (skipped,) = drive_set.skipped
    assert "log.csv: may belong to the pictures in left, right; give it" in skipped.reason
    assert "such as left.csv" in skipped.reason
    assert find_drives([tmp_path], actions=False).skipped == []


def test_only_what_is_used_is_not_counted(tmp_path: Path) -> None:
    rows: list[list[object]] = [[n, n] for n in range(COUNT)]
    write_pictures(tmp_path / "run", [*NUMBERED, "cover.jpg"])
    write_csv(tmp_path / "run.csv", "frame,speed_mps", rows)
    write_grey(tmp_path / "run" / "more" / "a.mp4")
    write_pictures(tmp_path / "b", NUMBERED)
    write_csv(tmp_path / "b" / "log.csv", "frame,speed_mps", rows)
    write_csv(tmp_path / "b" / "tags.csv", "x,y", rows)
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["b", "run", "run/more/a"]
    assert [drive.log is not None for drive in drive_set.drives] == [True, True, False]
    line = f"{tmp_path}: passed over 2 other files: 1 .csv, 1 .jpg"
    assert drive_set.passed_over == [line]


def test_many_csvs_and_folders_are_all_read(tmp_path: Path) -> None:
    for number in range(101):
        touch(tmp_path, f"{number:03}/x.txt")
        write_csv(tmp_path / f"a{number:03}.csv", "x,y", [[1, 2]])
    write_pictures(tmp_path / "zz", NUMBERED)
    write_csv(tmp_path / "zz.csv", "frame,speed_mps", [[n, n] for n in range(COUNT)])
    assert only_drive(tmp_path).log is not None


def test_damaged_exif_data_cost_no_frame_and_are_not_printed(tmp_path: Path) -> None:
    entry = (0x0112).to_bytes(2, "little") + (3).to_bytes(2, "little") + b"\xff" * 8
    exif = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + entry
    Image.new("RGB", (64, 32)).save(tmp_path / "a.jpg", exif=exif)
    code = (
        "import sys; from pathlib import Path; import numpy as np\n"
        "from driving_sim.data.image_frames import ImageFrames\n"
        "print(ImageFrames((Path(sys.argv[1]),)).read(np.array([0]), None).shape)"
    )
    command = [sys.executable, "-P", "-c", code, str(tmp_path / "a.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("(1, 32, 64, 3)\n", "")


def test_a_folder_is_searched_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_pictures(tmp_path, NUMBERED)
    searched = []

    def counted(names: Iterable[str]) -> list[Series]:
        searched.append(names)
        return find_series(names)

    monkeypatch.setattr(pictures, "find_series", counted)
    only_drive(tmp_path)
    assert len(searched) == 1
