"""Small recordings for the tests of the sources."""

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from driving_sim.data.actions.reading import AS_NAMED, Reading
from driving_sim.data.drive import Drive
from driving_sim.data.sources import find_drives
from driving_sim.data.video.frame_size import FrameSize
from driving_sim.data.video.writer import write_video
from tests import SHARED

START = datetime(2018, 7, 16, 23, 59, 59)


def shared(name: str) -> Path:
    """Return a folder of real recordings, or skip the test if it is missing."""
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is not here")
    return SHARED / name


def write_grey(*paths: Path) -> None:
    """Write videos of 10 grey frames, as MP4 whatever their suffix."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        video = path.with_name("written.mp4")
        write_video(video, np.full((10, 16, 32, 3), 90, np.uint8), 10)
        video.rename(path)


def write_actions(path: Path, header: str = "timestamp_s,speed_mps", mark: str = ",") -> None:
    """Write an action file of 10 rows at 10 Hz, with a value for each name in the header."""
    values = [[f"{t / 10:.1f}", *["1"] * header.count(",")] for t in range(10)]
    lines = [header.replace(",", mark), *map(mark.join, values)]
    path.write_text("\n".join(lines) + "\n")


def touch(folder: Path, *names: str) -> None:
    """Write small files."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def row(millisecond: int, steering: object = 0.1, speed: object = 10, more: str = "") -> str:
    """Return a row of the simulator's log."""
    stamp = (START + timedelta(milliseconds=millisecond)).strftime("%Y_%m_%d_%H_%M_%S_%f")[:-3]
    return f"C:\\sim\\IMG\\center_{stamp}.jpg,l.jpg,r.jpg,{steering},1,0,{speed}{more}"


def write_log(folder: Path, rows: Sequence[str], shades: Iterable[int] | None = None) -> list[Path]:
    """Write a recording of the simulator, and return the pictures of its rows.

    Picture n is of the grey `shades[n]`, by default 90.
    """
    (folder / "IMG").mkdir(parents=True, exist_ok=True)
    (folder / "driving_log.csv").write_text("\n".join(rows) + "\n")
    names = [text.split(",")[0].rsplit("\\", 1)[-1] for text in rows]
    for name, shade in zip(names, shades or [90] * len(names), strict=True):
        Image.new("L", (64, 32), shade).save(folder / "IMG" / name)
    return [folder / "IMG" / name for name in names]


def only_drive(folder: Path, reading: Reading = AS_NAMED) -> Drive:
    """Return the only drive in a folder, in which nothing is skipped."""
    drive_set = find_drives([folder], reading)
    assert drive_set.skipped == []
    (drive,) = drive_set.drives
    return drive


def reason(folder: Path, reading: Reading = AS_NAMED) -> str:
    """Return why the only drive in a folder is skipped."""
    drive_set = find_drives([folder], reading)
    assert drive_set.drives == []
    (skipped,) = drive_set.skipped
    assert skipped.reason.isprintable()
    return skipped.reason


def write_pictures(folder: Path, names: Sequence[str], size: tuple[int, int] = (64, 32)) -> None:
    """Write pictures; picture n has the grey level 5 n + 20."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", size, (5 * number + 20) % 256).save(folder / name)


def greys(drive: Drive) -> list[int]:
    """Return the number n of each frame that `write_pictures` wrote."""
    frames = drive.stream(FrameSize(height=16, width=32))
    return [round((float(frame.mean()) - 20) / 5) for frame in frames]


def write_csv(path: Path, header: str, rows: list[list[object]]) -> None:
    """Write a CSV with a header and rows of values."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *(",".join(map(str, row)) for row in rows)]) + "\n")


