import math
import os
import shutil
import signal
import struct
import zlib
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from driving_sim.data.actions.action_log import SPEED, STEERING
from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.tokens.plan import PlannedDrive
from driving_sim.data.video import decoder_pool as decoder_process
from driving_sim.data.video import file as video_file
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.writer import write_video
from driving_sim.engine.errors import DriveSimError
from tests import SHARED

SIZE = FrameSize(height=16, width=32)


def write_grey_video(path: Path, seconds: float = 1.0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.full((round(seconds * 10), 16, 32, 3), 90, np.uint8), 10)


def write_csv(path: Path, start: float = 0.0) -> None:
    rows = [f"{start + t / 10:.1f},{t},0.1" for t in range(10)]
    path.write_text("\n".join(["timestamp_s,speed_mps,road_wheel_rad", *rows]))


def shared(name: str) -> Path:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return SHARED / name


def test_a_folder_of_videos_with_and_without_actions(tmp_path: Path) -> None:
    write_grey_video(tmp_path / "b.mp4")
    write_csv(tmp_path / "b.csv")
    write_grey_video(tmp_path / "trip.1" / "a.mkv")
    write_grey_video(tmp_path / ".hidden.mp4")
    (tmp_path / "metrics.csv").write_text("epoch,loss\n0,1\n")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["b", "trip.1/a"]
    assert [drive.log is not None for drive in drive_set.drives] == [True, False]
    assert drive_set.skipped == []
    assert drive_set.steering_kind == "road_wheel"
    assert drive_set.drives[0].frames([3], SIZE).shape == (1, 16, 32, 3)


def test_unusable_files_are_skipped_and_the_rest_is_kept(tmp_path: Path) -> None:
    write_grey_video(tmp_path / "good.mp4")
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video " * 100)
    write_grey_video(tmp_path / "late.mp4")
    write_csv(tmp_path / "late.csv", start=100)
    write_csv(tmp_path / "orphan.csv")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["good"]
    reasons = {skipped.id: skipped.reason for skipped in drive_set.skipped}
    assert set(reasons) == {"empty", "late", "orphan", "text"}
    assert "`time_offset`" in reasons["late"]
    assert "no video beside it" in reasons["orphan"]
    assert not any("\n" in reason for reason in reasons.values())
    shifted = find_drives([tmp_path / "late.mp4"], Reading(time_offset=-100))
    assert [drive.id for drive in shifted.drives] == ["late"]


def test_a_file_that_hangs_is_skipped_and_the_rest_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        write_grey_video(tmp_path / f"{name}.mp4")
    ask = decoder_process._Decoder.ask

    def stop_at_a(decoder: decoder_process._Decoder, path: Path, **request: Any) -> None:
        if path.name == "a.mp4":
            if not decoder._has_started:
                decoder._wait(decoder._output)
            os.kill(decoder.process.pid, signal.SIGSTOP)
        ask(decoder, path, **request)

    monkeypatch.setattr(decoder_process._Decoder, "ask", stop_at_a)
    monkeypatch.setenv(decoder_process.LIMIT, "2")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["b", "c"]
    (bad,) = drive_set.skipped
    assert bad.id == "a"
    assert "a.mp4: its decoder gave no sign of life" in bad.reason


def test_without_actions_no_log_is_read(tmp_path: Path) -> None:
    write_grey_video(tmp_path / "a.mp4")
    (tmp_path / "a.csv").write_text("time,steering,speed\n0,nonsense,1\n")
    write_csv(tmp_path / "orphan.csv")
    write_recording(tmp_path / "sim", [row(0, 0.5, 10), row(100, 0.5, 10)])
    assert {skipped.id for skipped in find_drives([tmp_path]).skipped} == {"a", "orphan"}
    drive_set = find_drives([tmp_path], actions=False)
    assert drive_set.skipped == []
    assert [(drive.id, drive.log) for drive in drive_set.drives] == [("a", None), ("sim", None)]


def test_an_unknown_kind_of_steering_is_an_error() -> None:
    with pytest.raises(DriveSimError, match=r"hovering: unknown; choose steering_wheel, "):
        Reading(steering_kind="hovering")  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", [".CSV", ".Csv"])
