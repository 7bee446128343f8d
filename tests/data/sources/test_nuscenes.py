import json
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import sample
from driving_sim.data.sources import find_drives
from driving_sim.data.sources.nuscenes import motion
from driving_sim.data.sources.nuscenes.tables import read_rows
from driving_sim.engine.errors import DriveSimError
from tests.data.sources.recordings import (
    greys,
    only_drive,
    reason,
    shared,
    write_can_bus,
    write_json,
    write_nuscenes,
    write_nuscenes_with_can_bus,
)

POSES = (
    "the speed comes from the poses of the car",
    "the steering is the curvature of the path: the yaw rate divided by the speed",
)


def change(path: Path, edit: Callable[[list[Any]], object]) -> None:
    rows = json.loads(path.read_text())
    edit(rows)
    write_json(path, rows)


def test_the_frames_are_samples_and_sweeps_of_the_front_camera(tmp_path: Path) -> None:
    write_nuscenes(tmp_path / "set", scenes=2)
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["set/scene-0001", "set/scene-0002"]
    assert drive_set.passed_over == []
    for drive in drive_set.drives:
        assert (drive.source, drive.notices) == ("nuscenes", POSES)
        assert greys(drive) == [*range(24)]
        np.testing.assert_allclose(drive.timestamps, np.arange(24) / 12, atol=1e-5)


@pytest.mark.parametrize(("speed", "turn"), [(10, 0.2), (6, 0.5), (6, -0.5), (-3, 0.1)])
def test_speed_and_curvature_come_from_the_poses(tmp_path: Path, speed: float, turn: float) -> None:
    write_nuscenes(tmp_path, speed=speed, turn=turn)
    drive = only_drive(tmp_path)
    assert drive.log is not None
    assert drive.log.steering_kind == "curvature"
    assert drive.log.speed is not None
    np.testing.assert_allclose(drive.log.speed.times, (np.arange(23) + 0.5) / 12, atol=1e-5)
    sampled = sample(drive)
    assert sampled.action_valid[:-1].all()
    np.testing.assert_allclose(sampled.actions[:-1, 0], speed, rtol=1e-3)
    np.testing.assert_allclose(sampled.actions[:-1, 1], turn / speed, rtol=1e-3)


def test_the_can_bus_is_better(tmp_path: Path) -> None:
    write_nuscenes(tmp_path)
    write_can_bus(tmp_path)
    drive = only_drive(tmp_path)
    assert drive.notices == ("the speed comes from the CAN bus",)
    assert drive.log is not None
    assert drive.log.steering_kind == "steering_wheel"
    sampled = sample(drive)
    np.testing.assert_allclose(sampled.actions[:, 0], 8)
    # `steeranglefeedback` is positive to the right, and falls by 1 rad/s.
    middle = np.arange(23) / 12 + 1 / 24
    np.testing.assert_allclose(sampled.actions[:-1, 1], middle, atol=1e-3)
    later = only_drive(tmp_path, Reading(time_offset=0.5))
    assert later.log is not None
    assert later.log.steering is not None
    assert later.log.steering.times[0] == pytest.approx(0.5, abs=1e-5)


def test_the_curvature_comes_from_the_can_bus_if_asked_for(tmp_path: Path) -> None:
    write_nuscenes_with_can_bus(tmp_path)
    first, second = find_drives([tmp_path], Reading(steering_kind="curvature")).drives
    for drive, curvature in ((first, 0.4 / 8), (second, 0.02)):
        assert drive.log is not None
        assert drive.log.steering_kind == "curvature"
        np.testing.assert_allclose(sample(drive).actions[:-1, 1], curvature, rtol=1e-3)


def test_a_scene_that_the_can_bus_lacks_has_no_steering(tmp_path: Path) -> None:
    write_nuscenes_with_can_bus(tmp_path)
    drive_set = find_drives([tmp_path])
    assert drive_set.steering_kind == "steering_wheel"
    second = drive_set.drives[1]
    assert second.log is not None
    assert second.log.steering is None
    assert second.log.speed is not None
    np.testing.assert_allclose(second.log.speed.values, 10, rtol=1e-3)
    assert "the CAN bus lacks the steering of this scene" in second.notices[1]


def test_other_kinds_of_steering_are_refused(tmp_path: Path) -> None:
    write_nuscenes(tmp_path)
    for kind in ("steering_wheel", "normalised"):
        assert f"is curvature, but {kind} is needed" in reason(
            tmp_path, Reading(steering_kind=kind)
        )


def test_scenes_without_pictures_are_said_once(tmp_path: Path) -> None:
    write_nuscenes(tmp_path, scenes=3)
    for picture in tmp_path.glob("s*/FRONT/scene-0002*"):
        picture.unlink()
    missing = sorted(tmp_path.glob("sweeps/FRONT/scene-0003*"))[1:3]
    for picture in missing:
        picture.unlink()
    drive_set = find_drives([tmp_path])
    assert drive_set.skipped == []
    first, third = drive_set.drives
    assert len(first.timestamps) == 24
    assert greys(third) == [0, 1, *range(4, 24)]
    assert third.notices[0].startswith("2 of 24 pictures are missing")
    (line,) = drive_set.passed_over
    assert f"{tmp_path}: 1 of 3 scenes are left out: their pictures are not here" in line


def test_scenes_of_two_versions_are_read_once(tmp_path: Path) -> None:
    write_nuscenes(tmp_path, scenes=1, version="v1.0-mini")
    write_nuscenes(tmp_path, scenes=2, version="v1.0-trainval")
    drive_set = find_drives([tmp_path])
    assert len(drive_set.drives) == 2
    (line,) = drive_set.passed_over
    assert line.endswith("1 scenes of v1.0-trainval are in another version too and are read once")