def write_picture_drives(folder: Path) -> None:
    """Write drives of pictures: named by a CSV, counted by one that lies in the same folder or
    beside it, and with times in their names."""
    for name in ("named", "counted", "timed", "beside"):
        pictures = [
            f"{1_532_402_927_612 + 100 * n if name == 'timed' else n}.jpg" for n in range(12)
        ]
        write_pictures(folder / name, pictures)
        columns = {"named": "image,t", "timed": "timestamp_ms"}.get(name, "frame")
        stems = [picture.removesuffix(".jpg") for picture in pictures]
        cells = [f"{n}.jpg,{n / 10}" if name == "named" else stem for n, stem in enumerate(stems)]
        rows = [f"{cell},{n / 3},{n / 50}" for n, cell in enumerate(cells)]
        header = f"{columns},speed_mps,road_wheel_rad"
        log = folder / "beside.csv" if name == "beside" else folder / name / "log.csv"
        log.write_text("\n".join([header, *rows]) + "\n")


def tub_record(number: int, **changes: Any) -> dict[str, Any]:
    """Return a record of a tub of version 2. A change to None removes the value."""
    record = {
        "_index": number,
        "_timestamp_ms": 1_610_895_050_000 + 50 * number,
        "_session_id": "21-01-17_0",
        "cam/image_array": f"{number}_cam_image_array_.jpg",
        "user/angle": number / 50,
        "user/mode": "user",
        "user/throttle": 0.5,
    } | {name.replace("__", "/"): value for name, value in changes.items()}
    return {name: value for name, value in record.items() if value is not None}


def write_tub_v2(
    folder: Path, records: Sequence[dict[str, Any]] = (), deleted: Sequence[object] = ()
) -> None:
    """Write a tub of version 2 with two catalogs."""
    records = records or [tub_record(number) for number in range(20)]
    write_pictures(folder / "images", [record["cam/image_array"] for record in records])
    half = len(records) // 2
    for name, part in (("catalog_0", records[:half]), ("catalog_1", records[half:])):
        (folder / f"{name}.catalog").write_text("".join(json.dumps(r) + "\n" for r in part))
        (folder / f"{name}.catalog_manifest").write_text("{}")
    catalogs = {"paths": ["catalog_0.catalog", "catalog_1.catalog"], "deleted_indexes": deleted}
    lines = [["cam/image_array", "user/angle"], ["image_array", "float"], {}, {}, catalogs]
    (folder / "manifest.json").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_tub_v1(folder: Path, count: int = 12, **changes: Any) -> None:
    """Write a tub of version 1."""
    write_pictures(folder, [f"{n}_cam-image_array_.jpg" for n in range(count)])
    (folder / "meta.json").write_text("{}")
    for number in range(count):
        record = {
            "cam/image_array": f"{number}_cam-image_array_.jpg",
            "user/angle": number / 50,
            "user/throttle": 0.5,
            "user/mode": "user",
            "timestamp": None,
        }
        text = json.dumps(record | changes)
        (folder / f"record_{number}.json").write_text(text)


def kitti_stamps(count: int, millisecond: int = 0) -> list[str]:
    """Return the lines of `timestamps.txt` at 10 Hz, with nanoseconds."""
    begin = datetime(2011, 9, 26, 13, 2, 59) + timedelta(milliseconds=millisecond)
    return [f"{begin + timedelta(milliseconds=100 * n, microseconds=1)}789" for n in range(count)]


def write_kitti(
    folder: Path,
    speeds: Sequence[float] = (10.0,) * 15,
    yaw_rates: Sequence[float] = (0.2,) * 15,
    cameras: Sequence[str] = ("image_02",),
    late_ms: int = 0,
) -> None:
    """Write a recording of KITTI at 10 Hz, whose `oxts` begins `late_ms` after the pictures."""
    count = len(speeds)
    for camera in cameras:
        write_pictures(folder / camera / "data", [f"{n:010}.png" for n in range(count)])
        (folder / camera / "timestamps.txt").write_text("\n".join(kitti_stamps(count)) + "\n")
    (folder / "oxts" / "data").mkdir(parents=True)
    stamps = "\n".join(kitti_stamps(count, late_ms)) + "\n"
    (folder / "oxts" / "timestamps.txt").write_text(stamps)
    for number, (speed, yaw_rate) in enumerate(zip(speeds, yaw_rates, strict=True)):
        # vn, ve, vf, vl, vu and the rates around x, y, z, forward, left and up.
        values = [49.0, 8.4, 112.9, 0.02, 0.01, -1.2, 3.5, -7.7, speed, 0.3, 0.1]
        values += [0.1] * 6 + [0.01, 0.02, 0.03, 0.04, 0.05, yaw_rate, 0.5, 0.1, 4, 11, 4, 4, 0]
        text = " ".join(f"{value:.14g}" for value in values)
        (folder / "oxts" / "data" / f"{number:010}.txt").write_text(text + "\n")