def test_the_case_of_a_logs_suffix_does_not_matter(tmp_path: Path, suffix: str) -> None:
    write_grey_video(tmp_path / "a.mp4")
    write_csv(tmp_path / f"a{suffix}")
    write_csv(tmp_path / f"orphan{suffix}")
    drive_set = find_drives([tmp_path])
    assert [drive.log is not None for drive in drive_set.drives] == [True]
    assert [skipped.id for skipped in drive_set.skipped] == ["orphan"]


def test_names_of_screen_recordings_are_fine(tmp_path: Path) -> None:
    name = "Screen Recording 2024-01-01 at 9.41.00\u202fAM"
    write_grey_video(tmp_path / f"{name}.mp4")
    (drive,) = find_drives([tmp_path]).drives
    assert drive.id == PlannedDrive(id=drive.id, frames=1).id == name


@pytest.mark.parametrize(
    ("name", "reason"), [("a~mirror", "mirrored drives; rename"), ("a\nb", "control characters")]
)
def test_names_that_no_drive_can_have_are_errors(tmp_path: Path, name: str, reason: str) -> None:
    write_grey_video(tmp_path / f"{name}.mp4")
    with pytest.raises(DriveSimError, match=reason) as caught:
        find_drives([tmp_path])
    assert "\n" not in str(caught.value)


def test_ids_stay_unique(tmp_path: Path) -> None:
    for name in ("one/a.mp4", "one/a.mkv", "two/a.mp4"):
        write_grey_video(tmp_path / name)

    def ids(*names: str) -> list[str]:
        return [drive.id for drive in find_drives([tmp_path / name for name in names]).drives]

    assert ids("two", "two/a.mp4") == ["a"]
    assert ids("one/a.mp4", "one/a.mkv") == ["a.mkv", "a.mp4"]
    assert ids("one") == ["a.mkv", "a.mp4"]
    assert ids("one", "two") == ["one/a.mkv", "one/a.mp4", "two/a.mp4"]


def test_paths_that_hold_nothing_are_errors(tmp_path: Path) -> None:
    with pytest.raises(DriveSimError, match="no such file or folder"):
        find_drives([tmp_path / "nowhere"])
    with pytest.raises(DriveSimError, match="holds no videos"):
        find_drives([tmp_path])
    write_csv(tmp_path / "a.csv")
    with pytest.raises(DriveSimError, match="is a CSV; pass the video"):
        find_drives([tmp_path / "a.csv"])


def test_the_track_is_read_as_recorded() -> None:
    drive_set = find_drives([shared("track")], Reading(steering_kind="road_wheel"))
    assert [drive.id for drive in drive_set.drives] == [f"drive_{n:02d}" for n in range(8)]
    assert len(drive_set.notices) == 2
    for drive in drive_set.drives:
        assert drive.log is not None
        assert drive.log.speed is not None
        np.testing.assert_allclose(
            drive.timestamps, drive.log.speed.times[: len(drive.timestamps)], atol=2e-3
        )
        assert sample(drive, every=2).action_valid.mean() > 0.98
    unsaid = find_drives([shared("track")])
    assert unsaid.drives == []
    assert all("`steering_kind`" in skipped.reason for skipped in unsaid.skipped)


def write_recording(folder: Path, rows: list[str], *, header: bool = False) -> None:
    (folder / "IMG").mkdir(parents=True, exist_ok=True)
    for row in rows:
        name = row.split(",")[0].replace("\\", "/").rsplit("/", 1)[-1]
        Image.new("RGB", (64, 32), (10, 200, 30)).save(folder / "IMG" / name)
    names = ["center,left,right,steering,throttle,brake,speed"] if header else []
    (folder / "driving_log.csv").write_text("\n".join([*names, *rows]) + "\n")


def row(millisecond: int, steering: object, speed: float, folder: str = "C:\\a b\\IMG\\") -> str:
    moment = datetime(2018, 7, 16, 23, 59, 59) + timedelta(milliseconds=millisecond)
    stamp = moment.strftime("%Y_%m_%d_%H_%M_%S_%f")[:-3]
    return f"{folder}center_{stamp}.jpg,l.jpg,r.jpg,{steering},1,0,{speed}"


