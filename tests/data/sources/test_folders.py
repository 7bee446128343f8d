import shutil
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.inspect.inspection import inspect_drives
from driving_sim.data.sources import find_drives
from driving_sim.data.sources.video_folder import VIDEO_SUFFIXES
from driving_sim.data.synthetic.writer import write_synthetic_drives
from driving_sim.engine.errors import DriveSimError
from tests.data.sources.recordings import row, touch, write_actions, write_grey, write_log
from tests.fixtures.synthetic_worlds import TINY


class Recorder(NamedTuple):
    """A container and a codec that cameras write."""

    container: str
    codec: str
    height: int = 288
    width: int = 352


MPEG_2 = "mpeg2video"
RECORDERS = {
    ".mp4 .m4v .mov .f4v": Recorder("mp4", "libx264"),
    ".3gp .3g2": Recorder("3gp", "libx264"),
    ".flv": Recorder("flv", "flv"),
    ".mkv": Recorder("matroska", "libx264"),
    ".webm": Recorder("webm", "libvpx"),
    ".avi": Recorder("avi", "mjpeg"),
    ".ts .mts .m2ts .m2t .tod": Recorder("mpegts", "libx264"),
    ".mpg .mpeg .mod .vob": Recorder("vob", MPEG_2),
    ".m2v": Recorder("mpeg2video", MPEG_2),
    ".wmv .asf": Recorder("asf", "wmv2"),
    ".ogv": Recorder("ogg", "libvpx"),
    ".mxf": Recorder("mxf", MPEG_2),
    ".dv": Recorder("dv", "dvvideo", 576, 720),
    ".ivf": Recorder("ivf", "libvpx"),
    ".mjpg .mjpeg": Recorder("mjpeg", "mjpeg"),
    ".264 .h264": Recorder("h264", "libx264"),
    ".265 .h265 .hevc": Recorder("hevc", "libx265"),
}