def test_the_folder_of_the_tables_can_be_given(tmp_path: Path) -> None:
    write_nuscenes(tmp_path)
    drive_set = find_drives([tmp_path / "v1.0-mini"])
    assert [len(drive.timestamps) for drive in drive_set.drives] == [24]


def test_scenes_of_strange_names_are_numbered(tmp_path: Path) -> None:
    write_nuscenes(tmp_path, scenes=4)

    def rename(rows: list[Any]) -> None:
        for row, name in zip(rows, ("a/../..", "\x1b[31m", "same", "same"), strict=True):
            row["name"] = name

    change(tmp_path / "v1.0-mini" / "scene.json", rename)
    drive_set = find_drives([tmp_path])
    assert len({drive.id for drive in drive_set.drives}) == 4
    assert all(drive.id.split("/")[1].startswith("scene_") for drive in drive_set.drives)


def replaced(key: str, value: object) -> Callable[[list[Any]], object]:
    return lambda rows: [row.__setitem__(key, value) for row in rows]


BAD: dict[str, tuple[str, Callable[[list[Any]], object], str]] = {
    "outside": (
        "sample_data",
        replaced("filename", "../x.jpg"),
        "is not the name of a file inside",
    ),
    "no name": ("sample_data", replaced("filename", 7), "sample_data.json: filename is 7"),
    "time": ("sample_data", replaced("timestamp", "now"), "sample_data.json: timestamp is 'now'"),
    "late": ("sample_data", replaced("timestamp", 1e300), "timestamp is 1e+300"),
    "same": ("sample_data", replaced("timestamp", 5), "is not later than that of the one before"),
    "sample": ("sample_data", replaced("sample_token", "x"), "a picture belongs to no scene"),
    "camera": ("sensor", replaced("channel", "CAM_BACK"), "has no CAM_FRONT; its sensors are"),
    "pose": ("ego_pose", replaced("token", "x"), "lacks the poses of 24 pictures"),
    "nan": ("ego_pose", replaced("translation", [float("nan")] * 3), "translation is nan"),
    "short": ("ego_pose", replaced("rotation", [1, 0]), "rotation is [1, 0]"),
    "far": ("ego_pose", lambda rows: rows[8].update(translation=[9e6] * 3), "has speeds from"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_named(tmp_path: Path, name: str) -> None:
    table, edit, message = BAD[name]
    write_nuscenes(tmp_path)
    rows = json.loads((tmp_path / "v1.0-mini" / f"{table}.json").read_text())
    if table == "ego_pose":
        rows = [row for row in rows if row["token"].startswith("front")]
    edit(rows)
    write_json(tmp_path / "v1.0-mini" / f"{table}.json", rows)
    assert message in reason(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '[{"token": "t0", "na', "[{}", "[" * 90_000])
@pytest.mark.parametrize("table", ["scene", "sample_data", "ego_pose"])
def test_damaged_tables_are_named(tmp_path: Path, table: str, text: str) -> None:
    write_nuscenes(tmp_path)
    (tmp_path / "v1.0-mini" / f"{table}.json").write_text(text)
    assert f"v1.0-mini/{table}.json: " in reason(tmp_path)


def test_a_damaged_table_of_poses_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_nuscenes(tmp_path, scenes=3)
    (tmp_path / "v1.0-mini" / "ego_pose.json").write_text("[1]")
    read = []

    def counted(path: Path) -> Iterator[dict[str, Any]]:
        read.append(path)
        return read_rows(path)

    monkeypatch.setattr(motion, "read_rows", counted)
    assert len(find_drives([tmp_path]).skipped) == 3
    assert len(read) == 1


def test_a_rate_that_is_not_used_is_said(tmp_path: Path) -> None:
    write_nuscenes(tmp_path)
    line = "`video_fps` is not used, because the pictures have times"
    assert line in only_drive(tmp_path, Reading(video_fps=5)).notices


def test_a_bad_can_bus_is_named(tmp_path: Path) -> None:
    write_nuscenes(tmp_path)
    write_can_bus(tmp_path)
    wheel = tmp_path / "can_bus" / "scene-0001_steeranglefeedback.json"
    change(wheel, lambda rows: rows[3].update(utime=rows[1]["utime"]))
    drive = only_drive(tmp_path)
    assert drive.notices[1].startswith("1 messages of steeranglefeedback are not later")
    change(wheel, lambda rows: rows[3].update(value=90))
    assert "scene-0001_steeranglefeedback.json: value is 90" in reason(tmp_path)
    write_json(wheel, [])
    assert "scene-0001_steeranglefeedback.json: contains no messages" in reason(tmp_path)


def test_the_memory_for_a_table_does_not_depend_on_its_size(tmp_path: Path) -> None:
    row = json.dumps({"token": "x" * 32, "filename": "y" * 900})
    path = tmp_path / "sample_data.json"
    path.write_text("[\n" + ",\n".join([row] * 20_000) + "\n]")
    assert path.stat().st_size > 2**24
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    path.write_text('[{"a": "' + "y" * 2**23)
    with pytest.raises(DriveSimError, match=r"a row has more than 1,048,576 characters"):
        list(read_rows(path))


def test_a_set_without_pictures_is_named() -> None:
    with pytest.raises(DriveSimError, match=r"1 of 1 scenes are left out: .*images/host-a101_cam0"):
        find_drives([shared("format/nuscenes_schema")])