@pytest.mark.parametrize("header", [False, True])
@pytest.mark.parametrize("folder", ["C:\\a b\\IMG\\", "/home/x/IMG/", "IMG/"])
def test_a_udacity_recording_in_si_units(tmp_path: Path, header: bool, folder: str) -> None:
    rows = [row(900, 0.5, 10, folder), row(1000, 0.5, 10, folder), row(1100, 0.5, 10, folder)]
    write_recording(tmp_path / "sim", rows, header=header)
    (drive,) = find_drives([tmp_path]).drives
    assert (drive.id, drive.source) == ("sim", "udacity")
    np.testing.assert_allclose(drive.timestamps, [0, 0.1, 0.2])
    sampled = sample(drive)
    np.testing.assert_allclose(sampled.actions[:, 0], 4.4704, rtol=1e-5)
    np.testing.assert_allclose(sampled.actions[:, 1], -math.radians(12.5), rtol=1e-5)
    assert drive.log is not None
    assert drive.log.steering_kind == "road_wheel"
    frames = drive.frames([2, 0], SIZE)
    assert frames.shape == (2, 16, 32, 3)
    np.testing.assert_allclose(frames.mean(axis=(0, 1, 2)), [10, 200, 30], atol=3)
    np.testing.assert_array_equal(list(drive.stream(SIZE, [0, 2])), frames[::-1])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(0, 0.5, 10)], "has 1 rows"),
        (
            [row(100, 0.5, 10), row(0, 0.5, 10)],
            "line 2: the time of the image is not later than in",
        ),
        ([row(0, 0.5, 10), row(100, 3.5, 10)], "line 2: steering 3.5"),
        ([row(0, 0.5, 10), row(100, "left", 10), row(200, 0, 10)], "line 2: could not convert"),
        (
            [row(0, 0.5, 10), "center-1.jpg,l.jpg,r.jpg,0,1,0,10"],
            "line 2: the name 'center-1.jpg' contains",
        ),
        ([row(0, 0.5, 10), "a.jpg,b.jpg", row(200, 0, 10)], "line 2: has 2 cells"),
    ],
)
def test_a_bad_udacity_log_names_the_line(tmp_path: Path, rows: list[str], message: str) -> None:
    write_recording(tmp_path, rows)
    (skipped,) = find_drives([tmp_path]).skipped
    assert message in skipped.reason


def test_udacity_images_cannot_be_links_out_of_the_recording(tmp_path: Path) -> None:
    rows = [row(0, 0, 10), row(100, 0, 10)]
    write_recording(tmp_path / "sim", rows)
    image = max((tmp_path / "sim" / "IMG").iterdir())
    secret = image.rename(tmp_path / "secret.jpg")
    image.symlink_to(secret)
    (skipped,) = find_drives([tmp_path / "sim"]).skipped
    assert "line 2" in skipped.reason
    assert "is a link that leads outside" in skipped.reason
    # A link within the recording is allowed.
    image.unlink()
    (tmp_path / "sim" / "more").mkdir()
    image.symlink_to(secret.rename(tmp_path / "sim" / "more" / "a.jpg"))
    assert len(find_drives([tmp_path / "sim"]).drives) == 1


@pytest.mark.parametrize("name", ["..", "/", "", "IMG/..", "9" * 300])
def test_udacity_names_of_no_image_name_the_line(tmp_path: Path, name: str) -> None:
    write_recording(tmp_path, [row(0, 0, 10), row(100, 0, 10)])
    with (tmp_path / "driving_log.csv").open("a") as log:
        log.write(f"{name},l,r,0,0,0,1\n")
    (skipped,) = find_drives([tmp_path]).skipped
    assert "line 3" in skipped.reason


def test_a_hostile_udacity_image_gives_a_one_line_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recording(tmp_path / "sim", [row(0, 0, 10), row(100, 0, 10), row(200, 0, 10)])
    (drive,) = find_drives([tmp_path / "sim"]).drives
    first, second, third = sorted((tmp_path / "sim" / "IMG").iterdir())
    claim_image_size(first, 60_000, 60_000)  # Pillow refuses this size.
    claim_image_size(second, 10_000, 10_000)  # Pillow warns of this size.
    Image.new("RGB", (64, 32)).save(third, format="TIFF")  # No camera writes TIFF.
    for number in range(3):
        with pytest.raises(DriveSimError, match=rf"IMG/.*{number}00\.jpg: cannot be read as an im"):
            drive.frames([number], SIZE)
    Image.new("RGB", (64, 32)).save(first)
    assert drive.frames([0], SIZE).shape == (1, 16, 32, 3)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 32 - 1)
    with pytest.raises(DriveSimError, match="64×32 pixels"):
        drive.frames([0], SIZE)
    monkeypatch.setattr(video_file, "MAX_PIXELS", 64 * 64)
    with pytest.raises(DriveSimError, match="128×64 pixels"):  # Scaled to cover the size.
        drive.frames([0], FrameSize(height=64, width=64))


