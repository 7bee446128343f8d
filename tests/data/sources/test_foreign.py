import json
from collections.abc import Callable
from pathlib import Path

import pytest

from driving_sim.data.sources import find_drives
from driving_sim.engine.errors import DriveSimError
from tests.data.sources.recordings import shared, touch, write_grey


def write_lerobot(folder: Path) -> None:
    write_grey(folder / "videos" / "front" / "chunk-000" / "file-000.mp4")
    touch(folder, "data/chunk-000/file-000.parquet", "meta/info.json")
    (folder / "meta" / "info.json").write_text(json.dumps({"codebase_version": "v3.0"}))


LAYOUTS: dict[Callable[[Path], None], str] = {
    write_lerobot: "a LeRobot data set",
}


@pytest.mark.parametrize("write", LAYOUTS)
def test_a_foreign_layout_is_named_and_holds_no_drives(
    tmp_path: Path, write: Callable[[Path], None]
) -> None:
    line = f"is {LAYOUTS[write]}, which drivesim does not read yet; convert it to videos with CSVs"
    folder = tmp_path / "deep" / "set"
    write(folder)
    for path in (tmp_path, folder):
        with pytest.raises(DriveSimError) as caught:
            find_drives([path])
        assert str(caught.value) == f"{folder}: {line} beside them"
    write_grey(tmp_path / "a.mp4")
    write(tmp_path / "deep" / "third")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == ["a"]
    assert drive_set.skipped == []
    assert drive_set.passed_over == [f"{folder} (and 1 more folder): {line} beside them"]


def test_folders_that_only_resemble_a_foreign_layout_are_searched(tmp_path: Path) -> None:
    names = ("lerobot", "tub", "newer", "tables", "kitti")
    write_grey(*(tmp_path / name / "a.mp4" for name in names))
    touch(tmp_path, "lerobot/meta/info.json", "tub/meta.json", "newer/manifest.json")
    touch(tmp_path, "tables/sample.json", "tables/sensor.json", "kitti/image_02/a.png")
    drive_set = find_drives([tmp_path])
    assert [drive.id for drive in drive_set.drives] == sorted(f"{name}/a" for name in names)
    assert drive_set.passed_over == [f"{tmp_path}: passed over 6 other files: 5 .json, 1 .png"]


def test_real_sets_are_named() -> None:
    drives = {
        "lerobot_v21": "LeRobot",
        "lerobot_v30": "LeRobot",
    }
    for name, layout in drives.items():
        with pytest.raises(DriveSimError, match=rf"{name}: is a .*{layout}.*does not read yet"):
            find_drives([shared(f"format/{name}")])


def test_control_characters_in_the_name_of_a_folder_do_not_reach_the_terminal(
    tmp_path: Path,
) -> None:
    write_lerobot(tmp_path / "a\x1b[31m\nb")
    with pytest.raises(DriveSimError, match="LeRobot") as caught:
        find_drives([tmp_path])
    assert str(caught.value).isprintable()
