"""Every layout can be inspected, tokenized and evaluated, and a new one takes ten lines."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.actions.action_log import ActionLog
from driving_sim.data.actions.reading import Reading
from driving_sim.data.drive import Drive, sample
from driving_sim.data.image_frames import ImageFrames
from driving_sim.data.inspect.inspection import inspect_drives
from driving_sim.data.sources import find_drives, search
from driving_sim.data.sources.source import Contents, Folder, Found
from driving_sim.data.tokens.store import TokenStore
from driving_sim.evaluate.footage import footage_of
from driving_sim.evaluate.likelihood.held_out_bits import evaluate_likelihood
from driving_sim.tokenizer.tokenize import tokenize
from driving_sim.world_model import WorldModel
from tests.data.sources.recordings import (
    write_kitti,
    write_nuscenes,
    write_picture_drives,
    write_pictures,
    write_tub_v1,
    write_tub_v2,
)
from tests.fixtures.world_models import new_world

AT_10 = Reading(video_fps=10)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


class TenLines:
    """A source of ten lines: the pictures in a folder with a file `SPEED`, at 10 frames/s."""

    @staticmethod
    def detect(folder: Folder) -> bool:
        return "SPEED" in folder.files

    @staticmethod
    def drives(folder: Folder) -> Contents:
        return Contents(
            drives=(Found(path=folder.path, load=TenLines.load),), own=frozenset(folder.files)
        )

    @staticmethod
    def load(path: Path, drive_id: str, reading: Reading, actions: bool) -> Drive:
        pictures = tuple(sorted(path.glob("*.png")))
        times, speed = np.arange(len(pictures)) / 10, float((path / "SPEED").read_text())
        log = ActionLog.on_one_clock(times, np.array([[speed, 0.1]] * len(times)), "curvature")
        reader = ImageFrames(pictures)
        return Drive(id=drive_id, source="ten lines", timestamps=times, reader=reader, log=log)


def used(folder: Path, out: Path, world: WorldModel) -> TokenStore:
    """Inspect, tokenize and evaluate the drives in a folder; return their tokens."""
    report = inspect_drives([folder], out / "inspection", AT_10)
    assert report.skipped == []
    found = find_drives([folder], AT_10)
    assert [drive.id for drive in report.drives] == [drive.id for drive in found.drives]
    tokenize(found, world.tokenizer, out / "tokens")
    store = TokenStore(out / "tokens")
    assert {*report.notices} >= {*found.passed_over}
    for footage in footage_of(store.drives, [*map(sample, found.drives)], world.tokenizer):
        assert footage.frames(0, 4).shape[0] == 4
    kind = found.steering_kind
    world = WorldModel(world.transformer, world.tokenizer, fps=store.info.fps, steering_kind=kind)
    bits = evaluate_likelihood(world, store, None).metrics["bits_per_token"]
    assert isinstance(bits, dict)
    assert bits
    assert all(math.isfinite(value) for value in bits.values() if isinstance(value, float))
    return store


def test_a_source_of_ten_lines_can_be_used_everywhere(
    world: WorldModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pictures(tmp_path / "new", [f"{n:02}.png" for n in range(20)])
    (tmp_path / "new" / "SPEED").write_text("7")
    monkeypatch.setattr(search, "SOURCES", (TenLines, *search.SOURCES))
    (drive,) = used(tmp_path / "new", tmp_path / "out", world).drives
    np.testing.assert_allclose(drive.actions, [[7, 0.1]] * 20)


LAYOUTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pictures": (write_picture_drives, "road_wheel"),
    "tub v1": (write_tub_v1, "normalised"),
    "tub v2": (write_tub_v2, "normalised"),
    "kitti": (write_kitti, "curvature"),
    "nuscenes": (write_nuscenes, "curvature"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_can_be_used_everywhere(world: WorldModel, tmp_path: Path, name: str) -> None:
    write, kind = LAYOUTS[name]
    write(tmp_path / "recording")
    store = used(tmp_path / "recording", tmp_path / "out", world)
    assert store.info.steering_kind == kind
    for drive in store.drives:
        assert drive.action_valid[:-1].all()