def claim_image_size(path: Path, height: int, width: int) -> None:
    """Write a PNG of one pixel whose header claims this size."""
    Image.new("RGB", (1, 1)).save(path, format="PNG")
    content = path.read_bytes()
    start = content.index(b"IHDR")
    header = b"IHDR" + struct.pack(">II", width, height) + content[start + 12 : start + 17]
    check = struct.pack(">I", zlib.crc32(header))
    path.write_bytes(content[:start] + header + check + content[start + 21 :])


def test_udacity_images_are_scaled_like_the_same_video(tmp_path: Path) -> None:
    gradient = np.linspace(0, 255, 320).astype(np.uint8)
    picture = np.ascontiguousarray(np.broadcast_to(gradient[None, :, None], (160, 320, 3)))
    write_recording(tmp_path / "sim", [row(0, 0, 10), row(100, 0, 10)])
    for path in (tmp_path / "sim" / "IMG").iterdir():
        Image.fromarray(picture).save(path, quality=100)
    write_video(tmp_path / "a.mp4", np.stack([picture] * 2), 10)
    video, simulator = find_drives([tmp_path]).drives
    for size in (FrameSize(height=64, width=128), FrameSize(height=40, width=40)):
        difference = video.frames([0], size).astype(int) - simulator.frames([0], size)
        assert np.abs(difference).mean() < 2


def test_the_simulators_own_recording() -> None:
    (drive,) = find_drives([shared("udacity_raw")]).drives
    assert len(drive.timestamps) == 150
    sampled = sample(drive, every=2)
    assert sampled.action_valid.all()
    np.testing.assert_allclose(sampled.actions[:, 0], 30.19 * 0.44704, rtol=1e-2)


FRAMES_IN_SEGMENT = 1200