def record(path: Path, recorder: Recorder) -> None:
    options = {"x265-params": "log-level=none:pools=1"} if recorder.codec == "libx265" else {}
    with av.open(str(path), "w", format=recorder.container) as container:
        stream = container.add_stream(recorder.codec, rate=25, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = recorder.width, recorder.height
        stream.pix_fmt = "yuvj420p" if recorder.codec == "mjpeg" else "yuv420p"
        for number in range(8):
            picture = np.full((recorder.height, recorder.width, 3), 25 * number, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


@pytest.mark.parametrize("suffixes", RECORDERS)
def test_what_cameras_write_is_read_in_any_case(tmp_path: Path, suffixes: str) -> None:
    names = [f"{n}{case(s)}" for n, s in enumerate(suffixes.split()) for case in (str, str.upper)]
    record(tmp_path / "first", RECORDERS[suffixes])
    for name in names:
        shutil.copy(tmp_path / "first", tmp_path / name)
    drive_set = find_drives([tmp_path], Reading(video_fps=None))
    assert drive_set.skipped == []
    assert {drive.video.path.name for drive in drive_set.drives if drive.video} == {*names}
    assert all(len(drive.timestamps) == 8 for drive in drive_set.drives)


def test_every_suffix_but_one_is_tested() -> None:
    tested = {suffix for suffixes in RECORDERS for suffix in suffixes.split()}
    assert VIDEO_SUFFIXES - tested == {".dav"}  # PyAV reads this container, but does not write it.


def test_other_files_are_counted_for_each_searched_folder(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    write_grey(one / "a.mp4", one / "trip" / "b.mkv", two / "c.mp4")
    touch(one, "x.JPG", "y.jpg", "trip/z.jpg", "notes.txt", "LICENSE", "odd.2024-01-01 9 AM")
    touch(one, ".hidden.jpg", ".cache/z.jpg", "trip/.hidden/z.jpg")
    touch(two, *(f"{n}.k{n}" for n in range(6)), "a.z", "b.z")
    drive_set = find_drives([one, two])
    assert drive_set.passed_over == [
        f"{one}: passed over 6 other files: 3 .jpg, 2 without a suffix, 1 .txt",
        f"{two}: passed over 8 other files: 2 .z, 1 .k0, 1 .k1, 1 .k2, 1 .k3, 1 .k4, "
        "1 of other kinds",
    ]
    assert drive_set.notices == drive_set.passed_over
    assert find_drives([one / "a.mp4", one / "trip" / "b.mkv"]).passed_over == []


def test_one_other_file_is_a_line_too(tmp_path: Path) -> None:
    write_grey(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").symlink_to(tmp_path / "nowhere.mp4")
    assert find_drives([tmp_path]).passed_over == [f"{tmp_path}: passed over 1 other file: 1 .mp4"]
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "b.mp4").symlink_to(tmp_path / "b.mp4")
    assert find_drives([tmp_path]).passed_over == [f"{tmp_path}: passed over 1 other file: 1 .mp4"]


def test_files_that_belong_to_a_drive_are_not_counted(tmp_path: Path) -> None:
    write_synthetic_drives(tmp_path / "synth", drives=1, seconds=1, config=TINY)
    write_log(tmp_path / "sim", [row(0), row(100)])
    touch(tmp_path / "sim", "IMG/left_1.jpg", "IMG/more/right_1.jpg")
    write_grey(tmp_path / "a.mp4")
    write_actions(tmp_path / "a.CSV")
    touch(tmp_path, "a.json")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["a", "sim", "synth/drive_000"]
    assert drive_set.passed_over == []
    # A JSON or CSV of another stem belongs to no drive, and an action file without a video is bad.
    touch(tmp_path, "b.json", "b.csv")
    write_actions(tmp_path / "c.csv")
    drive_set = find_drives([tmp_path])
    assert drive_set.passed_over == [f"{tmp_path}: passed over 2 other files: 1 .csv, 1 .json"]
    assert [skipped.id for skipped in drive_set.skipped] == ["c"]


def test_what_lies_beside_a_simulators_log_is_counted(tmp_path: Path) -> None:
    write_log(tmp_path / "sim", [row(0), row(100)])
    write_grey(tmp_path / "sim" / "run.mp4")
    touch(tmp_path / "sim", "model.h5", "more/a.h5", "more/.hidden.h5", "more/.git/a.h5")
    drive_set = find_drives([tmp_path / "sim"])
    assert [drive.id for drive in drive_set.drives] == ["sim"]
    assert drive_set.passed_over == [
        f"{tmp_path / 'sim'}: passed over 3 other files: 2 .h5, 1 .mp4"
    ]


def test_drives_have_the_wheelbase_of_their_folder(tmp_path: Path) -> None:
    write_grey(tmp_path / "a" / "x.mp4", tmp_path / "b" / "x.mp4")
    (tmp_path / "b" / "y.mp4").symlink_to(tmp_path / "a" / "x.mp4")
    drive_set = find_drives([tmp_path / "b"], Reading(wheelbase={str(tmp_path / "b"): 0.26}))
    assert [drive.wheelbase_m for drive in drive_set.drives] == [0.26, 0.26]
    drive_set = find_drives([tmp_path / "a"], Reading(wheelbase={str(tmp_path / "b"): 0.26}))
    assert [drive.wheelbase_m for drive in drive_set.drives] == [None]


def test_a_folder_without_drives_says_what_is_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.jpg", "b/c.jpg")
    with pytest.raises(DriveSimError, match=r"holds no videos .*passed over 2 other files: 2 \.jp"):
        find_drives([tmp_path])


def test_inspect_reports_the_other_files(tmp_path: Path) -> None:
    write_grey(tmp_path / "videos" / "a.mp4")
    touch(tmp_path / "videos", "b.jpg")
    report = inspect_drives([tmp_path / "videos"], tmp_path / "out")
    line = f"{tmp_path / 'videos'}: passed over 1 other file: 1 .jpg"
    assert report.notices == [line]
    assert f"assumed (1)\n  {line}" in report.table()
    assert line in (tmp_path / "out" / "inspection.json").read_text()


def test_inspect_says_what_it_passed_over_even_if_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    touch(tmp_path / "videos", "a.mp4", "b.jpg")
    with pytest.raises(DriveSimError, match="every drive was skipped"):
        inspect_drives([tmp_path / "videos"], tmp_path / "out")
    assert "passed over 1 other file: 1 .jpg" in capsys.readouterr().err


@pytest.mark.parametrize("mark", [";", "\t"])
@pytest.mark.parametrize("first", ["", "sep="])
def test_an_orphan_with_other_separators_is_an_action_file(
    tmp_path: Path, mark: str, first: str
) -> None:
    write_grey(tmp_path / "a.mp4")
    write_actions(tmp_path / "b.csv", "timestamp_s,speed_mps,road_wheel_rad", mark)
    if first:
        text = (tmp_path / "b.csv").read_text()
        (tmp_path / "b.csv").write_text(f"{first}{mark}\n{text}")
    drive_set = find_drives([tmp_path])
    assert [skipped.id for skipped in drive_set.skipped] == ["b"]
    assert drive_set.passed_over == []
    write_grey(tmp_path / "b.mp4")
    assert [drive.log is not None for drive in find_drives([tmp_path]).drives] == [False, True]


def test_columns_that_only_the_options_name_are_read_beside_a_video(tmp_path: Path) -> None:
    write_grey(tmp_path / "a.mp4")
    write_actions(tmp_path / "a.csv", "t,v_ego")
    assert [skipped.id for skipped in find_drives([tmp_path]).skipped] == ["a"]
    drive_set = find_drives([tmp_path], Reading(speed="v_ego"))
    assert drive_set.skipped == []
    assert drive_set.drives[0].log is not None
    assert drive_set.passed_over == []
