"""A picture that cannot be written costs that picture only."""

import errno
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from driving_sim.data.inspect.inspection import inspect_drives, picture_name
from tests.fixtures.video_files import write_numbered

LONG = "x" * 251


def test_a_name_is_shortened_only_if_it_is_too_long() -> None:
    assert picture_name("trip/a") == "trip/a.png"
    assert picture_name(f"trip/{'y' * 200}") == f"trip/{'y' * 200}.png"
    names = [picture_name(f"trip/{stem}") for stem in (LONG, LONG[:-1], "ü" * 120 + "z")]
    assert len(set(names)) == 3
    for name in names:
        folder, _, last = name.rpartition("/")
        assert folder == "trip"
        assert len(os.fsencode(last)) < 220
        assert last.endswith(".png")


def test_a_drive_with_a_long_name_is_inspected_with_the_others(tmp_path: Path) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_numbered(videos / "other.mp4", count=10)
    write_numbered(tmp_path / "long.mp4", count=10).rename(videos / f"{LONG}.mp4")
    report = inspect_drives([videos], out)
    assert [drive.id for drive in report.drives] == ["other", LONG]
    for drive in report.drives:
        assert drive.notices == ()
        with Image.open(out / str(drive.picture)) as picture:
            assert picture.width > 800
    # The earlier inspection is recognised by the shortened name, and replaced.
    inspect_drives([videos], out)


def test_a_picture_that_cannot_be_written_is_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    for name in ("a", "b"):
        write_numbered(videos / f"{name}.mp4", count=10)

    def refuse(path: Path, *_: object) -> None:
        if path.name == "a.png":
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(path))
        path.touch()

    monkeypatch.setattr("driving_sim.data.inspect.inspection.draw_drive", refuse)
    report = inspect_drives([videos], out)
    assert [drive.picture for drive in report.drives] == [None, "b.png"]
    assert report.notices == ["its picture cannot be written: File name too long (a)"]
    assert json.loads((out / "inspection.json").read_text())["drives"][0]["picture"] is None
    inspect_drives([videos], out)