def write_raw_hevc(path: Path, frames: int) -> None:
    """Write frames whose left half is as bright as n % 100, and whose right half as n // 100."""
    with av.open(str(path), "w", format="hevc") as container:
        stream = container.add_stream("libx265", rate=20)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.options = {"preset": "ultrafast", "x265-params": "log-level=none:pools=1"}
        for number in range(frames):
            picture = np.zeros((32, 64, 3), np.uint8)
            picture[:, :32], picture[:, 32:] = 2 * (number % 100), 15 * (number // 100)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def segment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment with the logs of a real one and a made-up video."""
    root = tmp_path_factory.mktemp("comma2k19")
    shutil.copytree(shared("comma2k19"), root, dirs_exist_ok=True, copy_function=shutil.copyfile)
    for folder in root.rglob("*"):
        if folder.is_dir():
            folder.chmod(0o755)
    path = next(root.glob("*/40"))
    write_raw_hevc(path / "video.hevc", FRAMES_IN_SEGMENT)
    return path


def test_a_comma2k19_segment(segment: Path) -> None:
    (drive,) = find_drives([segment.parents[1]]).drives
    assert drive.id == f"{segment.parent.name}/40"
    assert drive.source == "comma2k19"
    np.testing.assert_allclose(np.diff(drive.timestamps), 0.05, atol=2e-3)
    assert len(drive.timestamps) == FRAMES_IN_SEGMENT
    sampled = sample(drive, fps=10)
    assert len(sampled.indices) == FRAMES_IN_SEGMENT // 2
    assert sampled.action_valid.all()


def test_comma2k19_actions_are_the_can_signals(segment: Path) -> None:
    (drive,) = find_drives([segment]).drives
    start = np.load(segment / "global_pose" / "frame_times")[0]
    assert drive.log is not None
    assert drive.log.steering_kind == "steering_wheel"
    for channel, name, scale in ((0, "speed", 1.0), (1, "steering_angle", math.pi / 180)):
        folder = segment / "processed_log" / "CAN" / name
        times, values = np.load(folder / "t") - start, np.load(folder / "value").ravel() * scale
        signal = drive.log.channels[channel]
        assert signal is not None
        np.testing.assert_allclose(signal.times, times, atol=1e-9)
        np.testing.assert_allclose(signal.values, values)


def test_comma2k19_frames_are_the_ones_asked_for(segment: Path) -> None:
    (drive,) = find_drives([segment]).drives
    numbers = [3, 250, 1199]
    streamed = np.stack(list(drive.stream(SIZE, numbers))).astype(float)
    hundreds = streamed[:, :, 18:].mean(axis=(1, 2, 3)) / 15 * 100
    assert np.round(hundreds / 100).tolist() == [0, 2, 11]
    np.testing.assert_allclose(streamed[:, :, :14].mean(axis=(1, 2, 3)), [6, 100, 198], atol=4)
    np.testing.assert_allclose(drive.frames(numbers, SIZE), streamed, atol=1)


def test_a_pause_of_one_can_signal_is_a_gap(segment: Path, tmp_path: Path) -> None:
    shutil.copytree(segment, tmp_path / "40", copy_function=shutil.copyfile)
    folder = tmp_path / "40" / "processed_log" / "CAN" / "speed"
    times, values = np.load(folder / "t"), np.load(folder / "value")
    elapsed = times - times[0]
    keep = (elapsed < 10) | (elapsed > 12)
    for name, array in (("t", times), ("value", values)):
        with (folder / name).open("wb") as file:
            np.save(file, array[keep])
    (drive,) = find_drives([tmp_path]).drives
    sampled = sample(drive)
    assert sampled.action_valid[:, STEERING].all()
    lost = sampled.timestamps[~sampled.action_valid[:, SPEED]]
    assert lost.min() == pytest.approx(10, abs=0.2)
    assert lost.max() == pytest.approx(12, abs=0.2)


def test_repeated_times_of_a_can_signal_are_left_out_with_a_line(
    segment: Path, tmp_path: Path
) -> None:
    shutil.copytree(segment, tmp_path / "40", copy_function=shutil.copyfile)
    path = tmp_path / "40" / "processed_log" / "CAN" / "speed" / "t"
    times = np.load(path)
    times[[7, 8]] = times[6]
    with path.open("wb") as file:
        np.save(file, times)
    (drive,) = find_drives([tmp_path]).drives
    assert drive.notices[-1] == "left out of speed: 2 values at the time of another one"
    assert drive.log is not None
    assert drive.log.speed is not None
    assert len(drive.log.speed.times) == len(times) - 2


def test_a_segment_with_too_few_frames_or_logs_is_skipped(segment: Path, tmp_path: Path) -> None:
    for name in ("short", "bare", "pickled"):
        shutil.copytree(segment, tmp_path / name, copy_function=shutil.copyfile)
    write_raw_hevc(tmp_path / "short" / "video.hevc", 5)
    shutil.rmtree(tmp_path / "bare" / "processed_log" / "CAN" / "speed")
    with (tmp_path / "pickled" / "global_pose" / "frame_times").open("wb") as file:
        np.save(file, np.array([{}], dtype=object), allow_pickle=True)
    drive_set = find_drives([tmp_path])
    reasons = {skipped.id: skipped.reason for skipped in drive_set.skipped}
    assert drive_set.drives == []
    assert "each of the 5 frames of video.hevc" in reasons["short"]
    assert "is missing from the comma2k19 segment" in reasons["bare"]
    assert "cannot be read as a NumPy array" in reasons["pickled"]


@pytest.mark.parametrize(("name", "value"), [("speed", 1e39), ("steering_angle", -5000.0)])
def test_absurd_can_signals_are_refused(
    segment: Path, tmp_path: Path, name: str, value: float
) -> None:
    shutil.copytree(segment, tmp_path / "40", copy_function=shutil.copyfile)
    path = tmp_path / "40" / "processed_log" / "CAN" / name / "value"
    values = np.load(path)
    values[7] = value
    with path.open("wb") as file:
        np.save(file, values)
    (skipped,) = find_drives([tmp_path]).skipped
    assert f"{name}/value: has values from" in skipped.reason