NUSCENES_START = 1_532_402_927_612_460
"""Time of the first picture in µs."""


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON, one element of an array in each line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=0))


def write_nuscenes(
    root: Path, *, scenes: int = 1, version: str = "v1.0-mini", speed: float = 10, turn: float = 0.2
) -> None:
    """Write a data set in nuScenes' schema, with 24 pictures at 12 Hz in each scene.

    The car drives at `speed` in m/s and turns to the left with `turn` in rad/s. Every sixth picture
    is a sample, and the others are sweeps.
    """
    tables: dict[str, list[dict[str, Any]]] = {
        "sensor": [
            {"token": "side", "channel": "CAM_FRONT_LEFT", "modality": "camera"},
            {"token": "front", "channel": "CAM_FRONT", "modality": "camera"},
        ],
        "calibrated_sensor": [
            {"token": "c-side", "sensor_token": "side", "rotation": [1, 0, 0, 0]},
            {"token": "c-front", "sensor_token": "front", "rotation": [1, 0, 0, 0]},
        ],
        "scene": [],
        "sample": [],
        "sample_data": [],
        "ego_pose": [],
    }
    for number in range(scenes):
        scene = f"scene-{number + 1:04}"
        tables["scene"].append({"token": f"t{number}", "name": scene, "nbr_samples": 4})
        for index in range(24):
            token, sample_token = f"{number}-{index}", f"{number}-{index - index % 6}"
            microseconds = NUSCENES_START + number * 30_000_000 + round(index * 1e6 / 12)
            if index % 6 == 0:
                tables["sample"].append({"token": sample_token, "scene_token": f"t{number}"})
            folder = "sweeps" if index % 6 else "samples"
            for camera in ("front", "side"):
                name = f"{folder}/{camera.upper()}/{scene}__{microseconds}.jpg"
                tables["sample_data"].append(
                    {
                        "token": f"{camera}-{token}",
                        "sample_token": sample_token,
                        "ego_pose_token": f"{camera}-{token}",
                        "calibrated_sensor_token": f"c-{camera}",
                        "timestamp": microseconds,
                        "is_key_frame": index % 6 == 0,
                        "filename": name,
                    }
                )
                angle = 2.5 + turn * index / 12
                along = speed / turn
                place = [along * math.sin(angle) + 600, 1600 - along * math.cos(angle), 0.5]
                tables["ego_pose"].append(
                    {
                        "token": f"{camera}-{token}",
                        "timestamp": microseconds,
                        "translation": place,
                        "rotation": [math.cos(angle / 2), 0.0, 0.0, math.sin(angle / 2)],
                    }
                )
            picture = root / folder / "FRONT" / f"{scene}__{microseconds}.jpg"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (64, 32), 5 * index + 20).save(picture)
    for name, rows in tables.items():
        write_json(root / version / f"{name}.json", rows[::-1])  # in no special order


def write_can_bus(root: Path, scene: str = "scene-0001") -> None:
    """Write the CAN bus of a scene: 8 m/s, 0.4 rad/s and a wheel that turns, both to the left."""
    pose = [
        {
            "utime": NUSCENES_START + 20_000 * n,
            "vel": [8.0, 0.5, 0.1],
            "rotation_rate": [0.01, 0.02, 0.4],
        }
        for n in range(105)
    ]
    wheel = [{"utime": NUSCENES_START + 10_000 * n, "value": -n / 100} for n in range(210)]
    write_json(root / "can_bus" / f"{scene}_pose.json", pose)
    write_json(root / "can_bus" / f"{scene}_steeranglefeedback.json", wheel)


def write_nuscenes_with_can_bus(root: Path) -> None:
    """Write two scenes, the first of them with its CAN bus."""
    write_nuscenes(root, scenes=2)
    write_can_bus(root)
