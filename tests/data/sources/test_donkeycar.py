import json
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import sample
from driving_sim.data.inspect.inspection import inspect_drives
from driving_sim.data.sources import find_drives
from driving_sim.data.sources.donkeycar import records
from tests.data.sources.recordings import (
    greys,
    only_drive,
    reason,
    shared,
    tub_record,
    write_tub_v1,
    write_tub_v2,
)

THROTTLE = "the tub has no speed: the throttle stands in for it, with full throttle as 5 m/s"


def test_a_tub_of_version_2(tmp_path: Path) -> None:
    write_tub_v2(tmp_path / "tub")
    drive_set = find_drives([tmp_path])
    (drive,) = drive_set.drives
    assert (drive.id, drive.source) == ("tub", "donkeycar")
    assert drive_set.notices == [f"{THROTTLE} (tub)"]
    assert greys(drive) == [*range(20)]
    np.testing.assert_allclose(drive.timestamps, np.arange(20) / 20, atol=1e-6)
    assert drive.log is not None
    assert drive.log.steering_kind == "normalised"
    later = only_drive(tmp_path, Reading(time_offset=0.3))
    assert later.log is not None
    assert later.log.span == pytest.approx((0.3, 1.25), abs=1e-6)
    sampled = sample(drive)
    assert sampled.action_valid.all()
    np.testing.assert_allclose(sampled.actions[:, 0], 2.5)
    # The tub's angle is positive to the right.
    expected = -(np.arange(19) + 0.5) / 50
    np.testing.assert_allclose(sampled.actions[:-1, 1], expected, rtol=1e-5, atol=1e-6)


def test_deleted_records_are_left_out(tmp_path: Path) -> None:
    write_tub_v2(tmp_path, deleted=[0, 7, 8, 9, 99])
    drive = only_drive(tmp_path)
    kept = [n for n in range(20) if n not in (0, 7, 8, 9)]
    assert greys(drive) == kept
    np.testing.assert_allclose(drive.timestamps, (np.array(kept) - 1) / 20, atol=1e-6)
    assert drive.notices[0].startswith("4 of 20 records are marked as deleted")
    assert sample(drive).segments == [(0, 6), (6, 16)]


def test_each_session_is_a_drive(tmp_path: Path) -> None:
    rows = [tub_record(n, _session_id=f"s{n // 8}") for n in range(17)]
    write_tub_v2(tmp_path / "tub", rows)
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["tub/session_1", "tub/session_2"]
    assert [greys(drive) for drive in drive_set.drives] == [[*range(8)], [*range(8, 16)]]
    sessions, single, _ = drive_set.drives[0].notices
    assert sessions.startswith("the tub contains 3 sessions")
    assert single.startswith("1 of the sessions have fewer than 2 records")
    jumps = [0, *[20_000] * 5, *[-90_000] * 5]
    rows = [
        tub_record(n, _timestamp_ms=1_600_000_000_000 + 50 * n + jump, _session_id=None)
        for n, jump in enumerate(jumps)
    ]
    write_tub_v2(tmp_path / "tub", rows)
    assert len(find_drives([tmp_path]).drives) == 2


def test_what_an_autopilot_drove_is_its_own_or_unknown(tmp_path: Path) -> None:
    rows = [tub_record(n, user__mode="local", user__angle=0.0) for n in range(20)]
    for number, record in enumerate(rows[:10]):
        record |= {"pilot/angle": 0.4, "pilot/throttle": 1.2 if number == 3 else 0.8}
    for record in rows[15:]:
        record |= {"user/mode": "user", "user/angle": -0.2}
    write_tub_v2(tmp_path, rows)
    drive = only_drive(tmp_path)
    assert drive.log is not None
    assert drive.log.speed is not None
    assert drive.log.steering is not None
    np.testing.assert_allclose(drive.log.steering.values, [*[-0.4] * 10, *[0.2] * 5])
    np.testing.assert_allclose(drive.log.speed.values[2:5], [4, 5, 4])
    unknown, beyond, _ = drive.notices
    assert unknown.startswith("5 of 20 records do not contain the throttle or the steering")
    assert beyond == "1 records have values beyond ±1, which are taken as ±1"
    rows = [tub_record(n, user__mode="local_angle", pilot__angle=0.4) for n in range(20)]
    write_tub_v2(tmp_path, rows)
    np.testing.assert_allclose(sample(only_drive(tmp_path)).actions, [[2.5, -0.4]] * 20)


