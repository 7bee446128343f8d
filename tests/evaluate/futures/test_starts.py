import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from driving_sim.data.synthetic.world import SyntheticConfig
from driving_sim.engine.errors import DriveSimError
from driving_sim.evaluate.futures.starts import find_starts, read
from driving_sim.world_model.actions import ActionStatistics
from driving_sim.world_model.transformer import Transformer
from driving_sim.world_model.world_model import WorldModel
from tests.fixtures.synthetic_worlds import write_futures
from tests.fixtures.token_drives import FPS
from tests.fixtures.world_models import new_world

COMMANDS = {"left": (9.0, 0.08), "right": (9.0, -0.08)}
CONFIG = SyntheticConfig(height=48, width=64, fps=FPS)


@pytest.fixture(scope="module")
def world() -> WorldModel:
    return new_world()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("futures") / "futures"
    write_futures(folder, COMMANDS, config=CONFIG)
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    """Return a copy that a test may damage."""
    shutil.copytree(original, tmp_path / "futures")
    return tmp_path / "futures"


def test_a_future_begins_where_its_context_ends(world: WorldModel, original: Path) -> None:
    starts = find_starts(world, original)
    assert [start.name for start in starts] == ["start_00", "start_01"]
    for start in starts:
        assert list(start.futures) == ["left", "right"]
        assert start.frames == 16
        assert len(start.context.indices) == world.context_frames
        now = read(world, start.context)[-1].astype(float)
        for future in start.futures.values():
            first, second = read(world, future)[:2].astype(float)
            assert np.square(first - now).mean() < np.square(second - now).mean() / 3
        actions, valid = start.actions
        assert valid.all()
        np.testing.assert_allclose(actions[0], np.tile(COMMANDS["left"], (16, 1)), rtol=1e-4)
        np.testing.assert_allclose(actions[1], np.tile(COMMANDS["right"], (16, 1)), rtol=1e-4)


def test_one_start_can_be_named_alone(world: WorldModel, original: Path) -> None:
    (start,) = find_starts(world, original / "start_01")
    assert start.name == "start_01"


@pytest.mark.parametrize("context_frames", [12, 13])
def test_videos_at_a_higher_rate_are_resampled_so_that_the_start_stays(
    world: WorldModel, tmp_path: Path, context_frames: int
) -> None:
    config = replace(CONFIG, fps=2 * FPS)
    write_futures(
        tmp_path / "futures", COMMANDS, starts=1, context_frames=context_frames, config=config
    )
    (start,) = find_starts(world, tmp_path / "futures")
    last = context_frames - 1
    assert start.context.indices.tolist() == [last - 4, last - 2, last]
    assert start.frames == 16
    assert start.futures["left"].indices.tolist() == list(range(0, 33, 2))


def test_videos_at_an_odd_rate_are_resampled_so_that_the_start_stays(
    world: WorldModel, tmp_path: Path
) -> None:
    config = replace(CONFIG, fps=1.5 * FPS)
    write_futures(tmp_path / "futures", COMMANDS, starts=1, context_frames=12, config=config)
    (start,) = find_starts(world, tmp_path / "futures")
    assert start.context.indices[-1] == 11
    assert start.frames == 16
    assert start.futures["left"].indices[0] == 0
    assert start.futures["left"].indices[-1] == 24


def test_videos_at_a_lower_rate_are_refused(world: WorldModel, tmp_path: Path) -> None:
    config = replace(CONFIG, fps=0.8 * FPS)
    write_futures(tmp_path / "futures", COMMANDS, starts=1, context_frames=12, config=config)
    with pytest.raises(DriveSimError, match=r"left: has 6.4 frames/s, but the model 8"):
        find_starts(world, tmp_path / "futures")


Damage = Callable[[Path], object]


def _remove(stem: Path) -> None:
    for suffix in (".mp4", ".csv"):
        stem.with_suffix(suffix).unlink()


def _shorten(start: Path) -> None:
    write_futures(start.parent / "new", COMMANDS, starts=1, seconds=1.75, config=CONFIG)
    for suffix in (".mp4", ".csv"):
        (start.parent / "new" / "start_00" / "left").with_suffix(suffix).replace(
            (start / "left").with_suffix(suffix)
        )
    shutil.rmtree(start.parent / "new")


def _begin_elsewhere(start: Path) -> None:
    for suffix in (".mp4", ".csv"):
        other = start.parent / "start_00" / f"right{suffix}"
        shutil.copy(other, start / f"right{suffix}")


def _curvature(start: Path) -> None:
    path = start / "right.csv"
    path.write_text(path.read_text().replace("road_wheel_rad", "curvature"))


def _end_early(start: Path) -> None:
    path = start / "left.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:20]))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda start: (start / "left.csv").unlink(), r"start_01/left\.csv: no such file"),
        (lambda start: (start / "context.csv").unlink(), r"start_01/context\.csv: no such file"),
        (lambda start: _remove(start / "context"), "start_01: no context; each start is"),
        (lambda start: _remove(start / "left"), "start_01: 1 futures; each start is"),
        (
            lambda start: [(start / f"left{s}").rename(start / f"up{s}") for s in (".mp4", ".csv")],
            "start_01: lacks the future 'left', which start_00 has",
        ),
        (_shorten, "start_01/left: has 15 frames, but start_00/left has 17"),
        (_begin_elsewhere, "start_01/right: its first frame is not the last one of its context"),
        (_curvature, r"start_01/right\.csv: column 'curvature' .* road_wheel is needed"),
        (_end_early, r"start_01/left: its CSV does not give the speed at 1\.\d s"),
        (
            lambda start: shutil.copy(start / "left.mp4", start / "left.mkv"),
            "start_01: has two videos 'left'",
        ),
    ],
)
def test_a_wrong_layout_is_one_line(
    world: WorldModel, folder: Path, damage: Damage, message: str
) -> None:
    damage(folder / "start_01")
    with pytest.raises(DriveSimError, match=message) as error:
        find_starts(world, folder)
    assert "\n" not in str(error.value)


def test_futures_and_contexts_that_are_too_short_are_refused(
    world: WorldModel, tmp_path: Path
) -> None:
    write_futures(tmp_path / "short", COMMANDS, starts=1, seconds=1.25, config=CONFIG)
    with pytest.raises(DriveSimError, match=r"futures last 1\.2 s; make them at least 1\.5 s"):
        find_starts(world, tmp_path / "short")
    write_futures(tmp_path / "abrupt", COMMANDS, starts=1, context_frames=2, config=CONFIG)
    with pytest.raises(DriveSimError, match=r"context: has 2 frames .* make a longer context"):
        find_starts(world, tmp_path / "abrupt")


def test_a_model_without_actions_is_refused(world: WorldModel, original: Path) -> None:
    model = Transformer(world.config.model, world.config.grid, ActionStatistics())
    still = WorldModel(model, world.tokenizer, fps=FPS, steering_kind=None)
    with pytest.raises(DriveSimError, match="learned no actions"):
        find_starts(still, original)