BAD_RECORDS: dict[str, tuple[dict[str, Any], str]] = {
    "text": ({"user__angle": "left"}, "user/angle is 'left', not a number from -1 to 1"),
    "nan": ({"user__angle": float("nan")}, "user/angle is nan"),
    "pixels": ({"user__throttle": 1500}, "user/throttle is 1500"),
    "huge": ({"user__throttle": 10**400}, "user/throttle is 1000"),
    "time": ({"_timestamp_ms": "now"}, "_timestamp_ms is 'now'"),
    "index": ({"_index": 2.5}, "_index is 2.5"),
    "bool": ({"user__angle": True}, "user/angle is True"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_names_its_line(tmp_path: Path, name: str) -> None:
    changes, message = BAD_RECORDS[name]
    write_tub_v2(tmp_path, [tub_record(n, **(changes if n == 13 else {})) for n in range(20)])
    assert f"catalog_1.catalog, line 4: {message}" in reason(tmp_path)


def test_files_that_are_no_tub_are_named(tmp_path: Path) -> None:
    write_tub_v2(tmp_path)
    catalog = tmp_path / "catalog_1.catalog"
    whole = catalog.read_text()
    catalog.write_text(whole[:-30])
    drive = only_drive(tmp_path)
    assert len(drive.timestamps) == 19
    assert drive.notices[0] == "the last line of catalog_1.catalog was cut off and is left out"
    catalog.write_text("{\n" + whole)
    assert "catalog_1.catalog, line 1: " in reason(tmp_path)
    catalog.write_text(whole.replace("13_cam", "../../13_cam"))
    assert "1 of 20 pictures are missing" not in only_drive(tmp_path).notices[0]
    (tmp_path / "images" / "13_cam_image_array_.jpg").unlink()
    assert "1 of 20 pictures are missing" in only_drive(tmp_path).notices[0]
    manifest = tmp_path / "manifest.json"
    twice = '{"paths": ["catalog_0.catalog", "catalog_1.catalog", "./catalog_0.catalog"]}'
    for last in (twice, '{"paths": ["../x"]}', '{"paths": []}', "[]", '{"deleted_indexes": []}'):
        manifest.write_text(f"{{}}\n{last}\n")
        assert "manifest.json: its last line must list the catalogs" in reason(tmp_path)


def test_a_catalog_of_a_false_size_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tub_v2(tmp_path)
    monkeypatch.setattr(records, "_MOST_CATALOG_BYTES", 99)
    assert "catalog_0.catalog: cannot be read (it has more than 99 bytes)" in reason(tmp_path)


def test_a_tub_of_too_many_records_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tub_v2(tmp_path)
    monkeypatch.setattr(records, "_MOST_RECORDS", 15)
    assert "catalog_1.catalog, line 6: the tub has more than 15 records" in reason(tmp_path)


def test_a_picture_that_is_a_link_out_of_the_tub_is_refused(tmp_path: Path) -> None:
    write_tub_v2(tmp_path / "tub")
    picture = tmp_path / "tub" / "images" / "4_cam_image_array_.jpg"
    picture.symlink_to(picture.rename(tmp_path / "secret.jpg"))
    assert "is a link that leads outside" in reason(tmp_path)


def test_a_tub_of_version_1_has_the_usual_rate_or_the_one_that_is_set(tmp_path: Path) -> None:
    write_tub_v1(tmp_path)
    (tmp_path / "record_5.json").unlink()  # A record was deleted.
    kept = np.array([n for n in range(12) if n != 5])
    for reading, rate in ((Reading(), 20), (Reading(video_fps=10), 10)):
        drive = only_drive(tmp_path, reading)
        np.testing.assert_allclose(drive.timestamps, kept / rate)
        assert f"{rate} records/s" in drive.notices[0]
    assert greys(drive) == kept.tolist()
    assert drive.log is not None
    assert drive.log.steering is not None
    np.testing.assert_allclose(drive.log.steering.values, -kept / 50, rtol=1e-6)


def test_a_tub_of_version_1_with_times(tmp_path: Path) -> None:
    write_tub_v1(tmp_path)
    start = datetime(2019, 3, 31, 1, 59, 59)
    for number in range(12):
        path = tmp_path / f"record_{number}.json"
        record = json.loads(path.read_text())
        moment = start + timedelta(milliseconds=100 * number)
        path.write_text(json.dumps(record | {"timestamp": str(moment)}))
    drive = only_drive(tmp_path)
    np.testing.assert_allclose(drive.timestamps, np.arange(12) / 10, atol=1e-6)
    assert drive.notices == (THROTTLE,)
    path.write_text("{")
    assert "record_11.json: " in reason(tmp_path)


@pytest.mark.parametrize(("backwards", "speed"), [(20, 2.5), (17, 2.5), (14, -2.5)])
def test_a_throttle_that_is_nearly_always_negative_means_forwards(
    tmp_path: Path, backwards: int, speed: float
) -> None:
    throttles = [-0.5] * backwards + [0.5] * (20 - backwards)
    write_tub_v2(tmp_path, [tub_record(n, user__throttle=t) for n, t in enumerate(throttles)])
    drive = only_drive(tmp_path)
    assert drive.log is not None
    assert drive.log.speed is not None
    assert drive.log.speed.values[0] == speed
    assert any("to mean forwards" in line for line in drive.notices) == (speed > 0)


def test_the_kind_of_steering_is_checked(tmp_path: Path) -> None:
    write_tub_v2(tmp_path)
    assert "is normalised, but road_wheel is needed" in reason(
        tmp_path, Reading(steering_kind="road_wheel")
    )


def test_a_real_tub_turns_to_where_its_steering_points(tmp_path: Path) -> None:
    report = inspect_drives([shared("format/donkey_tub_v2")], tmp_path / "out")
    (drive,) = report.drives
    assert drive.problems == ()
    assert drive.synchrony.correlation is not None
    assert drive.synchrony.correlation > 0.4


def test_real_tubs() -> None:
    drive = only_drive(shared("format/donkey_tub_v1"))
    assert len(drive.timestamps) == 60
    drive = only_drive(shared("format/donkey_tub_v2"))
    assert len(drive.timestamps) == 899
    assert drive.notices[0].startswith("200 of 1099 records are marked as deleted")
    assert 19 < 1 / np.median(np.diff(drive.timestamps)) < 21
    assert (np.sort(np.diff(drive.timestamps))[-2:] > 4).all()  # 100 deleted records each
